"""What a rule claims of a sharded operator, computed on both shards and compared with the
whole.

It needs no process group: it records the operators of a small function, and for every
axis of every operator's inputs it does what two ranks would do: shards each input that
carries the axis, runs the operator on each shard, and puts the results together as the
rule says.
"""

import torch
import torch.nn.functional as F
from torch import nn

from quintnet_dt.axes import rules
from quintnet_dt.axes.axes import Axes
from quintnet_dt.axes.sharding import Axis
from quintnet_dt.axes.split import NotSplit
from quintnet_dt.groups import chunk_sizes
from quintnet_dt.tracing.trace import record
from quintnet_dt.utils import replace, tensors

N = 2


class Function(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *args):
        return self.f(*args)


def trace_function(f, inputs):
    """The Graph of f on real tensors."""
    return record(Function(f), tuple(inputs), {})


def wholes(graph, inputs):
    """Yield (node, the whole tensor of each of its inputs and outputs by value id),
    running every operator."""
    env = {}
    for call in graph.calls:
        for node in call.nodes:
            for v in node.inputs:
                if v.id not in env:  # an input, or a constant
                    env[v.id] = inputs[v.id] if v.id < len(inputs) else v.tensor.clone()
            before = {v.id: env[v.id].clone() for v in node.inputs}
            out = run(node, before, node.args, node.kwargs)
            env.update(out)
            yield node, {v.id: env[v.id].clone() for v in node.inputs}, out


def run(node, env, args, kwargs):
    """Value id -> tensor of a node's outputs; `args` and `kwargs` hold Values for
    tensors."""
    used = {v.id: env[v.id].clone() for v in node.inputs}
    changes = {p: used[v.id] for p, v in value_leaves((args, kwargs))}
    args, kwargs = replace((args, kwargs), changes)
    torch.default_generator.manual_seed(0)
    with torch.no_grad():
        # what a shard runs is the function: it may choose another kernel
        if "scaled_dot_product" in str(node.op):
            known = {
                a.name: rules.table.arg(node, a.name) for a in node.op._schema.arguments
            }
            given = changes.get((1, "attn_mask"))
            out = F.scaled_dot_product_attention(
                *args[:3],
                given,
                0.0,
                known["is_causal"],
                scale=known["scale"],
                enable_gqa=args[0].shape[1] != args[1].shape[1],
            )
        else:
            out = node.op(*args, **kwargs)
    found = [t for _, t in tensors(out if isinstance(out, (tuple, list)) else (out,))]
    written = [used[v.id] for v in node.inputs if v.id in node.mutated]
    found += [t for t in written if not any(t is x for x in found)]
    return {v.id: t for v, t in zip(node.outputs, found)}


def value_leaves(obj, path=()):
    if isinstance(obj, (tuple, list)):
        for i, x in enumerate(obj):
            yield from value_leaves(x, (*path, i))
    elif isinstance(obj, dict):
        for k, x in obj.items():
            yield from value_leaves(x, (*path, k))
    elif type(obj).__name__ == "Value":
        yield path, obj


def bounds(units, rank):
    sizes = chunk_sizes(units, N)
    return sum(sizes[:rank]), sizes[rank]


def places(split, rank):
    """Where in the whole dim a rank's elements lie."""
    return torch.cat(
        [torch.arange(a, a + length) for a, length in split.ranges(rank, N)]
    )


def shard(t, split, rank):
    """This rank's part of a tensor that is split so."""
    return t.index_select(split.dim, places(split, rank))


def unshard(parts, split):
    order = torch.cat([places(split, rank) for rank in range(len(parts))])
    return torch.cat(parts, split.dim).index_select(split.dim, order.argsort())


def localised(node, local, out_shapes, at_of):
    """The node's arguments with the sizes of a shard: what `prove` does to a user's
    code."""
    name = node.op._schema.name.removeprefix("aten::")
    args, kwargs = list(node.args), dict(node.kwargs)
    out = out_shapes[0] if out_shapes else ()
    x = node.inputs[0] if node.inputs else None
    if (
        name in ("view", "_unsafe_view", "expand")
        and not isinstance(args[1], torch.dtype)
        or name.startswith("new_")
    ):
        args[1] = list(out)
    elif "split" in name:
        dim = rules.table.arg(node, "dim")
        args[1] = (
            [s[dim] for s in out_shapes]
            if isinstance(args[1], (list, tuple))
            else out[dim]
        )
    elif name == "slice" and at_of.get(x.id):
        dim = rules.table.arg(node, "dim") % len(x.shape)
        whole, part = x.shape[dim], local[x.id].shape[dim]
        # one of every so many begins within a unit
        first = rules.table.arg(node, "start") or 0
        within = 0 < first < rules.table.arg(node, "step")
        for i in (3,) if within else (2, 3):
            if len(args) > i and args[i] is not None and whole != part:
                args[i] = min(max(args[i], -whole), whole) * part // whole
    elif name == "native_group_norm":
        batch, channels = local[x.id].shape[:2]
        args[3:7] = batch, channels, args[5], args[6] * channels // x.shape[1]
    elif name == "convolution":
        part, whole = local[x.id].shape[1], x.shape[1]
        # whole groups: those that are there
        if part < whole and out[1] < node.outputs[0].shape[1]:
            args[8] = args[8] * part // whole
    return tuple(args), kwargs


