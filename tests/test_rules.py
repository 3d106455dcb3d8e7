"""Every axis rule against arithmetic: what a rule claims of a sharded operator is
computed on both shards, and compared with the whole.

The oracle needs no process group. It records the operators of a small function, and for
every axis of every operator's inputs it does what two ranks would do: shards each input
that carries the axis, runs the operator on each shard, and puts the results together as
the rule says.
"""

import pytest
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


# ---------------------------------------------------------------- the oracle


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
        for i in (2, 3):
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
    if any(effect.whole.get(i, set()) & mine for i, at in at_of.items() if at):
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


# ----------------------------------------------------------------- the cases


def r(*shape):
    gen = torch.Generator().manual_seed(sum((i + 1) * s for i, s in enumerate(shape)))
    return torch.randn(*shape, generator=gen, dtype=torch.float64)


def ids(high, *shape):
    gen = torch.Generator().manual_seed(high)
    return torch.randint(high, shape, generator=gen)


def mask(*shape):
    return r(*shape) > 0


a = torch.ops.aten

PRODUCTS = {
    "mm": (torch.mm, r(4, 6), r(6, 8)),
    "mm square": (lambda x: x @ x.t(), r(4, 4)),
    "mm gram": (lambda x: x @ x, r(4, 4)),
    "mv": (torch.mv, r(4, 6), r(6)),
    "dot": (torch.dot, r(6), r(6)),
    "bmm": (torch.bmm, r(2, 4, 6), r(2, 6, 8)),
    "bmm batch 1": (torch.bmm, r(1, 4, 6), r(1, 6, 8)),
    "matmul broadcast": (torch.matmul, r(4, 1, 2, 6), r(2, 6, 8)),
    "linear": (F.linear, r(2, 4, 6), r(8, 6), r(8)),
    "linear no bias": (F.linear, r(2, 4, 6), r(8, 6)),
    "linear one feature": (F.linear, r(2, 4, 6), r(1, 6), r(1)),
    "addmm": (
        lambda b, x, y: torch.addmm(b, x, y, alpha=2, beta=3),
        r(8),
        r(4, 6),
        r(6, 8),
    ),
    "addmm 2d bias": (
        lambda b, x, y: torch.addmm(b, x, y, beta=0.5),
        r(4, 8),
        r(4, 6),
        r(6, 8),
    ),
    "addmm row bias": (torch.addmm, r(1, 8), r(4, 6), r(6, 8)),
    "addmm column bias": (torch.addmm, r(4, 1), r(4, 6), r(6, 8)),
    "addmm one": (torch.addmm, r(1), r(4, 6), r(6, 8)),
    "addmm scalar bias": (torch.addmm, r(1)[0], r(4, 6), r(6, 8)),
    "addmm bias is an input": (lambda x, y: torch.addmm(x, x, y), r(4, 4), r(4, 4)),
    "addmv": (
        lambda b, x, y: torch.addmv(b, x, y, alpha=2, beta=3),
        r(4),
        r(4, 6),
        r(6),
    ),
    "baddbmm": (
        lambda b, x, y: torch.baddbmm(b, x, y, alpha=2, beta=3),
        r(2, 4, 8),
        r(2, 4, 6),
        r(2, 6, 8),
    ),
    "baddbmm row": (torch.baddbmm, r(1, 1, 8), r(2, 4, 6), r(2, 6, 8)),
    "baddbmm 1d": (torch.baddbmm, r(8), r(2, 4, 6), r(2, 6, 8)),
    "embedding": (F.embedding, ids(8, 2, 4), r(8, 6)),
    "embedding 1d": (lambda i, w: F.embedding(i, w, padding_idx=0), ids(8, 4), r(8, 6)),
    "embedding 0d": (F.embedding, ids(8, 1)[0], r(8, 6)),
    "einsum": (
        lambda x, y: torch.einsum("bhqd,bhkd->bhqk", x, y),
        r(2, 4, 3, 6),
        r(2, 4, 5, 6),
    ),
    "grouped_mm": (
        lambda x, w: F.grouped_mm(x, w, offs=torch.tensor([2, 8], dtype=torch.int32)),
        ids(3, 8, 16).bfloat16(),  # small integers: exact
        ids(2, 2, 16, 16).bfloat16(),
    ),
}


def sdpa(**kw):
    return lambda q, k, v, *m: F.scaled_dot_product_attention(q, k, v, *m, **kw)


def q(h=4, n=4, d=8, b=2):
    return r(b, h, n, d)


