"""Axes: which dims of which parameters are one axis. No name is read."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quintnet_dt.axes.axes import Axes
from quintnet_dt.axes.factors import Factor, leaves, take, unify
from quintnet_dt.axes.sharding import Axis, LayoutError, ShardedParam, Sharding
from quintnet_dt.axes.split import Segment, Split
from quintnet_dt.planning.lay_out import lay_out
from quintnet_dt.tracing.trace import trace


def axes_of(model, *inputs, **kwargs):
    graph = trace(model, inputs, kwargs)
    return graph, Axes(graph)


def shared(model, *inputs):
    """The axes of a model as {frozenset of "parameter[dim] outer x units x inner"},
    those of one parameter included."""
    graph, axes = axes_of(model, *inputs)
    found = {}
    for name, v in graph.params.items():
        for f in dict.fromkeys(f for dim in axes.final(v) for f in dim):
            at = Axis((f,)).find(axes, v)
            if at:
                ((outer, inner),) = at.segments
                found.setdefault(f, set()).add(
                    f"{name}[{at.dim}] {outer}x{f.size}x{inner}"
                )
    return {frozenset(places) for places in found.values()}


def places(text):
    return frozenset(p.strip() for p in text.strip().splitlines())


# ------------------------------------------------------------------- factors


def test_take_cuts_at_a_boundary():
    fs = [Factor(4), Factor(6)]
    got, rest = take(fs, 4)
    assert (got, rest) == ([fs[0]], [fs[1]])


def test_take_cuts_a_factor():
    f = Factor(12)
    got, rest = take([f], 4)
    assert [x.size for x in got] == [4] and [x.size for x in rest] == [3]
    assert leaves([f]) == [*got, *rest]


def test_take_reaches_into_the_next_factor():
    fs = [Factor(4), Factor(6)]
    got, rest = take(fs, 8)
    assert [x.size for x in got] == [4, 2] and [x.size for x in rest] == [3]


def test_take_of_one_takes_nothing():
    f = Factor(4)
    assert take([f], 1) == ([], [f])
    assert take([], 1) == ([], [])


@pytest.mark.parametrize(
    "sizes, size",
    [((6,), 4), ((4, 6), 10), ((4, 6), 16), ((4,), 8), ((), 2), ((3, 4), 4)],
)
def test_take_knows_where_it_cannot_cut(sizes, size):
    assert take([Factor(s) for s in sizes], size) is None


def test_unify_merges_and_refines():
    a, b = [Factor(12)], [Factor(2), Factor(6)]
    unify(a, b)
    assert leaves(a) == leaves(b) and [f.size for f in leaves(a)] == [2, 6]


def test_unify_refines_both():
    a, b = [Factor(4), Factor(6)], [Factor(8), Factor(3)]
    unify(a, b)
    assert leaves(a) == leaves(b) and [f.size for f in leaves(a)] == [4, 2, 3]
    assert not any(f.unshardable for f in leaves(a))


def test_unify_is_transitive_and_idempotent():
    a, b, c = [Factor(12)], [Factor(12)], [Factor(3), Factor(4)]
    unify(a, b)
    unify(b, c)
    unify(a, c), unify(a, a), unify(c, b)
    assert leaves(a) == leaves(b) == leaves(c) and [f.size for f in leaves(a)] == [3, 4]


def test_unify_without_a_common_refinement_is_unshardable():
    a, b = [Factor(3), Factor(2)], [Factor(2), Factor(3)]
    unify(a, b)
    assert all(f.unshardable for f in leaves(a) + leaves(b))


def test_unshardable_is_kept_through_merging_and_cutting():
    a, b, c = [Factor(12)], [Factor(12)], [Factor(12)]
    a[0].unshardable = True
    unify(b, a)
    unify(c, b)
    got, rest = take(c, 3)
    assert all(f.unshardable for f in [*got, *rest, *leaves(a), *leaves(b)])


def test_a_factor_that_meets_its_own_outer_part():
    """x.view(4, 3) unified with its transpose, and a factor with a part of itself, must
    end."""
    f = Factor(4)
    outer, inner = take([f], 2)
    unify(outer, inner)  # [2, 2] of one axis: twice the same
    assert leaves([f])[0] is leaves([f])[1]
    g = Factor(8)
    o, i = take([g], 4)
    unify(o, i)
    assert [x.size for x in leaves([g])] == [2, 2, 2]


# ------------------------------------------------------------------- models


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; `fused`: None, "blocks" ([q|k|v]),
    "heads" ([q k v] a head, as GPT-NeoX)."""

    def __init__(self, d=16, heads=4, kv=2, d_head=4, fused=None):
        super().__init__()
        self.heads, self.kv, self.d_head, self.fused = heads, kv, d_head, fused
        if fused:
            self.m0 = nn.Linear(d, 3 * heads * d_head, bias=False)
        else:
            self.m0 = nn.Linear(d, heads * d_head, bias=False)
            self.m1 = nn.Linear(d, kv * d_head, bias=False)
            self.m2 = nn.Linear(d, kv * d_head, bias=False)
        self.m3 = nn.Linear(heads * d_head, d, bias=False)

    def forward(self, x):
        b, t, _ = x.shape
        if self.fused == "blocks":
            q, k, v = (
                y.view(b, t, self.heads, self.d_head).transpose(1, 2)
                for y in self.m0(x).chunk(3, -1)
            )
        elif self.fused == "heads":
            q, k, v = (
                self.m0(x)
                .view(b, t, self.heads, 3 * self.d_head)
                .transpose(1, 2)
                .chunk(3, -1)
            )
        else:
            q, k, v = (
                m(x).view(b, t, -1, self.d_head).transpose(1, 2)
                for m in (self.m0, self.m1, self.m2)
            )
            n = self.heads // self.kv
            k, v = (
                y[:, :, None]
                .expand(b, self.kv, n, t, self.d_head)
                .reshape(b, self.heads, t, -1)
                for y in (k, v)
            )
        q, k = self.rotate(q), self.rotate(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.m3(y.transpose(1, 2).reshape(b, t, -1))

    def rotate(self, x):
        angles = torch.arange(x.shape[-2])[:, None] / 10.0 ** torch.arange(
            self.d_head // 2
        )
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class RMSNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x):
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


