"""Numbers in a model's code that index a sharded dim: they are translated from the
layout, or the call gets the whole."""

import pytest
import torch
import torch.nn.functional as F
from helpers import compare, pair
from ranks import run_ranks
from torch import nn

from quintnet_dt import plan_tensor_parallel


class Projected(nn.Module):
    """f of a projection to `width` features."""

    def __init__(self, f, width, inputs=10):
        super().__init__()
        self.up, self.f = nn.Linear(inputs, width), f

    def forward(self, x):
        return self.f(self.up(x))


class Sliced(nn.Module):
    """f of a projection's weight and bias, which it cuts itself."""

    def __init__(self, f, width):
        super().__init__()
        self.up, self.f = nn.Linear(10, width), f

    def forward(self, x):
        return self.f(x, self.up.weight, self.up.bias)


def pieces(y, count):
    d = y.shape[-1] // count
    parts = [y[..., i * 4 : (i + 1) * 4] for i in range(count)]
    assert d == 4
    return sum((i + 1.0) * p.tanh() for i, p in enumerate(parts))


def heads(y, width, count):
    return torch.cat(
        [y[..., i * width : (i + 1) * width].softmax(-1) for i in range(count)], -1
    )


def gated(y):
    return y[..., :12] * y[..., 12:24].sigmoid() + y[..., 24:].tanh()


def attention(q, k, v):
    q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def written(index, value=0.25):
    def f(y):
        y = y.clone()
        y[index] = value
        return y

    return f


def in_place(change):
    def f(y):
        y = y.clone()
        change(y)
        return y

    return f


def weight_slices(x, w, b):
    d = w.shape[0] // 3
    return attention(
        *(F.linear(x, w[i * d : (i + 1) * d], b[i * d : (i + 1) * d]) for i in range(3))
    )


def weight_constants(x, w, b):
    return attention(
        F.linear(x, w[:12], b[:12]),
        F.linear(x, w[12:24], b[12:24]),
        F.linear(x, w[24:], b[24:]),
    )


