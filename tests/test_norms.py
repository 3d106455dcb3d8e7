"""Norms of features that the ranks share: they exchange statistics, and keep their
shards."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models.regions import D, attend, check_all, features, model
from ranks import run_ranks
from torch import nn

from quintnet_dt import apply_tensor_parallel, plan_tensor_parallel

LOCAL = {"inp.weight": 0, "out.weight": 1}


def between(norm, width=96):
    """A norm within a feed-forward network, as NormFormer and Kosmos-2.5 have it."""
    return model(
        lambda m, x: m.out(m.norm_inside(F.gelu(m.inp(x)))),
        lambda: {
            "inp": nn.Linear(D, width),
            "norm_inside": norm(width),
            "out": nn.Linear(width, D),
        },
    )


class Sized(nn.Module):
    """A norm that takes its size from what it is given, on the last two dims."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width // 4, 4))

    def forward(self, x):
        x = x.unflatten(-1, (-1, 4))
        x = F.layer_norm(x, x.shape[-2:], self.weight)
        return F.rms_norm(x.flatten(-2), (x.shape[-2] * 4,), eps=1e-3)


class Image(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))
        self.bias = nn.Parameter(torch.rand(width))

    def forward(self, x):
        x = x.mT.unflatten(-1, (-1, 1))
        return F.group_norm(x, 1, self.weight, self.bias).flatten(2).mT


def of_heads(m, x):
    """As OLMo 2's: queries and keys are normalised before they are cut into heads."""
    b, t, _ = x.shape
    q, k = m.q_norm(m.q(x)), m.k_norm(m.k(x))
    return m.o(attend(*(y.view(b, t, -1, 8) for y in (q, k, m.v(x)))))


def large(width):
    """Features whose mean is large beside their deviation."""
    return nn.Sequential(Shift(), nn.LayerNorm(width), nn.RMSNorm(width))


class Shift(nn.Module):
    def forward(self, x):
        return x + 300


CASES = {
    "layer norm": dict(build=between(nn.LayerNorm), local=LOCAL),
    "its bias alone is missing": dict(
        build=between(lambda n: nn.LayerNorm(n, bias=False)), local=LOCAL
    ),
    "no scales": dict(
        build=between(lambda n: nn.LayerNorm(n, elementwise_affine=False)), local=LOCAL
    ),
    "rms norm": dict(build=between(nn.RMSNorm), local=LOCAL),
    "rms norm, eps": dict(build=between(lambda n: nn.RMSNorm(n, 0.1)), local=LOCAL),
    "uneven": dict(build=between(nn.LayerNorm, 99), local=LOCAL),
    "uneven rms": dict(build=between(nn.RMSNorm, 99), local=LOCAL),
    "two dims, by their sizes": dict(build=between(Sized), local=LOCAL),
    "one group of channels": dict(build=between(Image), local=LOCAL),
    "a large mean": dict(build=between(large), local=LOCAL),
    "queries and keys": dict(
        build=model(
            of_heads,
            lambda: {name: nn.Linear(D, 96) for name in "qkv"}
            | {name: nn.LayerNorm(96) for name in ("q_norm", "k_norm")}
            | {"o": nn.Linear(96, D)},
        ),
        local={"q.weight": 0, "k.weight": 0, "v.weight": 0, "o.weight": 1},
    ),
}


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_numbers_are_the_whole_models(n):
    common = dict(given=features(2, 5, D), share=0.1)
    check_all({name: {**common, **case} for name, case in CASES.items()}, n)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_the_features_are_not_gathered(norm):
    build = between(norm)
    plan = plan_tensor_parallel(build(), 4, example_inputs=features(64, 512, D)())
    entries = {name: plan[f"{name}.weight"] for name in ("inp", "norm_inside", "out")}
    assert {name: e.how for name, e in entries.items()} == dict.fromkeys(
        entries, "local"
    )
    rows, itemsize, shares = 64 * 512, 4, 2 * 3 / 4
    # an all-reduce of the output and one of the input's gradient, and the statistics
    features_sent = 2 * rows * D * itemsize * shares
    assert plan.cost.bytes_sent <= features_sent + 16 * rows * itemsize * 3 / 4


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_short_floats_are_normalised_as_torch_does_it(norm):
    """Small ones too, of which the default eps of an RMS norm decides."""

    def same(found, wanted):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.02)

    def ranks(rank):
        torch.manual_seed(0)
        whole = between(norm)().bfloat16()
        x = torch.randn(4, 7, D).bfloat16() * 1e-2
        sharded = copy.deepcopy(whole)
        apply_tensor_parallel(sharded, 2, example_inputs=(x,), device="H100")
        assert sharded.tensor_parallel_plan["norm_inside.weight"].how == "local"
        same(sharded(x), whole(x))
        inner = sharded.norm_inside, whole.norm_inside
        for module in inner:
            module.float()  # what is scaled stays short
        sharded.out.float(), whole.out.float()
        with torch.autocast("cpu", torch.bfloat16):
            same(sharded(x), whole(x))

    run_ranks(ranks, 2)
