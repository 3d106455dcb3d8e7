"""Train an image model on real digits, split over the processes by one call.

    torchrun --standalone --nproc-per-node 2 examples/train_digits.py --model cnn
    torchrun --standalone --nproc-per-node 2 examples/train_digits.py --model vit

The images are scikit-learn's: 1,797 handwritten digits of 8 x 8 pixels, which come with
the package. Every fifth is held out. Neither model knows of tensor parallelism.
"""

import argparse
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from quintnet_dt import ProcessGroupManager, apply_tensor_parallel

# What torchrun tells each process; without it, one process alone.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))

DIGITS = 10


# --------------------------------------------------------------- the models


class Residual(nn.Module):
    """Two convolutions with batch norm, around which the input goes (ResNet's)."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(y)))


class CNN(nn.Module):
    """Images (b, 1, 8, 8) -> the logits of the ten digits (b, 10)."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(layers)))
        self.head = nn.Linear(width, DIGITS)

    def forward(self, images):
        x = F.max_pool2d(self.blocks(self.stem(images)), 2)
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        b, t, d = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Images (b, 1, 8, 8) -> the logits of the ten digits (b, 10), by 16 patches."""

    def __init__(self, width: int, layers: int, heads: int = 8):
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.positions = nn.Embedding(16, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, DIGITS)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = x + self.positions(torch.arange(16, device=x.device))
        return self.head(self.norm(self.blocks(x)).mean(1))


MODELS = {"cnn": CNN, "vit": ViT}


# ------------------------------------------------------- train and look at it


def read_digits(device):
    """(images, digits) to learn from, and those that are held out."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32, device=device)[:, None]
    digits = torch.tensor(found.target, device=device)
    held = torch.arange(len(digits), device=device) % 5 == 0
    images = images / 8 - 1
    return (images[~held], digits[~held]), (images[held], digits[held])


def train(model, images, digits, args) -> None:
    """AdamW with clipped gradients, over a learning rate that falls to nothing."""
    optimizer = torch.optim.AdamW(model.parameters(), args.lr)
    falls = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    rng = torch.Generator().manual_seed(args.seed)  # every rank: the same batches
    model.train()
    for step in range(args.steps):
        chosen = torch.randint(len(digits), (args.batch,), generator=rng)
        loss = F.cross_entropy(model(images[chosen]), digits[chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), falls.step(), optimizer.zero_grad()
        if step % max(1, args.steps // 5) == 0:
            say(f"step {step}: loss {loss.item():.3f}")


@torch.no_grad()
def look(model, images, digits) -> str:
    """The loss and the accuracy of digits that the model has not seen."""
    model.eval()
    logits = model(images)
    loss = F.cross_entropy(logits, digits).item()
    right = (logits.argmax(-1) == digits).float().mean().item()
    return f"loss {loss:.3f}, accuracy {right:.1%} of {len(digits)}"


def say(text) -> None:
    if RANK == 0:  # one for all
        print(text, flush=True)


def size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="cnn")
    defaults = dict(steps=120, batch=64, width=64, layers=2, lr=2e-3, seed=0)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args(argv)

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // LOCAL_WORLD_SIZE))
    device = torch.device(f"cuda:{LOCAL_RANK}" if torch.cuda.is_available() else "cpu")
    learned, held = read_digits(device)

    torch.manual_seed(args.seed)
    model = MODELS[args.model](args.width, args.layers).to(device)
    whole = size(model.parameters())

    with ProcessGroupManager(tp_size=WORLD_SIZE) as group:
        example = (learned[0][: args.batch],)
        apply_tensor_parallel(model, mesh=group, example_inputs=example)
        say(model.tensor_parallel_plan)
        held_by = [None] * WORLD_SIZE
        mine = size(p.to_local() for p in model.parameters())
        dist.all_gather_object(held_by, mine)
        say(f"parameter bytes: {whole} in the whole model, {held_by} on the ranks")
        say(f"held-out digits before: {look(model, *held)}")
        train(model, *learned, args)
        say(f"held-out digits after: {look(model, *held)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