PRODUCTS |= {
    "sdpa": (sdpa(), q(), q(n=6) * 0.9, q(n=6)),
    "sdpa causal": (sdpa(is_causal=True), q(), q() * 0.9, q() * 0.8),
    "sdpa scale": (sdpa(scale=0.3), q(), q() * 0.9, q() * 0.8),
    "sdpa gqa": (sdpa(enable_gqa=True), q(4), q(2), q(2) * 0.8),
    **{
        f"sdpa mask {s}": (sdpa(), q(), q(n=6) * 0.9, q(n=6), r(*s))
        for s in [
            (2, 4, 4, 6),
            (1, 1, 4, 6),
            (2, 1, 4, 6),
            (2, 1, 1, 6),
            (1, 4, 4, 6),
            (4, 6),
            (4, 1, 6),
            (1, 6),
        ]
    },
    "sdpa bool mask": (
        sdpa(),
        q(),
        q(n=6) * 0.9,
        q(n=6),
        mask(2, 1, 4, 6) | torch.eye(4, 6, dtype=torch.bool),
    ),
    "sdpa 3d": (sdpa(), r(4, 6, 8), r(4, 6, 8), r(4, 6, 8)),
    "sdpa math": (
        lambda q, k, v: a._scaled_dot_product_attention_math(q, k, v),
        q(),
        q() * 0.9,
        q(),
    ),
    "conv1d": (
        lambda x, w, b: F.conv1d(x, w, b, padding=1),
        r(2, 4, 8),
        r(6, 4, 3),
        r(6),
    ),
    "conv2d": (
        lambda x, w, b: F.conv2d(x, w, b, stride=2),
        r(2, 4, 8, 6),
        r(6, 4, 2, 2),
        r(6),
    ),
    "conv2d no bias": (
        lambda x, w: F.conv2d(x, w, dilation=2),
        r(2, 4, 8, 6),
        r(6, 4, 2, 2),
    ),
    "conv2d unbatched": (
        lambda x, w, b: F.conv2d(x, w, b),
        r(4, 8, 6),
        r(6, 4, 2, 2),
        r(6),
    ),
    "conv2d groups": (
        lambda x, w, b: F.conv2d(x, w, b, groups=2),
        r(2, 4, 8, 6),
        r(6, 2, 2, 2),
        r(6),
    ),
    "conv2d depthwise": (
        lambda x, w, b: F.conv2d(x, w, b, groups=4),
        r(2, 4, 8, 6),
        r(8, 1, 2, 2),
        r(8),
    ),
    "conv2d depthwise 1": (
        lambda x, w: F.conv2d(x, w, groups=4),
        r(2, 4, 8, 6),
        r(4, 1, 2, 2),
    ),
    "conv2d one in": (
        lambda x, w, b: F.conv2d(x, w, b),
        r(2, 1, 8, 6),
        r(4, 1, 2, 2),
        r(4),
    ),
    "conv2d 1x1": (
        lambda x, w, b: F.conv2d(x, w, b),
        r(4, 4, 4, 4),
        r(4, 4, 1, 1),
        r(4),
    ),
    "conv3d": (
        lambda x, w, b: F.conv3d(x, w, b),
        r(2, 4, 4, 4, 4),
        r(6, 4, 2, 2, 2),
        r(6),
    ),
    "convt1d": (
        lambda x, w, b: F.conv_transpose1d(x, w, b, stride=2),
        r(2, 4, 8),
        r(4, 6, 3),
        r(6),
    ),
    "convt2d": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2),
        r(2, 4, 8, 6),
        r(4, 6, 2, 2),
        r(6),
    ),
    "convt2d groups": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, groups=2),
        r(2, 4, 8, 6),
        r(4, 3, 2, 2),
        r(6),
    ),
    "convt2d depthwise": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, groups=4),
        r(2, 4, 8, 6),
        r(4, 1, 2, 2),
        r(4),
    ),
    "convt3d": (
        lambda x, w, b: F.conv_transpose3d(x, w, b),
        r(2, 4, 4, 4, 4),
        r(4, 6, 2, 2, 2),
        r(6),
    ),
    "tril": (lambda x: torch.tril(x, 1), r(2, 4, 6)),
    "triu": (lambda x: torch.triu(x), r(2, 4, 6)),
    "complex": (
        lambda x: torch.view_as_real(torch.view_as_complex(x) * 2j),
        r(2, 4, 2),
    ),
    "complex rotary": (
        lambda x, f: torch.view_as_real(
            torch.view_as_complex(x.reshape(2, 4, 4, 2)) * torch.view_as_complex(f)
        ),
        r(2, 4, 8),
        r(4, 4, 2),
    ),
}

