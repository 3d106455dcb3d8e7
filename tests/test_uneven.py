"""Axes that the ranks do not divide: heads dealt out whole, odd vocabularies, fewer
key-value heads than ranks; and parts of a dim that are one of every so many, or are
written to."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import compare, pair
from models.regions import (
    FLOAT32,
    HEADS,
    D,
    attention,
    check_all,
    features,
    fused,
    ids,
    llama,
    model,
)
from ranks import run_ranks
from torch import nn

from quintnet_dt import TensorParallelPlan, plan_tensor_parallel
from quintnet_dt.axes.split import Segment, Split
from quintnet_dt.groups import SimulatedGroup, Units, part_of


def test_units_are_dealt_out_whole():
    assert Units(10).sizes(4) == [3, 3, 3, 1]
    assert Units(10, balanced=True).sizes(4) == [3, 3, 2, 2]
    assert Units(5).sizes(4) == [2, 2, 1, 0]
    assert Units(5, balanced=True).sizes(4) == [2, 1, 1, 1]


def test_the_parts_of_a_balanced_split_are_the_whole():
    split = Split(0, 5, (Segment(2, 3), Segment(1, 2)), balanced=True)
    parts = [split.ranges(rank, 4) for rank in range(4)]
    taken = sorted(i for part in parts for s, n in part for i in range(s, s + n))
    assert taken == list(range(split.length)) == list(range(40))
    shapes = [split.local_shape((40, 7), rank, 4) for rank in range(4)]
    assert shapes == [(16, 7), (8, 7), (8, 7), (8, 7)]


def test_a_size_is_dealt_out_in_units():
    ranks = [SimulatedGroup(rank, 4) for rank in range(4)]
    heads = Units(5, balanced=True)
    assert [part_of(40, heads, group) for group in ranks] == [16, 8, 8, 8]
    assert part_of(41, heads, ranks[0]) is None
    assert [part_of(40, Units(8), group) for group in ranks] == [10] * 4


def interleaved(m, x):
    """A gate and an up projection, of which the weight has rows in turn."""
    y = m.inp(x)
    return m.out(F.silu(y[..., ::2]) * y[..., 1::2])


def means(m, x):
    """A mean over units, and a norm of each."""
    h = F.gelu(m.each(m.inp(x).mT).mT)
    return m.out(h) * h.mean(-1, keepdim=True)


def written(m, x):
    """Keys of two parts, written into one tensor, as DeepSeek-V3's attention does."""
    b, t, _ = x.shape
    query, key = m.q(x).view(b, t, 12, 6), m.k(x).view(b, t, 12, 4)
    shared = x[..., :2].unsqueeze(2).expand(-1, -1, key.shape[2], -1)
    both = key.new_empty(*key.shape[:-1], 6)
    both[..., :4].copy_(key)
    both[..., 4:].copy_(shared)
    return m.o((query * both).flatten(2))


def merged(heads):
    """As BLOOM's attention: heads beside the batch, whose size is computed back."""

    def forward(m, x):
        b, t, _ = x.shape
        parts = m.inp(x).view(b, t, heads, 3, 8)
        q, k, v = (
            parts[..., i, :].transpose(1, 2).reshape(b * heads, t, 8) for i in range(3)
        )
        slopes = torch.arange(1, heads + 1, dtype=x.dtype)[None, :, None, None] / heads
        alibi = (slopes * torch.arange(t)).expand(b, -1, -1, -1)
        scores = torch.baddbmm(alibi.reshape(b * heads, 1, t), q, k.mT)
        found = scores.view(b, heads, t, -1).softmax(-1).view(b * heads, t, t) @ v
        batch = found.shape[0] // heads
        found = found.view(batch, heads, t, 8).transpose(1, 2)
        return m.out(found.reshape(batch, t, heads * 8))

    def layers():
        return {"inp": nn.Linear(D, heads * 24), "out": nn.Linear(heads * 8, D)}

    return model(forward, layers)


def by_its_shape(m, x):
    """As Falcon's: one key for a group of heads, given their shape; and what is made
    for as many heads as there seem to be."""
    b, t, _ = x.shape
    parts = m.inp(x).view(b, t, -1, 4, 8)
    query, key = parts[:, :, :, :-1], parts[:, :, :, [-1]]
    key = torch.broadcast_to(key, query.shape).flatten(2, 3)
    times = x[..., :1, None].expand(b, t, query.shape[2] * 3, 8)
    return m.out((query.flatten(2, 3) * key * times).flatten(2))


def masked(m, x):
    """As Flaubert's: a mask that takes its shape from the scores of a shard."""
    b, t, _ = x.shape
    q, k, v = (w(x).view(b, t, 12, 4).transpose(1, 2) for w in (m.q, m.k, m.v))
    scores = q @ k.mT
    mask = (torch.arange(t) > t - 2).view(1, 1, 1, t).expand_as(scores)
    mixed = scores.masked_fill(mask, -1e9).softmax(-1) @ v
    index = torch.arange(t).remainder(2).view(1, 1, t, 1).expand_as(mixed)
    sums = torch.zeros_like(mixed).scatter_add(2, index, mixed)
    return m.o((mixed + sums).transpose(1, 2).flatten(2))


def dropped(m, x):
    return m.out(F.dropout(F.relu(m.inp(x)), 0.3))


