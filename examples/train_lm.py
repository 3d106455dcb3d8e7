"""Train a small language model, split over the processes by one call.

    torchrun --standalone --nproc-per-node 2 examples/train_lm.py    # split in two
    python examples/train_lm.py                                      # one process
    torchrun --standalone --nproc-per-node 2 examples/train_lm.py --check

The model is a GPT over bytes, in plain PyTorch: nothing in it knows of tensor
parallelism. The text is the source of Python's standard library. --check trains the
whole model beside the split one: the losses must agree.
"""

import argparse
import copy
import math
import os
import sys
import sysconfig
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from quintnet_dt import ProcessGroupManager, apply_tensor_parallel

# What torchrun tells each process; without it, one process alone.
RANK, LOCAL_RANK = (int(os.environ.get(n, 0)) for n in ("RANK", "LOCAL_RANK"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))

BYTES = 256  # the vocabulary


# ---------------------------------------------------------------- the model


def rotate(x):
    """Rotary positions: turn each pair of features by an angle that grows along t."""
    t, d = x.shape[-2:]
    frequency = 1000.0 ** -(torch.arange(0, d, 2, device=x.device) / d)
    angle = torch.arange(t, device=x.device)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.head_dim = hidden // heads
        self.q, self.k, self.v = (nn.Linear(hidden, hidden) for _ in range(3))
        self.out = nn.Linear(hidden, hidden)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (
            proj(x).view(b, t, -1, self.head_dim).transpose(1, 2)
            for proj in (self.q, self.k, self.v)
        )
        q, k = rotate(q), rotate(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, -1))


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden)
        self.attention = Attention(hidden, heads)
        self.norm2 = nn.LayerNorm(hidden)
        self.mlp = nn.Sequential(
            nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden)
        )

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Bytes (b, t) -> the logits of the next byte (b, t, 256)."""

    def __init__(self, hidden: int, layers: int, heads: int):
        super().__init__()
        self.tokens = nn.Embedding(BYTES, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.lm_head = nn.Linear(hidden, BYTES, bias=False)
        self.lm_head.weight = self.tokens.weight  # tied
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, ids):
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


# ----------------------------------------------------------------- the text


def read_text(device) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes to learn from, and those of every 20th file, held out."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(stdlib.glob("*.py"))
    for package in ("asyncio", "email", "http", "json", "logging", "unittest"):
        files += sorted((stdlib / package).glob("*.py"))
    parts = [f for i, f in enumerate(files) if i % 20], files[::20]
    texts = (bytearray(b"".join(f.read_bytes() for f in part)) for part in parts)
    return tuple(torch.frombuffer(t, dtype=torch.uint8).to(device) for t in texts)


def unigram_entropy(text: torch.Tensor) -> float:
    """The best loss, in nats a byte, without a look at the bytes before."""
    p = torch.bincount(text.int(), minlength=BYTES).double() / text.numel()
    return torch.special.entr(p).sum().item()


def windows(text: torch.Tensor, starts: torch.Tensor, length: int):
    """The bytes from each start on, and the bytes that follow each of them."""
    at = starts[:, None].to(text.device) + torch.arange(length + 1, device=text.device)
    ids = text[at].long()
    return ids[:, :-1], ids[:, 1:]


# ------------------------------------------------------- train and use it


def loss_of(model, ids, targets):
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())


def train(model, text, args, label: str) -> list[float]:
    """AdamW, clipped gradients, warm-up then cosine. Returns each step's loss."""
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, (0.9, 0.95))

    def schedule(step: int) -> float:
        rise = (step + 1) / max(1, args.steps // 20)
        return min(rise, 0.05 + 0.475 * (1 + math.cos(math.pi * step / args.steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    rng = torch.Generator().manual_seed(args.seed)  # every rank: the same batches
    losses, started = [], time.perf_counter()
    model.train()
    with tqdm(total=args.steps, desc=label, disable=RANK != 0, unit="step") as bar:
        for step in range(1, args.steps + 1):
            starts = torch.randint(
                len(text) - args.context, (args.batch,), generator=rng
            )
            loss = loss_of(model, *windows(text, starts, args.context))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step(), scheduler.step(), optimizer.zero_grad()
            losses.append(loss.item())
            speed = step * args.batch * args.context / (time.perf_counter() - started)
            bar.set_postfix_str(f"loss {losses[-1]:.3f}, {speed:,.0f} tokens/s")
            bar.update()
    return losses


@torch.no_grad()
def held_out_loss(model, text, args, batches: int = 32) -> float:
    """The mean loss over windows spread evenly over the text."""
    model.eval()
    starts = torch.linspace(0, len(text) - args.context - 1, batches * args.batch)
    parts = [windows(text, part, args.context) for part in starts.long().chunk(batches)]
    return sum(loss_of(model, *part).item() for part in parts) / batches


@torch.no_grad()
def write(model, prompt: str, args, device, length: int = 400) -> str:
    """Sample byte after byte. Every rank draws the same ones."""
    model.eval()
    generator = torch.Generator().manual_seed(args.seed)
    ids = torch.tensor([list(prompt.encode())], device=device)
    for _ in range(length):
        logits = model(ids[:, -args.context :])[0, -1].cpu()
        p = torch.softmax(logits / 0.7, dim=-1)
        drawn = torch.multinomial(p, 1, generator=generator).to(device)
        ids = torch.cat([ids, drawn[None]], dim=1)
    return bytes(ids[0].tolist()).decode(errors="replace")


def say(text) -> None:
    if RANK == 0:  # one for all
        print(text, flush=True)


def size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def check(model, whole_model, text, args, tolerance: float = 1e-8) -> bool:
    """Trains both on the same batches. Do the losses agree, to rounding?"""
    split = train(model, text, args, "split")
    whole = train(whole_model, text, args, "whole")
    for step in range(0, args.steps, max(1, args.steps // 5)):
        say(f"step {step}: split {split[step]:.15f}, whole {whole[step]:.15f}")
    worst = max(abs(a - b) for a, b in zip(split, whole))
    say(f"largest difference in {args.steps} steps: {worst:.1e} nats a byte")
    return worst < tolerance  # not if it is nan


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help="default 600; 20 with --check")
    defaults = dict(
        layers=2, hidden=256, heads=8, context=128, batch=8, lr=1e-3, seed=0
    )
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--check", action="store_true", help="against the whole model")
    args = parser.parse_args()
    args.steps = args.steps or (20 if args.check else 600)

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // LOCAL_WORLD_SIZE))
    device = torch.device(f"cuda:{LOCAL_RANK}" if torch.cuda.is_available() else "cpu")
    text, held_out = read_text(device)
    say(f"text: {len(text):,} bytes to learn from, {len(held_out):,} held out")

    torch.manual_seed(args.seed)  # every rank: the same weights
    model = GPT(args.hidden, args.layers, args.heads).to(device)
    if args.check:
        model = model.double()  # tells rounding, 1e-15 or so, from error
        whole_model = copy.deepcopy(model)
    whole = size(model.parameters())

    with ProcessGroupManager(tp_size=WORLD_SIZE) as group:
        model = apply_tensor_parallel(model, mesh=group)  # the one call
        say(model.tensor_parallel_plan)
        held = [None] * WORLD_SIZE
        dist.all_gather_object(held, size(p.to_local() for p in model.parameters()))
        say(f"parameter bytes: {whole} in the whole model, {held} on the ranks")
        if args.check:
            return 0 if check(model, whole_model, text, args) else 1
        train(model, text, args, "train")
        loss = held_out_loss(model, held_out, args)
        say(f"held-out loss:   {loss:.3f} nats a byte")
        say(f"unigram entropy: {unigram_entropy(held_out):.3f} nats a byte\n")
        say(write(model, "def main(", args, device))
        return 0


if __name__ == "__main__":
    sys.exit(main())