VIEWS = {
    "view split": (lambda x: x.view(2, 4, 4, 3), r(2, 4, 12)),
    "view merge": (lambda x: x.view(2, 48), r(2, 4, 12)),
    "view ones": (lambda x: x.view(1, 2, 1, 4, 12, 1).view(8, 1, 12), r(2, 4, 12)),
    "view to one": (lambda x: x.view(1, 1), r(1)),
    "view crossing": (lambda x: x.view(4, 6), r(6, 4)),
    "view crossing in part": (lambda x: x.view(2, 4, 6), r(2, 6, 4)),
    "view resplit": (
        lambda x: x.view(2, 3, 4, 4).view(2, 12, 4).view(2, 4, 12),
        r(2, 48),
    ),
    "view 0d": (lambda x: x.view(1, 1), r(1)[0]),
    "view empty": (lambda x: x[:0].view(0, 6), r(4, 2, 3)),
    "view dtype": (lambda x: x.view(torch.int32), r(4, 6)),
    "view dtype same size": (lambda x: x.view(torch.int64), r(4, 6)),
    "unsafe_view": (lambda x: a._unsafe_view(x, [4, 12]), r(2, 2, 12)),
    "reshape copy": (lambda x: x.transpose(0, 1).reshape(4, 24), r(2, 4, 12)),
    "flatten": (lambda x: x.flatten(1).unflatten(1, (4, 12)), r(2, 4, 12)),
    "t": (lambda x: x.t(), r(4, 6)),
    "t 1d": (lambda x: a.t(x), r(4)),
    "transpose": (lambda x: x.transpose(-1, 0), r(2, 4, 6)),
    "transpose 0d": (lambda x: x.transpose(0, -1), r(1)[0]),
    "transpose_": (lambda x: x.clone().transpose_(-1, 0), r(2, 4, 6)),
    "permute": (lambda x: x.permute(-1, 0, 1), r(2, 4, 6)),
    "unsqueeze": (lambda x: x.unsqueeze(-1).unsqueeze(0).unsqueeze(-2), r(2, 4)),
    "unsqueeze_": (lambda x: x.clone().unsqueeze_(-1), r(2, 4)),
    "squeeze": (lambda x: x.squeeze(), r(1, 4, 1, 6)),
    "squeeze one": (lambda x: x.squeeze(0), r(1, 4, 1, 6)),
    "squeeze none": (lambda x: x.squeeze(1), r(1, 4, 1, 6)),
    "squeeze several": (lambda x: x.squeeze((0, -2, 1)), r(1, 4, 1, 6)),
    "squeeze no dims": (lambda x: x.squeeze(()), r(1, 4, 1, 6)),
    "squeeze_": (lambda x: x.clone().squeeze_(0), r(1, 4, 6)),
    "squeeze_ all": (lambda x: x.clone().squeeze_(), r(1, 4, 6)),
    "expand": (lambda x: x.expand(2, 4, 6), r(4, 1)),
    "expand -1": (lambda x: x.expand(3, -1, 6, -1), r(4, 1, 2)),
    "expand same": (lambda x: x.expand(4, 6), r(4, 6)),
    "expand 0d": (lambda x: x.expand(4, 6), r(1)[0]),
    "repeat_kv": (
        lambda x: x[:, :, None].expand(2, 2, 3, 4, 6).reshape(2, 6, 4, 6),
        r(2, 2, 4, 6),
    ),
    "repeat": (lambda x: x.repeat(1, 2, 1), r(2, 4, 6)),
    "repeat more dims": (lambda x: x.repeat(2, 1, 3), r(4, 6)),
    "repeat ones": (lambda x: x.repeat(1, 1), r(4, 6)),
    "repeat a one": (lambda x: x.repeat(4, 1), r(1, 6)),
    "repeat none": (lambda x: x.repeat(0, 1), r(4, 6)),
    "slice equal": (lambda x: (x[:, :6], x[:, 6:]), r(4, 12)),
    "slice last part": (lambda x: x[:, 8:], r(4, 12)),
    "slice thirds": (lambda x: (x[:, :4], x[:, 4:8], x[..., 8:12]), r(4, 12)),
    "slice unequal": (lambda x: (x[:, :8], x[:, 8:], x[1:3]), r(4, 12)),
    "slice off": (lambda x: (x[:, 3:9], x[:, 2:8]), r(4, 12)),
    "slice negative": (lambda x: (x[:, -6:], x[:, -12:-6], x[:, :-4]), r(4, 12)),
    "slice far": (lambda x: (x[:, -99:6], x[:, 6:99], x[:, -99:99]), r(4, 12)),
    "slice step": (lambda x: (x[:, ::2], x[:, 1::2], x[::3]), r(4, 12)),
    "slice empty": (lambda x: x[:, 6:6], r(4, 12)),
    "slice whole step": (lambda x: a.slice(x, 0, 0, 1, 2), r(1, 12)),
    "rotate_half": (lambda x: torch.cat((-x[..., 4:], x[..., :4]), -1), r(2, 4, 8)),
    "narrow": (lambda x: x.narrow(1, 6, 6), r(4, 12)),
    "split": (lambda x: x.split(4, 1), r(4, 12)),
    "split rest": (lambda x: x.split(5, 1), r(4, 12)),
    "split one": (lambda x: x.split(12, -1), r(4, 12)),
    "split_with_sizes": (lambda x: x.split([4, 4, 4], -1), r(4, 12)),
    "split_with_sizes unequal": (lambda x: x.split([8, 2, 2], -1), r(4, 12)),
    "chunk": (lambda x: x.chunk(2, -1), r(4, 12)),
    "chunk rest": (lambda x: x.chunk(5, -1), r(4, 12)),
    "tensor_split": (lambda x: x.tensor_split(3, -1), r(4, 12)),
    "unsafe_split": (lambda x: a.unsafe_split(x, 6, 1), r(4, 12)),
    "unsafe_split_with_sizes": (
        lambda x: a.unsafe_split_with_sizes(x, [6, 6], 1),
        r(4, 12),
    ),
    "split heads": (lambda x: x.view(2, 4, 6, 4).split([2, 2, 2], 2), r(2, 96)),
    "chunk interleaved": (lambda x: x.view(2, 4, 12).chunk(3, -1), r(2, 48)),
    "select": (lambda x: (x[:, 0], x[-1], x.select(1, -2)), r(4, 12)),
    "unbind": (lambda x: x.unbind(1), r(4, 2, 6)),
    "unbind last": (lambda x: x.unbind(-1), r(4, 6, 2)),
    "qkv unbind": (
        lambda x: x.view(2, 4, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0),
        r(2, 4, 24),
    ),
    "cat": (lambda x, y: torch.cat([x, y], -1), r(4, 6), r(4, 2)),
    "cat rows": (lambda x, y: torch.cat([x, y]), r(4, 6), r(2, 6)),
    "cat itself": (lambda x: torch.cat([x, x], 1), r(4, 6)),
    "cat legacy empty": (lambda x, y: torch.cat([y, x, y], 1), r(4, 6), r(0)),
    "cat empty": (lambda x, y: torch.cat([x, y], 1), r(4, 6), r(4, 0)),
    "cat one": (lambda x: torch.cat([x], 1), r(4, 6)),
    "cat transposed": (lambda x: torch.cat([x, x.t()], 1), r(4, 4)),
    "stack": (lambda x, y: torch.stack([x, y], 1), r(4, 6), r(4, 6)),
    "stack last": (lambda x, y: torch.stack([x, y], -1), r(4, 6), r(4, 6)),
    "stack one": (lambda x: torch.stack([x], 0), r(4, 6)),
    "stack transposed": (lambda x: torch.stack([x, x.t()], -1), r(4, 4)),
    "rotary interleaved": (
        lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2),
        r(2, 4, 8),
    ),
}

