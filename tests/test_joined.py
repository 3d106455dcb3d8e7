"""Shards that are put together (torch.cat) and cut again, as hybrids of attention and
recurrence do around a convolution."""

import pytest
import torch
import torch.nn.functional as F
from models.regions import D, attend, check_all, features, model
from torch import nn


def short_convolution(conv, *parts):
    """A causal convolution of each channel, of parts side by side."""
    x = torch.cat(parts, -1).mT
    x = F.silu(conv(x)[..., : x.shape[-1]])
    return x.mT.split([part.shape[-1] for part in parts], -1)


def channelwise(width):
    return nn.Conv1d(width, width, 3, groups=width, padding=2, bias=False)


def delta(heads, dim=4):
    """A gated delta rule in one chunk, from one projection by heads (Qwen3-Next)."""

    def forward(m, x):
        b, t, _ = x.shape
        parts = m.inp(x).view(b, t, heads, 4 * dim)
        q, k, v = (y.flatten(2) for y in parts.split([dim, dim, 2 * dim], -1))
        q, k, v = short_convolution(m.conv, q, k, v)
        q, k, v = (
            y.reshape(b, t, heads, -1).transpose(1, 2).double() for y in (q, k, v)
        )
        system = torch.tril(k @ k.mT, -1) + torch.eye(t, dtype=k.dtype)
        new = torch.linalg.solve_triangular(system, v, upper=False, unitriangular=True)
        mixed = torch.tril(q @ k.mT) @ new
        return m.out(mixed.transpose(1, 2).flatten(2).to(x.dtype))

    return model(
        forward,
        lambda: {
            "inp": nn.Linear(D, heads * 4 * dim),
            "conv": channelwise(heads * 4 * dim),
            "out": nn.Linear(heads * 2 * dim, D),
        },
    )


def apart(heads, dim=4):
    """Three projections (OLMo hybrid)."""

    def forward(m, x):
        b, t, _ = x.shape
        parts = short_convolution(m.conv, m.q(x), m.k(x), m.v(x))
        return m.out(attend(*(y.reshape(b, t, heads, dim) for y in parts)))

    return model(
        forward,
        lambda: {name: nn.Linear(D, heads * dim) for name in "qkv"}
        | {"conv": channelwise(3 * heads * dim), "out": nn.Linear(heads * dim, D)},
    )


def weights_joined(heads, dim=8):
    """Weights that are put together before one product."""

    def forward(m, x):
        b, t, _ = x.shape
        weight = torch.cat([m.q.weight, m.k.weight, m.v.weight])
        parts = F.linear(x, weight).chunk(3, -1)
        return m.out(attend(*(y.reshape(b, t, heads, dim) for y in parts)))

    return model(
        forward,
        lambda: {name: nn.Linear(D, heads * dim, bias=False) for name in "qkv"}
        | {"out": nn.Linear(heads * dim, D)},
    )


def branches(m, x):
    """Branches of their own axes, which a product sums over together (Inception)."""
    return m.out(torch.cat([F.relu(m.a(x)), F.gelu(m.b(x)), x], -1))


def cut_elsewhere(m, x):
    """Put together, then normed in groups that lie across the joint."""
    y = torch.cat([m.a(x), m.b(x)], -1).mT
    return m.out(m.norm_in_groups(y).mT)


CASES = {
    "a delta rule": dict(build=delta(12), local={"inp.weight": 0, "out.weight": 1}),
    "a delta rule of 5 heads": dict(build=delta(5)),
    "three projections": dict(
        build=apart(12), local={"q.weight": 0, "k.weight": 0, "out.weight": 1}
    ),
    "weights": dict(
        build=weights_joined(12), local={"q.weight": 0, "v.weight": 0, "out.weight": 1}
    ),
    "branches": dict(
        build=model(
            branches,
            lambda: {
                "a": nn.Linear(D, 32),
                "b": nn.Linear(D, 16),
                "out": nn.Linear(48 + D, D),
            },
        ),
        share=0.2,
    ),
    "cut elsewhere": dict(
        build=model(
            cut_elsewhere,
            lambda: {
                "a": nn.Linear(D, 40),
                "b": nn.Linear(D, 20),
                "norm_in_groups": nn.GroupNorm(12, 60),
                "out": nn.Linear(60, D),
            },
        ),
        share=0.2,
    ),
}


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_numbers_are_the_whole_models(n):
    common = dict(given=features(2, 6, D), share=0.12)
    check_all({name: {**common, **case} for name, case in CASES.items()}, n)