AFTER = {
    "3 pieces": (lambda y: pieces(y, 3), 12),
    "4 pieces": (lambda y: pieces(y, 4), 16),
    "5 pieces": (lambda y: pieces(y, 5), 20),
    "7 pieces": (lambda y: pieces(y, 7), 28),
    "qkv": (lambda y: attention(y[..., :12], y[..., 12:24], y[..., 24:]), 36),
    "qkv, from the end": (
        lambda y: attention(y[..., :12], y[..., 12:-12], y[..., -12:]),
        36,
    ),
    "qkv, beyond the end": (
        lambda y: attention(y[..., :12], y[..., 12:24], y[..., 24:999]),
        36,
    ),
    "qkv, narrow": (
        lambda y: attention(*(y.narrow(-1, i * 12, 12) for i in range(3))),
        36,
    ),
    "qkv, narrow by keyword": (
        lambda y: attention(
            *(y.narrow(dim=2, start=i * 12, length=12) for i in range(3))
        ),
        36,
    ),
    "qkv, by its own size": (
        lambda y: attention(
            *(y[..., i * (s := y.shape[-1] // 3) : (i + 1) * s] for i in range(3))
        ),
        36,
    ),
    "qkv, split": (lambda y: attention(*y.split([12, 12, 12], -1)), 36),
    "qkv, tensor_split": (lambda y: attention(*y.tensor_split([12, 24], -1)), 36),
    "gated": (gated, 36),
    "loop over heads": (lambda y: heads(y, 6, 3), 18),
    "loop over 5 heads": (lambda y: heads(y, 4, 5), 20),
    "a part": (lambda y: y[..., :6].softmax(-1), 12),
    "a middle": (lambda y: y[..., 3:9].tanh(), 12),
    "a place": (lambda y: y[..., 7] * y[..., -1], 12),
    "an unequal split": (
        lambda y: torch.cat([p.softmax(-1) for p in y.split([4, 2, 6], -1)], -1),
        12,
    ),
    "diff": (lambda y: y.diff(dim=-1), 12),
    "roll": (lambda y: y.roll(3, -1), 12),
    "pad": (lambda y: F.pad(y, (2, 0)), 12),
    "index_select": (lambda y: y.index_select(-1, torch.tensor([1, 4, 7])), 12),
    "write a head of it": (written((..., slice(None, 2))), 12),
    "write a tail": (written((..., slice(9, None)), -1e4), 12),
    "write between": (written((..., slice(4, 8))), 12),
    "write a place": (written((..., 5)), 12),
    "write a list": (written((..., [0, 7])), 12),
    "write every other": (written((..., slice(None, None, 2))), 12),
    "write all": (written((..., slice(0, 12))), 12),
    "fill_": (in_place(lambda y: y[..., 10:].fill_(0.5)), 12),
    "zero_": (in_place(lambda y: y.narrow(-1, 2, 6).zero_()), 12),
    "add_": (in_place(lambda y: y.select(-1, 5).add_(1)), 12),
    "index_fill": (lambda y: y.index_fill(-1, torch.tensor([1, 8]), 0.5), 12),
    "masked by numbers": (lambda y: y.masked_fill(torch.arange(12) > 8, 0.5), 12),
}
CUT = {
    "weights, by their size": (weight_slices, 36),
    "weights, by numbers": (weight_constants, 36),
}


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_numbers_that_index(n):
    """Output and gradients of each, on n ranks."""
    cases = [(name, Projected, *case) for name, case in AFTER.items()] + [
        (k, Sliced, *c) for k, c in CUT.items()
    ]
    if n > 2:  # those that a shard's length meets otherwise there
        others = (
            "3 pieces",
            "4 pieces",
            "5 pieces",
            "7 pieces",
            "qkv",
            "loop over heads",
            "loop over 5 heads",
        )
        cases = [c for c in cases if c[0] in (*others, "weights, by numbers")]

    def ranks(rank):
        torch.manual_seed(3)
        x = (torch.randn(2, 3, 10),)
        for name, kind, f, width in cases:
            sharded, whole = pair(
                lambda: kind(f, width), n, example_inputs=(x[0].double(),)
            )
            try:
                compare(sharded, whole, x)
            except AssertionError as e:
                e.add_note(f"{name}:\n{sharded.tensor_parallel_plan}")
                raise

    run_ranks(ranks, n, timeout=120)


@pytest.mark.parametrize("real", [6, 8, 11])
def test_a_padded_vocabulary(real):
    class LM(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.head = nn.Embedding(12, 16), nn.Linear(16, 12, bias=False)

        def forward(self, ids, targets):
            logits = self.head(self.tokens(ids))
            logits[..., real:] = -1e4
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def ranks(rank):
        ids = torch.arange(6).view(2, 3) % real
        sharded, whole = pair(LM, 2, example_inputs=(ids, ids))
        compare(sharded, whole, (ids, ids.flip(1)))

    run_ranks(ranks, 2)


def test_what_is_translated_stays_local():
    """Heads of a fused projection by slices: no weight is gathered, and nothing is sent
    but the sum at the end."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

        def forward(self, x):
            y = self.qkv(x)
            return self.out(attention(y[..., :32], y[..., 32:64], y[..., 64:]))

    plan = plan_tensor_parallel(
        Attention(), 2, example_inputs=(torch.randn(2, 80, 32),)
    )
    assert plan["qkv.weight"].how == plan["out.weight"].how == "local"


def test_a_number_that_varies():
    """It indexes a sharded dim: with another one the call is shown anew before it
    runs."""

    class Truncated(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

        def forward(self, x, kept):
            y = self.up(x).tanh()
            return self.down(torch.cat([y[..., :kept], y[..., kept:].exp()], -1))

    def ranks(rank):
        x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
        sharded, whole = pair(Truncated, 2, example_inputs=(x.double(), 12))
        for kept in 12, 8, 6, 4, 9, 12, 30:
            compare(sharded, whole, (x, kept))

    run_ranks(ranks, 2)


class Positions(nn.Module):
    """A table of positions, of which the forward takes as many rows as its input is
    long."""

    def __init__(self, cut):
        super().__init__()
        self.table, self.norm, self.cut = (
            nn.Parameter(torch.randn(12, 24)),
            nn.GroupNorm(3, 24),
            cut,
        )

    def forward(self, x):
        h = x + self.cut(self.table, x.shape[1])
        return self.norm(h.transpose(1, 2)).transpose(1, 2), h.log_softmax(-1)


@pytest.mark.parametrize("first", [4, 6, 12])
def test_a_table_of_positions(first):
    """Traced at lengths that divide the table, and at its own: other lengths take other
    rows."""
    cuts = {
        "slice": lambda table, length: table[:length],
        "narrow": lambda table, length: table.narrow(0, 0, length),
        "split": lambda table, length: table.split(length)[0],
        "from the end": lambda table, length: table[12 - length :],
    }

    def ranks(rank):
        for name, cut in cuts.items():
            models = pair(
                lambda: Positions(cut),
                2,
                example_inputs=(torch.randn(2, first, 24).double(),),
            )
            for length in first, 4, 8, 12, 3:
                try:
                    compare(*models, (torch.randn(2, length, 24),))
                except Exception as e:
                    e.add_note(
                        f"{name}, length {length}: {models[0].tensor_parallel_plan}"
                    )
                    raise

    run_ranks(ranks, 2)
