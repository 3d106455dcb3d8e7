"""Rules of views and of parts of a dim: how factors split, merge, move and are cut."""

from ...tracing.graph import Node, Value
from ..factors import fresh, in_pieces, join, mark_unshardable, piece, take
from ..findings import Findings
from .table import aligned, arg, dims_of, every, pass_but, rule, unknown


@rule("view _unsafe_view reshape")
def view(node: Node, axes: Findings) -> None:
    value, out = node.inputs[0], node.outputs[0]
    if 0 in out.shape:
        return unknown(node, axes)
    dims = [fresh(n) for n in out.shape]
    rest = every(axes.dims(value))
    for i, size in enumerate(out.shape):
        taken = take(rest, size)
        if taken is None:
            mark_unshardable(rest)
            break
        dims[i], rest = taken
    axes.set(out, dims)


@rule("expand repeat")
def repeat(node: Node, axes: Findings) -> None:
    """A dim that is repeated k times is (k, itself); in `expand_as` it is that of the
    other tensor."""
    value, out = node.inputs[0], node.outputs[0]
    if len(node.inputs) == 2:
        return axes.set(out, aligned(axes, node.inputs, out.shape))
    if 0 in out.shape:
        return unknown(node, axes)
    new = len(out.shape) - len(value.shape)
    sizes = [1] * new + list(value.shape)
    dims: list = [[]] * new + axes.dims(value)
    axes.set(out, [fresh(n // size) + d for n, size, d in zip(out.shape, sizes, dims)])


@rule("t")
def t(node: Node, axes: Findings) -> None:
    axes.set(node.outputs[0], axes.dims(node.inputs[0])[::-1])


@rule("transpose transpose_")
def transpose(node: Node, axes: Findings) -> None:
    dims = list(axes.dims(node.inputs[0]))
    a, b = (arg(node, name) for name in ("dim0", "dim1"))
    if dims:
        dims[a], dims[b] = dims[b], dims[a]
    axes.set(node.outputs[0], dims)


@rule("permute")
def permute(node: Node, axes: Findings) -> None:
    dims = axes.dims(node.inputs[0])
    axes.set(node.outputs[0], [dims[i] for i in arg(node, "dims")])


@rule("unsqueeze unsqueeze_")
def unsqueeze(node: Node, axes: Findings) -> None:
    dims = list(axes.dims(node.inputs[0]))
    dims.insert(arg(node, "dim") % (len(dims) + 1), [])
    axes.set(node.outputs[0], dims)


@rule("squeeze squeeze_")
def squeeze(node: Node, axes: Findings) -> None:
    value = node.inputs[0]
    chosen = [] if arg(node, "dim") == [] else dims_of(node, len(value.shape))
    dims = enumerate(zip(axes.dims(value), value.shape))
    axes.set(
        node.outputs[0], [d for i, (d, size) in dims if i not in chosen or size != 1]
    )


# ---- parts of a dim


def _set_parts(
    axes: Findings,
    node: Node,
    dim: int,
    outs: list[Value],
    start: int = 0,
    equal: int = 0,
) -> None:
    """Outputs that are parts of a dim, one after the other from `start` on. Parts that
    all are `equal` long share the factors within a part, unequal ones have their
    own."""
    value = node.inputs[0]
    dims = list(axes.dims(value))
    cut, shared = dims[dim], None
    known = in_pieces(cut, [out.shape[dim] for out in outs])
    if equal and not known and value.shape[dim] % equal == 0 and start % equal == 0:
        taken = take(cut, value.shape[dim] // equal)
        if taken is not None:
            parts, shared = taken
            axes.unsharded(node, value, parts)
    for out in outs:
        size = out.shape[dim]
        part = piece(cut, start, size) if shared is None else shared
        if part is None or size == 0:
            axes.unsharded(node, value, cut)
            part = fresh(size)
        dims[dim] = part
        axes.set(out, dims)
        start += size


def _set_every(axes: Findings, node: Node, dim: int, start: int, step: int) -> None:
    """An output that is one of every `step` elements of a dim: one of each of its
    units."""
    value, out = node.inputs[0], node.outputs[0]
    dims = list(axes.dims(value))
    of_each = start < step and out.shape[dim] * step == value.shape[dim]
    taken = take(dims[dim], out.shape[dim]) if of_each else None
    if taken is None:
        return pass_but(node, axes, [dim])
    dims[dim], within = taken
    axes.unsharded(node, value, within)
    axes.set(out, dims)


@rule("slice")
def slice_(node: Node, axes: Findings) -> None:
    value, out = node.inputs[0], node.outputs[0]
    dim = arg(node, "dim") % len(value.shape)
    size, length = value.shape[dim], out.shape[dim]
    if out.shape == value.shape:
        return axes.set(out, axes.dims(value))
    start, step = arg(node, "start") or 0, arg(node, "step")
    start = max(start + size, 0) if start < 0 else start
    if length == 0:
        return pass_but(node, axes, [dim])
    if step != 1:
        return _set_every(axes, node, dim, start, step)
    all_equal = len(axes.sliced[value.id, dim]) == 1
    _set_parts(axes, node, dim, [out], start, length if all_equal else 0)


@rule(
    "split split_with_sizes chunk unsafe_split unsafe_chunk tensor_split"
    " unsafe_split_with_sizes"
)
def split(node: Node, axes: Findings) -> None:
    dim = arg(node, "dim") % len(node.inputs[0].shape)
    sizes = {out.shape[dim] for out in node.outputs}
    _set_parts(
        axes, node, dim, node.outputs, equal=sizes.pop() if len(sizes) == 1 else 0
    )


@rule("cat")
def cat(node: Node, axes: Findings) -> None:
    out = node.outputs[0]
    dim = arg(node, "dim") % len(out.shape)
    # not those that are empty, which torch allows to have one dim
    tensors = [v for v in node.inputs if len(v.shape) == len(out.shape)]
    dims = aligned(axes, tensors, out.shape)
    dims[dim] = join([axes.dims(v)[dim] for v in tensors if v.shape[dim]])
    axes.set(out, dims)


@rule("stack")
def stack(node: Node, axes: Findings) -> None:
    out = node.outputs[0]
    dims = aligned(axes, node.inputs, node.inputs[0].shape)
    dim = arg(node, "dim") % len(out.shape)
    dims.insert(dim, fresh(out.shape[dim]))
    axes.set(out, dims)
