"""One attention block, split and whole, for tests of what happens around its calls."""

import torch
from helpers import pair
from ranks import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 16)
        self.f = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.register_buffer("mask", torch.tril(torch.ones(16, 16)).bool())

    def forward(self, x):
        q, k, v = (
            t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
        )
        s = (q @ k.mT).masked_fill(~self.mask[: x.shape[1], : x.shape[1]], -1e4)
        x = x + self.o((s.softmax(-1) @ v).transpose(1, 2).flatten(2))
        if len(x) == 7:
            raise ValueError("seven")
        return x + self.f(x)

    def encode(self, x):
        return self.f(self.qkv(x)[..., :16])


def given(*shape, dtype=torch.float64):
    return (
        torch.randn(
            *shape or (2, 5, 16), generator=torch.Generator().manual_seed(5)
        ).to(dtype),
    )


def both(ranks, n=2, build=Attention, **options):
    """Run `ranks(sharded, whole)` on n ranks; what it raises is raised."""
    run_ranks(lambda rank: ranks(*pair(build, n, example_inputs=given(), **options)), n)


def near(found, whole, tol):
    found = found.full_tensor() if isinstance(found, DTensor) else found
    assert found.dtype == whole.dtype
    error = (
        found.double() - whole.double()
    ).abs().max() / whole.double().abs().max().clamp(min=1e-30)
    assert error <= tol, f"relative error {error:.1e}"


def step(sharded, whole, x, tol):
    """Outputs and gradients of one step in any dtype."""
    out = [model(x) for model in (sharded, whole)]
    near(*out, tol)
    for model, y in zip((sharded, whole), out):
        model.zero_grad()
        y.float().square().sum().backward()
    for p, q in zip(sharded.parameters(), whole.parameters()):
        near(p.grad, q.grad, 2 * tol)
