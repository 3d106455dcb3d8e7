"""Train a Hugging Face language model on a 2-D mesh: data parallel (FSDP2) x tensor
parallel.

    torchrun --standalone --nproc-per-node 4 examples/train_2d.py --stop 30    # dp 2 x
    tp 2, half of the steps torchrun --standalone --nproc-per-node 4
    examples/train_2d.py --tp 4       # goes on from the checkpoint, in another layout
    torchrun --standalone --nproc-per-node 4 examples/train_2d.py --model FOLDER
    --checkpoint other

The model is a tiny Llama over bytes with random weights, or that of FOLDER (config.json
and safetensors, as the hub and --export have them). No rank ever holds it whole. The
text is the source of Python's standard library, a byte a
token: for a model with a tokenizer, put its tokens into read_text. A step's batch is
the same in every layout.
"""

import argparse
import math
import os
import sys
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from quintnet_dt import (
    ProcessGroupManager,
    apply_tensor_parallel,
    export_safetensors,
    load_checkpoint,
    load_safetensors,
    materialize,
    save_checkpoint,
)

# What torchrun tells each process; without it, one process alone.
RANK, LOCAL_RANK = (int(os.environ.get(n, 0)) for n in ("RANK", "LOCAL_RANK"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))

BYTES = 256  # the vocabulary


# ----------------------------------------------------------------- the text


def read_text(device) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes to learn from, and those of every 20th file, held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts = [f for i, f in enumerate(files) if i % 20], files[::20]
    texts = (bytearray(b"".join(f.read_bytes() for f in part)) for part in parts)
    return tuple(torch.frombuffer(t, dtype=torch.uint8).to(device) for t in texts)


def windows(text: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
    """The bytes from each start on, (starts, length)."""
    return text[
        starts[:, None].to(text.device) + torch.arange(length, device=text.device)
    ].long()


# ---------------------------------------------------------------- the model


def build(args, group: ProcessGroupManager, device) -> nn.Module:
    """The model on the mesh. It starts without memory, and each rank then makes or
    reads its shards only."""
    if args.model:
        config = AutoConfig.from_pretrained(args.model)
    else:
        heads = args.hidden // 32
        config = LlamaConfig(
            vocab_size=BYTES,
            hidden_size=args.hidden,
            intermediate_size=3 * args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            max_position_embeddings=args.context,
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, args.dtype)
        )

    ids = torch.zeros(
        args.batch // group.dp_size // args.accumulate,
        args.context,
        dtype=torch.long,
        device=device,
    )
    example = {"input_ids": ids, "labels": ids, "use_cache": False}
    apply_tensor_parallel(model, mesh=group, example_inputs=example)
    if group.dp_size > 1:
        policy = (
            MixedPrecisionPolicy(torch.bfloat16, torch.float32)
            if device.type == "cuda"
            else MixedPrecisionPolicy()
        )
        blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
        for part in (*blocks, model):
            fully_shard(part, mesh=group.world_mesh["dp"], mp_policy=policy)

    if args.model:
        load_safetensors(args.model, model)
    else:
        materialize(model)
    return model