I24 = ids(4, 2, 4)
INDEXING = {
    "index first": (lambda x, i: x[i], r(4, 6), ids(4, 2)),
    "index second": (lambda x, i: x[:, i], r(4, 6, 2), ids(6, 4)),
    "index 2d": (lambda x, i: x[:, i], r(4, 6, 2), ids(6, 2, 4)),
    "index 0d": (lambda x, i: a.index(x, [i]), r(4, 6), ids(4, 1)[0]),
    "index 0d and 1d": (
        lambda x, i, j: a.index(x, [i, j]),
        r(4, 6, 2),
        ids(4, 1)[0],
        ids(6, 4),
    ),
    "index adjacent": (lambda x, i, j: x[:, i, j], r(2, 4, 6, 8), ids(4, 2), ids(6, 2)),
    "index apart": (lambda x, i, j: x[i, :, j], r(4, 2, 6, 8), ids(4, 2), ids(6, 2)),
    "index apart, inner": (
        lambda x, i, j: a.index(x, [None, i, None, j]),
        r(8, 4, 2, 6),
        ids(4, 2),
        ids(6, 2),
    ),
    "index broadcast": (
        lambda x, i, j: x[i, j],
        r(4, 6, 8),
        ids(4, 2, 1),
        ids(6, 1, 4),
    ),
    "index broadcast ranks": (
        lambda x, i, j: x[:, i, j],
        r(8, 4, 6),
        ids(4, 4),
        ids(6, 2, 4),
    ),
    "index same": (lambda x, i: x[i, i], r(4, 4, 6), ids(4, 2)),
    "index apart same size": (
        lambda x, i, j: x[i, :, j],
        r(4, 4, 4),
        ids(4, 4),
        ids(4, 4),
    ),
    "index arange": (lambda x, i: x[torch.arange(4), i], r(4, 6, 2), ids(6, 4)),
    "index bool": (lambda x, m: x[m], r(4, 6), mask(4)),
    "index_select": (lambda x, i: x.index_select(1, i), r(4, 6, 2), ids(6, 4)),
    "index_select 0d": (lambda x, i: a.index_select(x, 0, i), r(4, 6), ids(4, 1)[0]),
    "gather": (lambda x, i: x.gather(1, i), r(4, 6, 2), ids(6, 4, 3, 2)),
    "gather last": (lambda x, i: x.gather(-1, i), r(2, 4, 6), ids(6, 2, 4, 6)),
    "gather smaller": (lambda x, i: x.gather(1, i), r(4, 6, 2), ids(6, 2, 4, 2)),
    "gather one row": (lambda x, i: x.gather(1, i), r(4, 6, 2), ids(6, 1, 4, 2)),
    "gather 1d": (lambda x, i: x.gather(0, i), r(4), ids(4, 2)),
    "scatter": (lambda x, i, y: x.scatter(1, i, y), r(4, 6), ids(6, 4, 1), r(4, 1)),
    "scatter value": (lambda x, i: x.scatter(1, i, 2.0), r(4, 6), ids(6, 4, 1)),
    "scatter smaller": (
        lambda x, i, y: x.scatter(1, i, y),
        r(4, 6),
        ids(6, 2, 1),
        r(4, 6),
    ),
    "scatter larger source": (
        lambda x, i, y: x.scatter(0, i, y),
        r(4, 6),
        ids(4, 1, 6),
        r(4, 8),
    ),
    "scatter_": (
        lambda x, i, y: x.clone().scatter_(1, i, y),
        r(4, 6),
        ids(6, 4, 1),
        r(4, 1),
    ),
    "scatter_add": (
        lambda x, i, y: x.scatter_add(0, i, y),
        r(4, 6),
        ids(4, 2, 6),
        r(2, 6),
    ),
    "scatter_add_": (
        lambda x, i, y: x.clone().scatter_add_(0, i, y),
        r(4, 6),
        ids(4, 2, 6),
        r(2, 6),
    ),
    "scatter_reduce": (
        lambda x, i, y: x.scatter_reduce(0, i, y, "mean"),
        r(4, 6),
        ids(4, 2, 6),
        r(2, 6),
    ),
    "scatter_reduce_": (
        lambda x, i, y: x.clone().scatter_reduce_(0, i, y, "amax"),
        r(4, 6),
        ids(4, 2, 6),
        r(2, 6),
    ),
    "index_add": (lambda x, i, y: x.index_add(0, i, y), r(4, 6), ids(4, 2), r(2, 6)),
    "index_add_": (
        lambda x, i, y: x.clone().index_add_(1, i, y),
        r(4, 6),
        ids(6, 2),
        r(4, 2),
    ),
    "index_add 1d": (lambda x, i, y: x.index_add(0, i, y), r(4), ids(4, 4), r(4)),
    "index_add same": (
        lambda x, i, y: x.index_add(0, i, y),
        r(4, 4),
        ids(4, 4),
        r(4, 4),
    ),
    "index_put": (lambda x, i, y: x.index_put((i,), y), r(4, 6), ids(4, 2), r(2, 6)),
    "index_copy": (
        lambda x, i, y: x.index_copy(0, i, y),
        r(4, 6),
        torch.tensor([2, 0]),
        r(2, 6),
    ),
    "index_fill": (lambda x, i: x.index_fill(0, i, 1.0), r(4, 6), ids(4, 2)),
    "masked_scatter": (
        lambda x, m, y: x.masked_scatter(m, y),
        r(4, 6),
        mask(4, 6),
        r(4, 6),
    ),
    "take_along_dim": (lambda x, i: x.take_along_dim(i, 1), r(4, 6), ids(6, 4, 2)),
}

REDUCTIONS = {}
for name in (
    "sum mean amax amin var std argmax argmin any all prod logsumexp max min median"
    " norm nansum nanmedian count_nonzero aminmax var_mean std_mean mode"
).split():
    for dim in ((), (0,), (1,), (-1,)):
        for keep in (False, True):
            if (
                (dim == () and (keep or name in ("logsumexp", "mode", "aminmax")))
                or name == "count_nonzero"
                and keep
            ):
                continue
            kw = {"dim": dim[0]} if dim else {}
            kw |= {"keepdim": True} if keep else {}
            REDUCTIONS[f"{name} {dim} {keep}"] = (
                lambda x, n=name, kw=kw: getattr(torch, n)(x, **kw),
                r(4, 6, 2),
            )
for name in (
    "sum",
    "mean",
    "amax",
    "var",
    "logsumexp",
    "nansum",
    "any",
    "var_mean",
    "std_mean",
):
    for dim in ((0, 2), (1, -1), (0, 1, 2)):
        for keep in (False, True):
            REDUCTIONS[f"{name} {dim} {keep}"] = (
                lambda x, n=name, d=dim, k=keep: getattr(torch, n)(x, dim=d, keepdim=k),
                r(4, 6, 2),
            )
