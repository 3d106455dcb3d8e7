"""Modules composed at random from operators that have rules: sharded over two ranks
they give the whole model's outputs and gradients."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor

from quintnet_dt import apply_tensor_parallel, plan_tensor_parallel

B, T = 2, 4


def linear(m, d, rng):
    out = rng.choice([4, 8, 12])
    w = m.param(out, d)
    b = m.param(out) if rng.random() < 0.5 else None
    return lambda x: F.linear(x, w(), b and b()), out


def matmul(m, d, rng):
    out = rng.choice([4, 8])
    w = m.param(d, out)
    return lambda x: x @ w(), out


def scale(m, d, rng):
    w = m.param(d)
    return lambda x: x * w(), d


def shift(m, d, rng):
    w = m.param(1, T, d)
    return lambda x: x + w(), d


def heads(m, d, rng):
    h = rng.choice([2, 4])
    w = m.param(h, 1, 1)
    return (
        lambda x: (x.view(B, T, h, -1).transpose(1, 2) * w())
        .transpose(1, 2)
        .reshape(B, T, -1),
        d,
    )


def attention(m, d, rng):
    ws = [m.param(d, d) for _ in range(3)]
    causal = rng.random() < 0.5

    def f(x):
        q, k, v = (F.linear(x, w()).view(B, T, 2, -1).transpose(1, 2) for w in ws)
        return (
            F.scaled_dot_product_attention(q, k, v, is_causal=causal)
            .transpose(1, 2)
            .flatten(2)
        )

    return f, d


def gated(m, d, rng):
    w = m.param(2 * d, d)

    def f(x):
        a, b = F.linear(x, w()).chunk(2, -1)
        return F.silu(a) * b

    return f, d


def split_unequal(m, d, rng):
    w = m.param(d, d)

    def f(x):
        a, b = F.linear(x, w()).split([d // 4, d - d // 4], -1)
        return torch.cat([b, a.tanh()], -1)

    return f, d


def layer_norm(m, d, rng):
    w, b = m.param(d), m.param(d)
    return lambda x: F.layer_norm(x, (d,), w(), b()), d


def rms(m, d, rng):
    w = m.param(d)
    return lambda x: w() * x * (x.pow(2).mean(-1, keepdim=True) + 1e-3).rsqrt(), d


def softmax(m, d, rng):
    dim = rng.choice([1, 2])
    return lambda x: x.softmax(dim), d


def group_softmax(m, d, rng):
    return lambda x: x.view(B, T, 2, -1).softmax(-1).flatten(2), d


def conv(m, d, rng):
    out = rng.choice([4, 8])
    w, b = m.param(out, d, 3), m.param(out)
    return (
        lambda x: F.conv1d(x.transpose(1, 2), w(), b(), padding=1).transpose(1, 2),
        out,
    )


def depthwise(m, d, rng):
    w = m.param(d, 1, 3)
    return (
        lambda x: F.conv1d(x.transpose(1, 2), w(), padding=1, groups=d).transpose(1, 2),
        d,
    )


def roll(m, d, rng):
    dim = rng.choice([1, 2])
    return lambda x: x.roll(1, dim), d


def rotate(m, d, rng):
    return lambda x: torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1), d


def stride(m, d, rng):
    return lambda x: torch.stack([x[..., ::2], -x[..., 1::2]], -1).flatten(2), d


def residual(m, d, rng):
    w1, w2 = m.param(3 * d, d), m.param(d, 3 * d)
    return lambda x: x + F.linear(F.gelu(F.linear(x, w1())), w2()), d


def lookup(m, d, rng):
    w, i = m.param(d, d), torch.arange(d - 1, -1, -1)
    return lambda x: F.linear(x, w())[..., i], d


def in_place(m, d, rng):
    w, b = m.param(d, d), m.param(d)
    return lambda x: F.linear(x, w()).add_(b()).mul_(2.0), d


def masked(m, d, rng):
    w = m.param(d, d)
    return (
        lambda x: F.linear(x, w()).masked_fill(torch.ones(T, 1).cumsum(0) > 2, 0.5),
        d,
    )


def cumsum(m, d, rng):
    dim = rng.choice([1, 2])
    return lambda x: x.cumsum(dim), d


def gather(m, d, rng):
    w = m.param(d, d)
    return (
        lambda x: F.linear(x, w()).gather(1, torch.zeros(B, T, d, dtype=torch.long)),
        d,
    )


def group_norm(m, d, rng):
    w, b = m.param(d), m.param(d)
    return lambda x: F.group_norm(x.transpose(1, 2), 2, w(), b()).transpose(1, 2), d


def repeat_heads(m, d, rng):
    w = m.param(d, d)
    return (
        lambda x: F.linear(x, w())
        .view(B, T, 2, 1, -1)
        .expand(-1, -1, 2, 2, -1)
        .reshape(B, T, 2 * d),
        2 * d,
    )


def reduce(m, d, rng):
    w = m.param(d, d)
    return lambda x: x + F.linear(x, w()).sum(-1, keepdim=True), d


PIECES = [
    *(
        linear,
        matmul,
        scale,
        shift,
        heads,
        attention,
        gated,
        split_unequal,
        layer_norm,
        rms,
        softmax,
        group_softmax,
    ),
    *(
        conv,
        depthwise,
        roll,
        rotate,
        stride,
        residual,
        lookup,
        in_place,
        masked,
        cumsum,
        gather,
        group_norm,
    ),
    *(repeat_heads, reduce),
]


class Param:
    """Reads a parameter from the module that runs: a copy has its own."""

    def __init__(self, name):
        self.name, self.module = name, None

    def __call__(self):
        return getattr(self.module, self.name)


class Random(nn.Module):
    """A chain of operators given by a seed; `names` says which."""

    def __init__(self, seed, n):
        super().__init__()
        rng, d = random.Random(seed), 8
        self.seed, self.reads, self.steps, self.names = seed, [], [], []
        self.gen = torch.Generator().manual_seed(seed)
        for piece in (linear, *rng.choices(PIECES, k=n)):
            f, new = piece(self, d, rng)
            if new > 48:
                continue
            self.steps.append(f)
            self.names.append(piece.__name__)
            d = new
        del self.gen

    def param(self, *shape):
        read = Param(f"p{len(self.reads)}")
        self.reads.append(read)
        p = (
            torch.randn(*shape, generator=self.gen, dtype=torch.float64)
            / max(1, shape[-1]) ** 0.5
        )
        setattr(self, read.name, nn.Parameter(p))
        return read

    def forward(self, x):
        for read in self.reads:
            read.module = self
        for f in self.steps:
            x = f(x)
        return x

    def __deepcopy__(self, memo):
        new = copy.copy(self)
        new.__dict__ = {
            k: copy.deepcopy(v, memo) if k.startswith("_") else v
            for k, v in self.__dict__.items()
        }
        return new


def sample(seed):
    model = Random(seed, 3 + seed % 6)
    x = torch.randn(
        B, T, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return model, x


@settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.integers(0, 10**6))
def test_planning_never_raises(seed):
    model, x = sample(seed)
    plan = plan_tensor_parallel(model, 2, example_inputs=(x,))
    assert plan.entries.keys() == dict(model.named_parameters()).keys()


def close(a, b):
    return a.shape == b.shape and (a - b).abs().max() <= 1e-9 * max(
        1.0, b.abs().max().item()
    )


def mistakes(seed):
    """What two ranks compute of one module that the whole one does not."""
    whole, x = sample(seed)
    model, y = sample(seed)
    x.requires_grad_(), y.requires_grad_()
    apply_tensor_parallel(model, tp_size=2, example_inputs=(y,))
    expected, found = whole(x), model(y)
    grad = torch.randn(
        expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    expected.backward(grad)
    found.backward(grad)
    wrong = [] if close(found, expected) else ["the output"]
    wrong += [] if close(y.grad, x.grad) else ["the input's gradient"]
    for (name, p), q in zip(model.named_parameters(), whole.parameters()):
        g = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        wrong += [] if close(g, q.grad) else [f"the gradient of {name} {p.placements}"]
    return wrong and f"seed {seed} {whole.names}: {wrong}"


@pytest.mark.parametrize("start", [0, 1000])
def test_two_ranks_compute_what_one_does(start):
    def ranks(rank):
        found = []
        for seed in range(start, start + 30):
            try:
                found.append(mistakes(seed))
            except Exception as e:
                found.append(
                    f"seed {seed} {sample(seed)[0].names}: {type(e).__name__}: {e}"
                )
        return [f for f in found if f]

    found = run_ranks(ranks, 2, timeout=100)
    assert found[0] == [] and found[1] == [], "\n".join(sorted({*found[0], *found[1]}))


class TiedHead(nn.Module):
    """A tied head whose vocabulary is split by a view: its rows are 4 units of 4, or
    interleaved."""

    def __init__(self, dim):
        super().__init__()
        self.e, self.dim = nn.Embedding(16, 8, dtype=torch.float64), dim

    def forward(self, ids):
        y = F.linear(self.e(ids), self.e.weight).view(*ids.shape, 4, 4)
        return y.softmax(self.dim)


@pytest.mark.parametrize("dim", [-1, -2])
def test_rows_of_a_table_that_are_a_part_of_a_dim(dim):
    def ranks(rank):
        torch.manual_seed(0)
        whole = TiedHead(dim)
        model, ids = copy.deepcopy(whole), torch.arange(16).view(2, 8)
        apply_tensor_parallel(model, tp_size=2, example_inputs=(ids,))
        a, b = model(ids), whole(ids)
        a.pow(2).sum().backward(), b.pow(2).sum().backward()
        return close(a, b) and close(
            model.e.weight.grad.full_tensor(), whole.e.weight.grad
        )

    assert run_ranks(ranks, 2) == [True, True]