class Block(nn.Module):
    def __init__(self, attention, d=16, hidden=24, fused=False):
        super().__init__()
        self.n0, self.n1, self.a, self.fused = RMSNorm(d), RMSNorm(d), attention, fused
        if fused:
            self.f0 = nn.Linear(d, 2 * hidden, bias=False)
        else:
            self.f0, self.f1 = nn.Linear(d, hidden, bias=False), nn.Linear(
                d, hidden, bias=False
            )
        self.f2 = nn.Linear(hidden, d, bias=False)

    def forward(self, x):
        x = x + self.a(self.n0(x))
        y = self.n1(x)
        gate, up = self.f0(y).chunk(2, -1) if self.fused else (self.f0(y), self.f1(y))
        return x + self.f2(F.silu(gate) * up)


class Decoder(nn.Module):
    def __init__(self, *blocks, vocab=40, d=16, tied=False):
        super().__init__()
        self.e, self.b, self.n = (
            nn.Embedding(vocab, d),
            nn.ModuleList(blocks),
            RMSNorm(d),
        )
        self.h = nn.Linear(d, vocab, bias=False)
        if tied:
            self.h.weight = self.e.weight

    def forward(self, x):
        x = self.e(x)
        for block in self.b:
            x = block(x)
        return self.h(self.n(x))


IDS = torch.arange(12).view(2, 6)


def test_a_llama_like_model():
    found = shared(Decoder(Block(Attention(kv=4)), Block(Attention(kv=4))), IDS)
    for i in (0, 1):
        heads = (
            f"b.{i}.a.m0.weight[0] 1x4x4\nb.{i}.a.m1.weight[0]"
            f" 1x4x4\nb.{i}.a.m2.weight[0] 1x4x4\nb.{i}.a.m3.weight[1] 1x4x4"
        )
        assert places(heads) in found
        assert (
            places(
                f"b.{i}.f0.weight[0] 1x24x1\nb.{i}.f1.weight[0]"
                f" 1x24x1\nb.{i}.f2.weight[1] 1x24x1"
            )
            in found
        )
    assert (
        places("e.weight[0] 1x40x1") in found and places("h.weight[0] 1x40x1") in found
    )
    model_dim = [s for s in found if "n.weight[0] 1x16x1" in s]
    assert len(model_dim) == 1
    assert model_dim[0] == places(
        "n.weight[0] 1x16x1\ne.weight[1] 1x16x1\nh.weight[1] 1x16x1\n"
        + "\n".join(
            f"b.{i}.n0.weight[0] 1x16x1\nb.{i}.n1.weight[0]"
            f" 1x16x1\nb.{i}.a.m0.weight[1] 1x16x1\nb.{i}.a.m1.weight[1]"
            f" 1x16x1\nb.{i}.a.m2.weight[1] 1x16x1\nb.{i}.a.m3.weight[0]"
            f" 1x16x1\nb.{i}.f0.weight[1] 1x16x1\nb.{i}.f1.weight[1]"
            f" 1x16x1\nb.{i}.f2.weight[0] 1x16x1"
            for i in (0, 1)
        )
    )


def test_queries_group_under_their_keys_and_values():
    found = shared(Decoder(Block(Attention(heads=4, kv=2))), IDS)
    # 2 groups; each of 2 queries of 4 features
    assert (
        places(
            "b.0.a.m0.weight[0] 1x2x8\nb.0.a.m1.weight[0] 1x2x4\nb.0.a.m2.weight[0]"
            " 1x2x4\nb.0.a.m3.weight[1] 1x2x8"
        )
        in found
    )


def test_one_key_value_head_has_no_head_axis():
    found = shared(Decoder(Block(Attention(heads=4, kv=1))), IDS)
    heads = [s for s in found if "b.0.a.m0.weight[0] 1x4x4" in s]
    assert heads == [places("b.0.a.m0.weight[0] 1x4x4\nb.0.a.m3.weight[1] 1x4x4")]