REDUCTIONS |= {
    "sum of ones": (lambda x: x.sum(1), r(4, 1, 6)),
    "sum keep ones": (lambda x: x.sum(0, keepdim=True), r(4, 1, 6)),
    "sum 1d": (lambda x: x.sum(0), r(4)),
    "sum 0d": (lambda x: x.sum(0), r(1)[0]),
    "sum dtype": (lambda x: x.sum(-1, dtype=torch.float64), r(4, 6).round().long()),
    "mean of ones": (lambda x: x.mean(1), r(4, 1, 6)),
    "std correction": (lambda x: torch.std(x, dim=1, correction=0), r(4, 6)),
    "var unbiased": (lambda x: torch.var(x, 1, True), r(4, 6)),
    "vector_norm": (lambda x: torch.linalg.vector_norm(x, 3, dim=-1), r(4, 6)),
    "vector_norm all": (lambda x: torch.linalg.vector_norm(x), r(4, 6)),
    "max of two": (torch.max, r(4, 6), r(4, 6) * 0.5),
    "max of two broadcast": (torch.max, r(4, 6), r(6)),
    "normalize": (lambda x: F.normalize(x, dim=-1), r(4, 6)),
    "mse": (F.mse_loss, r(4, 6), r(4, 6) * 2),
    "mse none": (lambda x, y: F.mse_loss(x, y, reduction="none"), r(4, 6), r(4, 6) * 2),
    "smooth l1": (F.smooth_l1_loss, r(4, 6), r(4, 6) * 2),
    "huber": (F.huber_loss, r(4, 6), r(4, 6) * 2),
    "l1": (F.l1_loss, r(4, 6), r(4, 6) * 2),
    "bce": (F.binary_cross_entropy_with_logits, r(4, 6), r(4, 6).sigmoid()),
    "kl": (F.kl_div, r(4, 6), r(4, 6).sigmoid()),
    "nll": (F.nll_loss, r(4, 6), ids(6, 4)),
    "cross entropy": (F.cross_entropy, r(4, 6), ids(6, 4)),
    "cosine": (F.cosine_similarity, r(4, 6), r(4, 6) * 2 + 1),
    "cdist": (torch.cdist, r(2, 4, 6), r(2, 3, 6)),
}
for (
    name
) in (
    "softmax log_softmax cumsum cumprod logcumsumexp cummax cummin sort argsort".split()
):
    for dim in (0, 1, -1):
        REDUCTIONS[f"{name} {dim}"] = (
            lambda x, n=name, d=dim: getattr(torch, n)(x, d),
            r(4, 6, 2),
        )
REDUCTIONS |= {
    "softmax ones": (lambda x: x.softmax(1), r(4, 1, 6)),
    "safe softmax": (lambda x: a._safe_softmax(x, -1), r(4, 6)),
    "sort stable": (lambda x: torch.sort(x, dim=1, stable=True), r(4, 6)),
    "topk": (lambda x: x.topk(2, 1), r(4, 6, 2)),
    "topk all": (lambda x: x.topk(6), r(4, 6)),
    "topk one": (lambda x: x.topk(1, 0), r(4, 6)),
    "kthvalue": (lambda x: x.kthvalue(2, 1), r(4, 6)),
    "flip": (lambda x: x.flip(1), r(4, 6)),
    "flip two": (lambda x: x.flip((0, -1)), r(4, 6, 2)),
    "flip none": (lambda x: x.flip(()), r(4, 6)),
    "roll": (lambda x: x.roll(1, 1), r(4, 6)),
    "roll two": (lambda x: x.roll((1, -2), (0, 1)), r(4, 6, 2)),
    "roll flat": (lambda x: x.roll(1), r(4, 6)),
    "diff": (lambda x: x.diff(dim=1), r(4, 6)),
    "rot90": (lambda x: x.rot90(), r(4, 4)),
    "trace": (torch.trace, r(4, 4)),
    "diagonal": (lambda x: x.diagonal(), r(4, 4)),
    "equal": (lambda x, y: x * float(torch.equal(x, y)), r(4, 6), r(4, 6)),
}

bn = dict(training=True)
NORMS = {
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (6,), w, b), r(2, 4, 6), r(6), r(6)),
    "layer_norm plain": (lambda x: F.layer_norm(x, (4, 6)), r(2, 4, 6)),
    "layer_norm all": (lambda x: F.layer_norm(x, (4, 6)), r(4, 6)),
    "layer_norm square": (
        lambda x, w, b: F.layer_norm(x, (6,), w, b),
        r(6, 6),
        r(6),
        r(6),
    ),
    "rms_norm": (lambda x, w: F.rms_norm(x, (6,), w), r(2, 4, 6), r(6)),
    "rms_norm plain": (lambda x: F.rms_norm(x, (4, 6)), r(2, 4, 6)),
    "fused rms_norm": (
        lambda x, w: a._fused_rms_norm(x, [6], w, 1e-5),
        r(2, 4, 6),
        r(6),
    ),
    "rms_norm by hand": (
        lambda x, w: w * (x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()),
        r(2, 4, 6),
        r(6),
    ),
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b), r(2, 4, 6), r(4), r(4)),
    "group_norm 2d": (lambda x: F.group_norm(x, 4), r(4, 4, 4, 2)),
    "group_norm flat": (lambda x, w, b: F.group_norm(x, 2, w, b), r(4, 4), r(4), r(4)),
    "batch_norm": (
        lambda x, m, v, w, b: F.batch_norm(x, m, v, w, b, **bn),
        r(4, 6, 4),
        r(6),
        r(6) ** 2,
        r(6),
        r(6),
    ),
    "batch_norm 2d input": (
        lambda x, m, v: F.batch_norm(x, m, v, **bn),
        r(4, 6),
        r(6),
        r(6) ** 2,
    ),
    "batch_norm square": (
        lambda x, m, v, w, b: F.batch_norm(x, m, v, w, b, **bn),
        r(4, 4),
        *[r(4) ** 2] * 4,
    ),
    "batch_norm no stats": (
        lambda x: F.batch_norm(x, None, None, training=True),
        r(4, 6, 4),
    ),
    "batch_norm eval": (
        lambda x, m, v, w, b: F.batch_norm(x, m, v, w, b),
        r(4, 6, 4),
        r(6),
        r(6) ** 2,
        r(6),
        r(6),
    ),
    "batch_norm legit": (
        lambda x, w, b, m, v: a._native_batch_norm_legit(
            x, w, b, m.clone(), v.clone(), True, 0.1, 1e-5
        ),
        r(4, 6, 2),
        *[r(6) ** 2] * 4,
    ),
    "batch_norm legit no stats": (
        lambda x, w, b: a._native_batch_norm_legit.no_stats(x, w, b, True, 0.1, 1e-5),
        r(4, 6, 2),
        *[r(6) ** 2] * 2,
    ),
    "batch_norm legit functional": (
        lambda x, w, b, m, v: a._native_batch_norm_legit_functional(
            x, w, b, m, v, True, 0.1, 1e-5
        ),
        r(4, 6, 2),
        *[r(6) ** 2] * 4,
    ),
    "batch_norm legit eval": (
        lambda x, w, b, m, v: a._native_batch_norm_legit_no_training(
            x, w, b, m, v, 0.1, 1e-5
        ),
        r(4, 6, 2),
        *[r(6) ** 2] * 4,
    ),
    "batch_norm update": (
        lambda x, w, b, m, v: a._batch_norm_with_update(
            x, w, b, m.clone(), v.clone(), 0.1, 1e-5
        ),
        r(4, 6, 2),
        *[r(6) ** 2] * 4,
    ),
    "instance_norm": (
        lambda x, w, b: F.instance_norm(x, None, None, w, b),
        r(2, 4, 6),
        r(4),
        r(4),
    ),
    "local_response_norm": (lambda x: F.local_response_norm(x, 2), r(2, 4, 6)),
}