# ------------------------------------------------------------------ training


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def train(model, group, text, held_out, args) -> None:
    """AdamW, clipped gradients, warm-up then cosine; goes on from the checkpoint, if
    there is one."""
    # Made before any forward, which can leave FSDP2's parameters unsharded: it must
    # hold the shards.
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, (0.9, 0.95))

    def schedule(step: int) -> float:
        rise = (step + 1) / max(1, args.steps // 20)
        return min(rise, 0.05 + 0.475 * (1 + math.cos(math.pi * step / args.steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    begin, last, saving = 0, min(args.stop or args.steps, args.steps), None
    # of dropout: the same in a tp group only
    torch.manual_seed(args.seed + group.dp_rank)
    # .old: killed while it was replaced
    if any(Path(args.checkpoint + end).exists() for end in ("", ".old")):
        extra = load_checkpoint(args.checkpoint, model, optimizer)
        scheduler.load_state_dict(extra["scheduler"])
        begin = extra["step"]
        say(f"goes on from step {begin} of {args.checkpoint}")

    say(f"held-out loss before: {held_out_loss(model, held_out, args):.3f} nats a byte")

    model.train()
    with tqdm(
        total=last, initial=begin, desc="train", disable=RANK != 0, unit="step"
    ) as bar:
        for step in range(begin, last):
            # every rank: the same batch, of which it takes
            rng = torch.Generator().manual_seed(args.seed + step)
            starts = torch.randint(
                len(text) - args.context, (args.batch,), generator=rng
            )
            # its tp group's part
            parts = starts.chunk(group.dp_size)[group.dp_rank].chunk(args.accumulate)
            total = 0.0
            for i, part in enumerate(parts, 1):
                if isinstance(model, FSDPModule):  # reduces over dp once a step
                    model.set_requires_gradient_sync(i == args.accumulate)
                loss = (
                    loss_of(model, windows(text, part, args.context)) / args.accumulate
                )
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step(), scheduler.step(), optimizer.zero_grad()
            bar.set_postfix_str(f"loss {total:.3f}"), bar.update()
            if (step + 1) % args.save_every == 0 or step + 1 == last:
                if saving:
                    saving.result()  # raises what went wrong
                extra = {"step": step + 1, "scheduler": scheduler.state_dict()}
                saving = save_checkpoint(
                    args.checkpoint, model, optimizer, extra=extra, async_=True
                )
    if saving:
        saving.result()


@torch.no_grad()
def held_out_loss(model, text, args, batches: int = 4) -> float:
    """The mean loss, in nats a byte, over windows spread evenly over the text; every
    rank computes all of them."""
    model.eval()
    starts = torch.linspace(0, len(text) - args.context, batches * args.batch).long()
    return (
        sum(
            loss_of(model, windows(text, part, args.context)).item()
            for part in starts.chunk(batches)
        )
        / batches
    )


def say(text) -> None:
    if RANK == 0:  # one for all
        print(text, flush=True)


def size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tp",
        type=int,
        default=min(2, WORLD_SIZE),
        help="ranks of a tp group; the others are dp",
    )
    parser.add_argument(
        "--model",
        help="a folder with config.json and safetensors; default: random weights",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        help="of the parameters; on CUDA, FSDP2 computes in bfloat16",
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--stop", type=int, help="end after this step, to go on later")
    parser.add_argument(
        "--batch", type=int, default=16, help="windows a step, of all ranks"
    )
    parser.add_argument(
        "--accumulate",
        type=int,
        default=2,
        help="parts of a rank's batch, one after the other",
    )
    defaults = dict(
        layers=2,
        hidden=256,
        context=64,
        lr=2e-3,
        seed=0,
        save_every=20,
        checkpoint="train_2d.checkpoint",
    )
    for name, default in defaults.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), default=default
        )
    parser.add_argument(
        "--export", help="a folder for the trained model, as from_pretrained reads it"
    )
    args = parser.parse_args(argv)
    if args.batch % (WORLD_SIZE // args.tp * args.accumulate):
        parser.error(f"--batch {args.batch}: expected a multiple of dp x accumulate")

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // LOCAL_WORLD_SIZE))
    device = torch.device(f"cuda:{LOCAL_RANK}" if torch.cuda.is_available() else "cpu")
    text, held_out = read_text(device)
    torch.manual_seed(args.seed)

    with ProcessGroupManager(tp_size=args.tp) as group:
        model = build(args, group, device)
        say(model.tensor_parallel_plan)
        say(f"dp {group.dp_size} x tp {group.tp_size}")
        held = [None] * WORLD_SIZE
        dist.all_gather_object(held, size(p.to_local() for p in model.parameters()))
        say(
            f"parameter bytes: {size(model.parameters())} in the whole model, {held} on"
            " the ranks"
        )
        train(model, group, text, held_out, args)
        say(
            f"held-out loss after: {held_out_loss(model, held_out, args):.3f} nats a"
            " byte"
        )
        if args.export:
            export_safetensors(args.export, model)
            say(
                f"AutoModelForCausalLM.from_pretrained({args.export!r}) reads the model"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