def test_interleaved_qkv_is_one_axis_of_heads():
    found = shared(Decoder(Block(Attention(fused="heads"))), IDS)
    assert places("b.0.a.m0.weight[0] 1x4x12\nb.0.a.m3.weight[1] 1x4x4") in found


def test_blocks_of_qkv_are_three_pieces():
    found = shared(Decoder(Block(Attention(fused="blocks"))), IDS)
    assert places("b.0.a.m0.weight[0] 3x4x4\nb.0.a.m3.weight[1] 1x4x4") in found


def test_fused_gate_and_up_are_two_pieces():
    found = shared(Decoder(Block(Attention(), fused=True)), IDS)
    assert places("b.0.f0.weight[0] 2x24x1\nb.0.f2.weight[1] 1x24x1") in found


def test_a_tied_embedding_has_its_rows_on_the_vocabulary():
    found = shared(Decoder(Block(Attention()), tied=True), IDS)
    assert places("e.weight[0] 1x40x1") in found


def test_dims_that_no_factors_describe_are_unshardable():
    class Crossing(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Linear(4, 6, bias=False)

        def forward(self, x):
            return self.w(x).view(x.shape[0] * 6 // 4, 4)  # 6 and 4 cross

    graph, axes = axes_of(Crossing(), torch.randn(2, 4))
    assert all(f.unshardable for f in axes.final(graph.params["w.weight"])[0])


def test_the_sizes_of_factors_are_those_of_the_dims():
    graph, axes = axes_of(
        Decoder(Block(Attention()), Block(Attention(fused="heads"), fused=True)), IDS
    )
    for v in graph.values:
        sizes = [
            torch.Size([f.size for f in dim]).numel() if dim else 1
            for dim in axes.final(v)
        ]
        assert tuple(sizes) == v.shape


def test_the_axes_do_not_depend_on_the_run():
    model = Decoder(Block(Attention()), Block(Attention(fused="blocks"), fused=True))
    assert shared(model, IDS) == shared(model, IDS)


def test_a_norm_contracts_the_dim_that_it_takes_a_mean_of():
    graph, axes = axes_of(Decoder(Block(Attention())), IDS)
    model_dim = set(axes.final(graph.params["n.weight"])[0])
    means = [
        n for c in graph.calls for n in c.nodes if n.op._schema.name == "aten::mean"
    ]
    assert means
    for node in means:
        assert axes.effect(node).contract == model_dim and axes.effect(node).mean


def test_what_a_linear_sums_over():
    graph, axes = axes_of(nn.Linear(4, 6), torch.randn(2, 4))
    (node,) = [
        n for c in graph.calls for n in c.nodes if n.op._schema.name == "aten::addmm"
    ]
    effect = axes.effect(node)
    assert effect.contract == set(axes.final(graph.params["weight"])[1])
    assert effect.bias == node.inputs[0].id


def test_an_operator_without_a_rule_needs_everything_whole():
    class Unknown(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.eye(4))

        def forward(self, x):
            return x @ torch.linalg.inv(self.w)

    graph, axes = axes_of(Unknown(), torch.randn(2, 4))
    (node,) = [n for c in graph.calls for n in c.nodes if "inv" in n.op._schema.name]
    v = node.inputs[0]
    assert axes.effect(node).unsharded[v.id] == {
        f for dim in axes.final(v) for f in dim
    }


def test_rows_of_a_table_that_are_a_part_of_its_dim_are_not_looked_up_as_if_they_were_all():
    class TiedHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nn.Embedding(16, 8)

        def forward(self, ids):
            return (
                F.linear(self.e(ids), self.e.weight).view(*ids.shape, 4, 4).softmax(-1)
            )

    graph, axes = axes_of(TiedHead(), torch.arange(16).view(2, 8))
    v = graph.params["e.weight"]
    axis = Axis((axes.final(v)[0][0],))
    assert axis.find(axes, v) == Split(0, 4, (Segment(1, 4),))
    layout = lay_out(graph, axes, Sharding({"e.weight": ShardedParam(0, axis)}, {axis}))
    # a program keeps the axis's size as the number of rows
    assert all(a.split.units == 16 for a in layout.instead.values())


def test_a_parameter_that_lies_otherwise_than_its_axis_is_refused():
    """The bias of a convolution in groups has parts of each group, which no block of it
    is."""
    graph, axes = axes_of(
        nn.Sequential(nn.ConvTranspose2d(12, 24, 2, groups=6)), torch.randn(1, 12, 3, 3)
    )
    weight = axes.final(graph.params["0.weight"])[1]
    axis = Axis(tuple(weight))
    placed = {
        "0.weight": ShardedParam(1, axis),
        "0.bias": ShardedParam(0, axis, blocks=6),
    }
    lay_out(graph, axes, Sharding(placed))
    placed["0.bias"] = ShardedParam(0, axis)
    with pytest.raises(LayoutError, match="0.bias lies otherwise"):
        lay_out(graph, axes, Sharding(placed))