X4, X3, X5 = r(2, 4, 8, 6), r(2, 4, 8), r(2, 4, 4, 4, 4)
SPATIAL = {
    "max_pool1d": (lambda x: F.max_pool1d(x, 2), X3),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), X4),
    "max_pool2d unbatched": (lambda x: F.max_pool2d(x, 2), r(4, 8, 6)),
    "max_pool2d indices": (lambda x: F.max_pool2d(x, 2, return_indices=True), X4),
    "max_pool2d same size": (lambda x: F.max_pool2d(x, 3, 1, 1), r(4, 4, 4, 4)),
    "max_pool3d": (lambda x: F.max_pool3d(x, 2, return_indices=True), X5),
    "avg_pool1d": (lambda x: F.avg_pool1d(x, 2), X3),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), X4),
    "avg_pool2d unbatched": (lambda x: F.avg_pool2d(x, 2), r(4, 8, 6)),
    "avg_pool3d": (lambda x: F.avg_pool3d(x, 2), X5),
    "adaptive_avg_pool1d": (lambda x: F.adaptive_avg_pool1d(x, 3), X3),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (3, 2)), X4),
    "adaptive_avg_pool2d one": (lambda x: F.adaptive_avg_pool2d(x, 1), X4),
    "adaptive_avg_pool3d": (lambda x: F.adaptive_avg_pool3d(x, 3), X5),
    "adaptive_max_pool1d": (lambda x: F.adaptive_max_pool1d(x, 3), X3),
    "adaptive_max_pool2d": (
        lambda x: F.adaptive_max_pool2d(x, 3, return_indices=True),
        X4,
    ),
    "adaptive_max_pool3d": (lambda x: F.adaptive_max_pool3d(x, 3), X5),
    "upsample_nearest1d": (lambda x: F.interpolate(x, scale_factor=2), X3),
    "upsample_nearest2d": (lambda x: F.interpolate(x, size=(8, 6)), X4),
    "upsample_nearest2d scale": (lambda x: F.interpolate(x, scale_factor=2), X4),
    "upsample_nearest3d": (lambda x: F.interpolate(x, scale_factor=2), X5),
    "upsample_linear1d": (
        lambda x: F.interpolate(x, scale_factor=2, mode="linear"),
        X3,
    ),
    "upsample_bilinear2d": (
        lambda x: F.interpolate(x, size=(4, 4), mode="bilinear"),
        X4,
    ),
    "upsample_bicubic2d": (
        lambda x: F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=True),
        X4,
    ),
    "upsample_trilinear3d": (
        lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"),
        X5,
    ),
    "pad": (lambda x: F.pad(x, (1, 2)), X4),
    "pad channels": (lambda x: F.pad(x, (0, 0, 1, 1, 0, 2)), X4),
    "pad crop": (lambda x: F.pad(x, (-1, 0, -2, 1), value=3.0), X4),
    "pad shift": (lambda x: F.pad(x, (-1, 1)), X4),
    "pad none": (lambda x: F.pad(x, (0, 0)), X4),
    "reflection_pad1d": (lambda x: F.pad(x, (1, 2), mode="reflect"), X3),
    "reflection_pad1d unbatched": (lambda x: F.pad(x, (1, 2), mode="reflect"), r(4, 6)),
    "reflection_pad2d": (lambda x: F.pad(x, (1, 2, 1, 1), mode="reflect"), X4),
    "replication_pad1d": (lambda x: F.pad(x, (1, 2), mode="replicate"), X3),
    "replication_pad2d": (lambda x: F.pad(x, (1, 2, 1, 1), mode="replicate"), X4),
    "replication_pad3d": (lambda x: F.pad(x, (1, 2, 1, 1, 0, 1), mode="replicate"), X5),
    "circular pad": (lambda x: F.pad(x, (1, 2), mode="circular"), X3),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), r(2, 8, 4, 4)),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), r(2, 4, 4, 4)),
    "channel_shuffle": (lambda x: torch.channel_shuffle(x, 2), r(2, 4, 4, 4)),
    "unfold": (lambda x: F.unfold(x, 2), X4),
    "fold": (lambda x: F.fold(x, (4, 4), 2, stride=2), r(2, 16, 4)),
    "tensor unfold": (lambda x: x.unfold(1, 2, 2), r(4, 6)),
    "grid_sample": (
        lambda x, g: F.grid_sample(x, g.tanh(), align_corners=False),
        X4,
        r(2, 4, 4, 2),
    ),
    "lp_pool": (lambda x: F.lp_pool2d(x.abs(), 2, 2), X4),
}