def axes_of(node, axes):
    """The axes to try: every leaf of an input that two ranks can share, and every
    input's whole dim."""
    found = []
    for v in node.inputs:
        for dim in axes.final(v):
            found += [Axis((f,)) for f in dim if not f.unshardable and f.size % N == 0]
            if dim and Axis(tuple(dim)).size >= N:
                found.append(Axis(tuple(dim)))
    return list(dict.fromkeys(found))


def check(f, inputs):
    """Check every claim that the rules make of f's operators; returns {operator: number
    of claims that held}."""
    graph = trace_function(f, [t.clone() for t in inputs])
    axes = Axes(graph)
    held = {}
    for node, env, outs in wholes(graph, inputs):
        name = node.op._schema.name.removeprefix("aten::")
        held.setdefault(name, 0)
        for axis in axes_of(node, axes):
            held[name] += check_claim(node, axes, axis, env, outs)
    return held


def check_claim(node, axes, axis, env, outs):
    effect, mine = axes.effect(node), set(axis.factors)
    at_of = {v.id: axis.find(axes, v) for v in node.inputs}
    if NotSplit.IN_PART in at_of.values():
        return 0  # a part of the axis, or the axis twice: never sharded
    if any(effect.unsharded.get(i, set()) & mine for i, at in at_of.items() if at):
        return 0
    hit = effect.contract & mine
    out_at = [axis.find(axes, v) for v in node.outputs]
    if hit and effect.mean and axis.size % N:
        return 0  # a mean of means of uneven shards: refused by the layout
    if hit and (hit != mine or any(at is not NotSplit.ABSENT for at in out_at)):
        return 0
    if not hit and (not out_at or not out_at[0]):
        return 0
    results = []
    for rank in range(N):
        local = {i: shard(t, at_of[i], rank) if at_of[i] else t for i, t in env.items()}
        if effect.bias is not None and hit and rank:
            local[effect.bias] = torch.zeros_like(local[effect.bias])
        shapes = [
            tuple(shard(torch.empty(v.shape), at, rank).shape) if at else v.shape
            for v, at in zip(node.outputs, out_at)
        ]
        args, kwargs = localised(node, local, shapes, at_of)
        if hit and effect.lookup:
            table, looked = node.inputs
            # the rows that this rank holds
            mine = shard(torch.arange(table.shape[0]), at_of[table.id], rank)
            same = env[looked.id].unsqueeze(-1) == mine
            there, local[looked.id] = same.any(-1), same.int().argmax(-1)
            results.append(
                {
                    i: t * there.unsqueeze(-1)
                    for i, t in run(node, local, args, kwargs).items()
                }
            )
        else:
            try:
                results.append(run(node, local, args, kwargs))
            except RuntimeError:
                if any(f.unshardable for f in axis.factors):
                    return 0  # dims that have no factors in common: refused when it is shown right
                raise
    claims = 0
    for v, at in zip(node.outputs, out_at):
        if v.id not in outs or "empty" in str(node.op):
            continue
        if hit:
            got = sum(r[v.id] for r in results) / (N if effect.mean else 1)
        elif at:
            got = unshard([r[v.id] for r in results], at)
        else:
            continue
        expected = outs[v.id]
        if not (
            got.shape == expected.shape
            and torch.allclose(got, expected, 1e-9, 1e-11, equal_nan=True)
        ):
            raise AssertionError(
                f"{node.op} claims {axis} of {v.shape}:"
                f" expected\n{expected}\nfound\n{got}"
            )
        claims += 1
    return claims


def factored(f, inputs):
    """f with every even dim of its inputs made by merging two: so that an axis is an
    inner or an outer part of a dim."""
    shapes = [t.shape for t in inputs]

    def merged(*args):
        return f(*(a.reshape(s) for a, s in zip(args, shapes)))

    def split(t):
        return t.reshape(
            [
                x
                for s in t.shape
                for x in ((2, s // 2) if s % 2 == 0 and s > 2 else (s,))
            ]
        )

    return merged, [split(t) for t in inputs]
