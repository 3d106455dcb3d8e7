"""Rules of views and of parts of a dim: how factors split, merge, move and are cut."""

from ..factors import leaves, piece, take, unify
from .table import RULES, arg, dims_of, every, fresh, pass_but, rule, unknown


@rule("view _unsafe_view reshape")
def view(node, axes):
    out, rest, dims = node.outputs[0], every(axes.dims(node.inputs[0])), []
    if 0 in out.shape:
        return unknown(node, axes)
    for size in out.shape:
        got = take(rest, size)
        if got is None:
            for f in leaves(rest):
                f.opaque = True
            dims += [fresh(s) for s in out.shape[len(dims) :]]
            break
        dims.append(got[0])
        rest = got[1]
    axes.set(out, dims)


def _reorder(order):
    def apply(node, axes):
        dims = axes.dims(node.inputs[0])
        axes.set(node.outputs[0], [dims[i] for i in order(node, len(dims))])

    return apply


def _swap(node, n):
    a, b = arg(node, "dim0") % n, arg(node, "dim1") % n
    order = list(range(n))
    order[a], order[b] = b, a
    return order


RULES["t"] = _reorder(lambda node, n: list(range(n))[::-1])
RULES["transpose"] = RULES["transpose_"] = _reorder(_swap)
RULES["permute"] = _reorder(lambda node, n: [d % n for d in arg(node, "dims")])


@rule("unsqueeze unsqueeze_")
def unsqueeze(node, axes):
    dims = list(axes.dims(node.inputs[0]))
    dims.insert(arg(node, "dim") % (len(dims) + 1), [])
    axes.set(node.outputs[0], dims)


@rule("squeeze squeeze_")
def squeeze(node, axes):
    value = node.inputs[0]
    chosen = [] if arg(node, "dim") == [] else dims_of(node, len(value.shape))
    drop = {d for d in chosen if value.shape[d] == 1}
    axes.set(node.outputs[0], [d for i, d in enumerate(axes.dims(value)) if i not in drop])


# ---- parts of a dim


def _part(node, axes, dim, length, start, value, outs):
    """Outputs that are parts of a dim, one after the other: equal parts share the factors within,
    unequal ones have their own."""
    dims = axes.dims(value)
    size = value.shape[dim]
    got = None
    if length and size % length == 0 and start % length == 0:
        got = take(dims[dim], size // length)
    if got is not None:
        axes.whole(node, value, got[0])
    for out in outs:
        part = got[1] if got is not None else piece(dims[dim], start, out.shape[dim])
        if part is None or not out.shape[dim]:
            axes.whole(node, value, dims[dim])
            part = fresh(out.shape[dim])
        axes.set(out, [part if i == dim else d for i, d in enumerate(dims)])
        start += out.shape[dim]


@rule("slice")
def slice_(node, axes):
    value, out = node.inputs[0], node.outputs[0]
    dim = arg(node, "dim") % len(value.shape)
    if out.shape == value.shape:
        return axes.set(out, axes.dims(value))
    if arg(node, "step") != 1 or out.shape[dim] == 0:
        return pass_but(node, axes, [dim])
    start = arg(node, "start") or 0
    start = max(start + value.shape[dim], 0) if start < 0 else start
    alike = len(axes.sliced[value.id, dim]) == 1
    _part(node, axes, dim, out.shape[dim] if alike else 0, start, value, [out])


@rule("split split_with_sizes chunk unsafe_split unsafe_chunk tensor_split unsafe_split_with_sizes")
def split(node, axes):
    value = node.inputs[0]
    dim = arg(node, "dim") % len(value.shape)
    sizes = {o.shape[dim] for o in node.outputs}
    _part(node, axes, dim, sizes.pop() if len(sizes) == 1 else 0, 0, value, node.outputs)


@rule("select unbind")
def select(node, axes):
    value = node.inputs[0]
    dims = list(axes.dims(value))
    axes.whole(node, value, dims.pop(arg(node, "dim") % len(value.shape)))
    for out in node.outputs:
        axes.set(out, dims)


@rule("cat")
def cat(node, axes):
    out = node.outputs[0]
    dim = arg(node, "dim") % len(out.shape)
    dims = [None] * len(out.shape)
    for v in node.inputs:
        if len(v.shape) != len(out.shape):
            continue  # the legacy empty tensor
        for i, d in enumerate(axes.dims(v)):
            if i == dim:
                axes.whole(node, v, d)
            elif dims[i] is None:
                dims[i] = d
            else:
                unify(dims[i], d)
    axes.set(out, [fresh(s) if d is None else d for d, s in zip(dims, out.shape)])


@rule("stack")
def stack(node, axes):
    out = node.outputs[0]
    dims = axes.dims(node.inputs[0])
    for v in node.inputs[1:]:
        for a, b in zip(dims, axes.dims(v)):
            unify(a, b)
    at = arg(node, "dim") % len(out.shape)
    axes.set(out, [*dims[:at], fresh(out.shape[at]), *dims[at:]])