POINTWISE = {
    "add": (lambda x, y: x + y, r(4, 6), r(4, 6)),
    "add broadcast": (lambda x, y: x + y, r(4, 1), r(1, 6)),
    "add rank": (lambda x, y: x + y, r(2, 4, 6), r(6)),
    "add left rank": (lambda x, y: x + y, r(6), r(2, 4, 6)),
    "add scalar": (lambda x: x + 2, r(4, 6)),
    "add 0d": (lambda x, y: torch.add(x, y, alpha=3), r(4, 6), r(1)[0]),
    "add itself transposed": (lambda x: x + x.t(), r(4, 4)),
    "outer difference": (lambda x: x[:, None] - x[None, :], r(4)),
    "add factored": (
        lambda x, y: x.view(4, 3, 2).reshape(4, 6) + y.view(4, 2, 3).reshape(4, 6),
        r(4, 6),
        r(24),
    ),
    "mul": (lambda x, y: x * y, r(4, 6), r(4, 1)),
    "where": (torch.where, mask(4, 1), r(6), r(4, 6)),
    "where scalar": (lambda m, x: torch.where(m, x, 0.0), mask(4, 6), r(4, 6)),
    "masked_fill": (lambda x, m: x.masked_fill(m, -9.0), r(2, 4, 6), mask(4, 6)),
    "masked_fill broadcasts self": (
        lambda x, m: x.masked_fill(m, -9.0),
        r(6),
        mask(4, 6),
    ),
    "masked_fill 0d": (
        lambda x, m, y: x.masked_fill(m, y),
        r(4, 6),
        mask(4, 6),
        r(1)[0],
    ),
    "masked_fill_": (
        lambda x, m: x.clone().masked_fill_(m, -9.0),
        r(2, 4, 6),
        mask(4, 6),
    ),
    "add_": (lambda x, y: x.clone().add_(y), r(4, 6), r(6)),
    "mul_ 0d": (lambda x, y: x.clone().mul_(y), r(4, 6), r(1)[0]),
    "add_ view": (lambda x, y: x.clone().view(2, 2, 6).add_(y), r(4, 6), r(2, 6)),
    "copy_": (lambda x, y: x.clone().copy_(y), r(2, 4, 6), r(4, 1)),
    "copy_ square": (lambda x, y: x.clone().copy_(y), r(4, 4), r(4, 1)),
    "zero_": (lambda x: x.clone().zero_(), r(4, 6)),
    "fill_": (lambda x: x.clone().fill_(2.0), r(4, 6)),
    "fill_ tensor": (lambda x, y: x.clone().fill_(y), r(4, 6), r(1)[0]),
    "setitem": (
        lambda x, y: x.clone().__setitem__((slice(None), slice(0, 3)), y),
        r(4, 6),
        r(4, 3),
    ),
    "to": (lambda x: x.to(torch.float32).double(), r(4, 6)),
    "clone": (lambda x: x.clone().contiguous(), r(4, 6)),
    "detach": (lambda x: x.detach(), r(4, 6)),
    "alias": (lambda x: a.alias(x), r(4, 6)),
    "lift": (lambda x: a.lift_fresh(x), r(4, 6)),
    "likes": (
        lambda x: (torch.zeros_like(x), torch.ones_like(x), torch.full_like(x, 3.0)),
        r(4, 6),
    ),
    "new_zeros": (lambda x: x.new_zeros(4, 6) + x, r(4, 6)),
    "lerp": (torch.lerp, r(4, 6), r(4, 6) * 2, r(6)),
    "addcmul": (torch.addcmul, r(4, 6), r(4, 1), r(6)),
    "clamp": (lambda x, y: x.clamp(min=y), r(4, 6), r(6)),
    "frexp": (torch.frexp, r(4, 6)),
    "prelu": (F.prelu, r(2, 4, 6), r(4)),
    "prelu one": (F.prelu, r(2, 4, 6), r(1)),
    "glu": (lambda x: F.glu(x, -1), r(4, 8)),
    "glu first": (lambda x: F.glu(x, 1), r(4, 8, 2)),
    "swiglu": (lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], r(4, 8)),
    "logsigmoid": (F.logsigmoid, r(4, 6)),
    "dropout eval": (lambda x: F.dropout(x, 0.5, False), r(4, 6)),
    "maximum": (torch.maximum, r(4, 6), r(6)),
    "complex": (lambda x, y: torch.complex(x, y), r(4, 6), r(4, 6) * 2),
    "polar": (lambda x, y: torch.polar(x, y), r(4, 6), r(4, 6) * 2),
    "real": (lambda x: torch.complex(x, x).real, r(4, 6)),
    "isin": (lambda x: torch.isin(x, torch.tensor([1, 2])), ids(4, 4, 6)),
    "bucketize": (lambda x, y: torch.bucketize(x, y), r(4, 6), r(4).sort()[0]),
    "nan_to_num": (torch.nan_to_num, r(4, 6)),
}
for name in (
    "relu gelu silu mish tanh sigmoid hardtanh hardswish hardsigmoid leaky_relu elu"
    " selu celu softplus softsign relu6 logsigmoid tanhshrink softshrink hardshrink"
    " threshold rrelu"
).split():
    kw = {"threshold": (0.1, 3.0)}.get(name, ())
    POINTWISE[name] = (lambda x, n=name, kw=kw: getattr(F, n)(x, *kw), r(4, 6))
for (
    name
) in "exp log1p sqrt rsqrt abs neg sin cos erf floor round sign reciprocal square logical_not isnan atan".split():
    POINTWISE[name] = (lambda x, n=name: getattr(torch, n)(x.abs() + 1), r(4, 6))
for (
    name
) in "sub div pow atan2 fmod remainder eq lt logical_and minimum hypot xlogy logaddexp copysign floor_divide".split():
    POINTWISE[name] = (
        lambda x, y, n=name: getattr(torch, n)(x, y),
        r(4, 6).abs() + 1,
        r(6).abs() + 1,
    )