CASES = {
    "heads": dict(build=attention(heads=5, dim=8), local=HEADS),
    "heads of one weight, by a number": dict(
        build=fused("thirds", 5, 5, 8), local={"inp.weight": 1, "out.weight": 0}
    ),
    "heads of one weight, by sizes": dict(
        build=fused("sizes", 5, 5, 8), local={"inp.weight": 0, "out.weight": 1}
    ),
    "heads beside the batch": dict(
        build=merged(12), local={"inp.weight": 0, "out.weight": 1}
    ),
    "uneven heads beside the batch": dict(
        build=merged(5), local={"inp.weight": 0, "out.weight": 1}
    ),
    "one key for three heads, by its shape": dict(
        build=model(
            by_its_shape,
            lambda: {"inp": nn.Linear(D, 5 * 32), "out": nn.Linear(120, D)},
        ),
        local={"out.weight": 1},
    ),
    "fewer heads than ranks": dict(build=attention(heads=3, dim=8), share=0.4),
    "expand_as": dict(
        build=model(
            masked,
            lambda: {name: nn.Linear(D, 48) for name in "qkv"}
            | {"o": nn.Linear(48, D)},
        ),
        local={"q.weight": 0, "o.weight": 1},
    ),
    "rows in turn": dict(
        build=model(
            interleaved, lambda: {"inp": nn.Linear(D, 96), "out": nn.Linear(48, D)}
        ),
        local={"inp.weight": 0, "out.weight": 1},
    ),
    "writes into slices": dict(
        build=model(
            written,
            lambda: {
                "q": nn.Linear(D, 72),
                "k": nn.Linear(D, 48),
                "o": nn.Linear(72, D),
            },
        ),
        local={"q.weight": 0, "k.weight": 0, "o.weight": 1},
    ),
    "means": dict(
        build=model(
            means,
            lambda: {
                "inp": nn.Linear(D, 99),
                "each": nn.GroupNorm(99, 99),
                "out": nn.Linear(99, D),
            },
        )
    ),
    "dropout": dict(
        build=model(dropped, lambda: {"inp": nn.Linear(D, 99), "out": nn.Linear(99, D)})
    ),
}
SMALL_HEADS = dict(num_attention_heads=8, num_key_value_heads=2, head_dim=4)
TEXTS = {
    "odd vocabulary": dict(
        build=lambda: llama(vocab_size=397), local={"lm_head.weight": 0}
    ),
    "odd vocabulary, tied": dict(
        build=lambda: llama(vocab_size=397, tie_word_embeddings=True)
    ),
    "padding in a vocabulary": dict(
        build=lambda: llama(vocab_size=396, tie_word_embeddings=True, pad_token_id=390)
    ),
    "few key-value heads": dict(
        build=lambda: llama(**SMALL_HEADS), local={"q_proj.weight": 0}
    ),
    "one key-value head": dict(
        build=lambda: llama(**{**SMALL_HEADS, "num_key_value_heads": 1}),
        local={"q_proj.weight": 0},
    ),
    "uneven heads of few key-value heads": dict(
        build=lambda: llama(
            hidden_size=36, num_attention_heads=6, num_key_value_heads=2, head_dim=4
        ),
        local={"q_proj.weight": 0},
    ),
    "uneven heads of few key-value heads, eager": dict(
        build=lambda: llama(
            hidden_size=36,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=4,
            attn_implementation="eager",
        ),
        local={"q_proj.weight": 0},
    ),
    "few key-value heads, eager": dict(
        build=lambda: llama(**SMALL_HEADS, attn_implementation="eager"),
        local={"q_proj.weight": 0},
    ),
}


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_numbers_are_the_whole_models(n):
    common = dict(given=features(2, 5, D), share=0.1)
    check_all({name: {**common, **case} for name, case in CASES.items()}, n)


@pytest.mark.parametrize("n", [2, 4])
def test_texts(n):
    text = dict(given=ids(2, 6), share=0.15, tol=FLOAT32)
    check_all({name: {**text, **case} for name, case in TEXTS.items()}, n)


def test_fewer_key_value_heads_than_ranks_are_not_gathered():
    plan = plan_tensor_parallel(llama(**SMALL_HEADS), 4, example_inputs=ids(2, 6)())
    query = plan["model.layers.0.self_attn.q_proj.weight"]
    assert (query.dim, query.pieces, query.units) == (0, 1, 8)
    assert plan["model.layers.0.self_attn.o_proj.weight"].how == "local"


def test_a_plan_with_uneven_axes_is_read_from_json_and_applied():
    def ranks(rank):
        x = features(2, 5, D)()
        build = attention(heads=5, dim=8)
        plan = plan_tensor_parallel(build(), 2, example_inputs=copy.deepcopy(x))
        assert plan["q.weight"].how == "exchanged" and plan["q.weight"].units == 5
        assert "an axis of 5 units, 3 a rank" in plan["q.weight"].why
        read = TensorParallelPlan.from_json(plan.to_json())
        torch.manual_seed(3)
        sharded, whole = pair(build, 2, example_inputs=x, plan=read)
        made = sharded.tensor_parallel_plan
        assert {n: (e.how, e.units) for n, e in made.entries.items()} == {
            n: (e.how, e.units) for n, e in plan.entries.items()
        }
        compare(sharded, whole, tuple(t.double() for t in x))

    run_ranks(ranks, 2)