SPATIAL |= {
    **{
        f"{m} {n}": (
            lambda x, m=m: F.interpolate(x, scale_factor=2, mode=m),
            r(2, 4, *[4] * n),
        )
        for m in ["nearest-exact"]
        for n in (1, 2, 3)
    },
    **{
        f"{m} aa": (
            lambda x, m=m: F.interpolate(x, scale_factor=0.5, mode=m, antialias=True),
            X4,
        )
        for m in ("bilinear", "bicubic")
    },
    "reflection_pad3d": (
        lambda x: F.pad(x, (1, 1, 1, 1, 1, 1), mode="reflect"),
        r(2, 4, 4, 4, 4),
    ),
    "adaptive_max_pool3d": (lambda x: F.adaptive_max_pool3d(x, 2), r(2, 4, 4, 4, 4)),
    "grid_sample 3d": (
        lambda x, g: F.grid_sample(x, g.tanh(), align_corners=False),
        r(2, 4, 4, 4, 4),
        r(2, 2, 4, 2, 3),
    ),
    "pixel_shuffle 3": (lambda x: F.pixel_shuffle(x, 3), r(2, 36, 4, 2)),
    "pixel_shuffle one": (lambda x: F.pixel_shuffle(x, 2), r(4, 1, 1)),
    "pixel_unshuffle 3d": (lambda x: F.pixel_unshuffle(x, 2), r(4, 4, 6)),
    "unfold unbatched": (lambda x: F.unfold(x, 2), r(4, 4, 4)),
    "fold unbatched": (lambda x: F.fold(x, (4, 4), 2, stride=2), r(16, 4)),
    "fft": (
        lambda x: torch.fft.ifft(
            torch.fft.fft(torch.fft.irfft(torch.fft.rfft(x), n=6), dim=1), dim=0
        ),
        r(2, 4, 6),
    ),
    "rfft2": (lambda x: torch.fft.rfft2(x, dim=(1, 2)), r(2, 4, 6, 4)),
    "embedding_bag": (F.embedding_bag, ids(8, 2, 4), r(8, 6)),
    "embedding_bag max": (
        lambda i, w: F.embedding_bag(i, w, torch.tensor([0, 2]), mode="max"),
        ids(8, 6),
        r(8, 6),
    ),
    "embedding_bag weighted": (
        lambda i, w, p: F.embedding_bag(i, w, per_sample_weights=p, mode="sum"),
        ids(8, 2, 4),
        r(8, 6),
        r(2, 4),
    ),
    "bilinear": (F.bilinear, r(2, 4, 6), r(2, 4, 8), r(4, 6, 8), r(4)),
    "weight_norm": (lambda v, g: torch._weight_norm(v, g, 0), r(4, 6, 2), r(4, 1, 1)),
    "weight_norm last": (
        lambda v, g: torch._weight_norm(v, g, 2),
        r(4, 6, 8),
        r(1, 1, 8),
    ),
    "new": (
        lambda x: (
            x.new_ones(4, 2),
            x.new_full((4, 6, 2), 3.0),
            x.new_empty(4, 6).fill_(2) + x,
        ),
        r(4, 6),
    ),
    "hardswish_": (lambda x: F.hardswish(x.clone(), inplace=True), r(4, 6)),
    "group_norm groups of one": (lambda x, w: F.group_norm(x, 4, w), r(2, 4, 6), r(4)),
    "instance_norm": (
        lambda x, w, b: F.instance_norm(x, weight=w, bias=b),
        r(2, 4, 6),
        r(4),
        r(4),
    ),
}

CASES = {**PRODUCTS, **VIEWS, **INDEXING, **REDUCTIONS, **NORMS, **SPATIAL, **POINTWISE}

# Registered operators that no case can reach, and why.
UNREACHED = {
    "higher_order::flex_attention": (
        "an operator that is given functions: tests/test_transforms.py"
    ),
    **dict.fromkeys(
        "reshape contiguous chunk tensor_split unsafe_chunk argsort norm rms_norm".split(),
        "decomposed",
    ),
    **dict.fromkeys(
        "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention"
        " cudnn_batch_norm _scaled_dot_product_cudnn_attention miopen_batch_norm".split(),
        "no CPU kernel",
    ),
    **dict.fromkeys(
        "bernoulli_ native_dropout dropout".split(), "random: placed by the layout"
    ),
    **dict.fromkeys(
        "uniform_ normal_ exponential_ rand_like randn_like".split(),
        "random: see the test of them",
    ),
    "_fused_rms_norm": "decomposed on the CPU",
    **dict.fromkeys(["empty_like", "new_empty"], "its values are anything"),
    "_embedding_bag": "_embedding_bag_forward_only where no gradients are wanted",
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_rule_claims_is_what_two_shards_give(name):
    f, *inputs = CASES[name]
    check(f, inputs)
    check(*factored(f, inputs))


def test_every_rule_has_a_case_and_claims_something_that_holds():
    held = {}
    for f, *inputs in CASES.values():
        try:
            found = check(f, inputs)
        except Exception:  # the case's own test reports it
            found = {
                n.op._schema.name.removeprefix("aten::"): 1
                for c in trace_function(f, inputs).calls
                for n in c.nodes
            }
        for name, claims in found.items():
            held[name] = held.get(name, 0) + claims
    registered = rules.table.RULES.keys()
    assert (
        sorted(registered - held.keys() - UNREACHED.keys()) == []
    ), "no case reaches these"
    assert (
        sorted(n for n in registered & held.keys() - UNREACHED.keys() if not held[n])
        == []
    ), "nothing is claimed of these"


@pytest.mark.parametrize(
    "noise",
    [
        torch.rand_like,
        torch.randn_like,
        lambda x: torch.empty_like(x).uniform_(),
        lambda x: torch.empty_like(x).normal_(),
        lambda x: torch.empty_like(x).exponential_(),
        lambda x: torch.empty_like(x).bernoulli_(0.5),
        lambda x: F.alpha_dropout(x, 0.5, True),
        lambda x: F.feature_alpha_dropout(x, 0.5, True),
        lambda x: F.dropout2d(x, 0.5, True),
        lambda x: F.gumbel_softmax(x),
        lambda x: F.rrelu(x, training=True),
    ],
)
def test_noise_is_never_drawn_a_shard_at_a_time(noise):
    """Ranks with one seed would draw the same noise for each shard: not what the whole
    model draws."""
    graph = trace_function(noise, [r(2, 4, 8, 6)])
    axes = Axes(graph)
    nodes = [
        n
        for call in graph.calls
        for n in call.nodes
        if torch.Tag.nondeterministic_seeded in n.op.tags
    ]
    for node in nodes:
        for v in node.inputs:
            assert axes.effect(node).whole.get(v.id, set()) >= {
                f for d in axes.final(v) for f in d
            }, node.op
    assert nodes
