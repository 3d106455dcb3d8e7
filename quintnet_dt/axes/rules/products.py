"""Rules of products that the notation cannot say: convolutions, grouped products."""

from ..factors import unify
from .table import arg, every, fresh, rule, unknown


@rule("convolution")
def convolution(node, axes):
    """x: b (g c) s.., w: (g o) c k.. (transposed: (g c) o k..) -> b (g o) s..: c is contracted, g
    and o pass."""
    x, w, out = node.inputs[0], node.inputs[1], node.outputs[0]
    groups = arg(node, "groups")
    g, c, o = fresh(groups), fresh(x.shape[1] // groups), fresh(out.shape[1] // groups)
    first, second = (c, o) if arg(node, "transposed") else (o, c)
    xd, wd = axes.dims(x), axes.dims(w)
    for v, dims in ((x, xd), (w, wd)):
        axes.whole(node, v, every(dims[2:]))
    unify(xd[1], g + c)
    unify(wd[0], g + first)
    unify(wd[1], second)
    axes.contract(node, c)
    if len(node.inputs) > 2:
        axes.effects[id(node)].bias = node.inputs[2].id
        unify(axes.dims(node.inputs[2])[0], g + o)
    axes.set(out, [xd[0], g + o, *map(fresh, out.shape[2:])])


@rule("higher_order::flex_attention")
def flex_attention(node, axes):
    """b h q d, b h k d, b h k e -> b h q e, b h q, b h q: heads pass (see HigherOrder.shards)."""
    heads = [axes.dims(v)[1] for v in node.args[:3]]
    for v in node.inputs:
        known = any(v is x for x in node.args[:3])
        axes.whole(node, v, every(d for i, d in enumerate(axes.dims(v)) if not known or i != 1))
    unify(heads[0], heads[1])
    unify(heads[0], heads[2])
    for out in node.outputs:
        axes.set(out, [heads[0] if i == 1 else fresh(n) for i, n in enumerate(out.shape)])


@rule("_grouped_mm")
def grouped_mm(node, axes):
    """t k, e k j -> t j: rows in groups by offsets, one expert's matrix each."""
    x, w, out = node.inputs[0], node.inputs[1], node.outputs[0]
    if (len(x.shape), len(w.shape), len(out.shape)) != (2, 3, 2):
        return unknown(node, axes)
    (t, k), (e, k2, j) = axes.dims(x), axes.dims(w)
    unify(k, k2)
    axes.contract(node, k)
    axes.whole(node, x, t)
    axes.whole(node, w, e)
    for v in node.inputs[2:]:
        axes.whole(node, v, every(axes.dims(v)))
    axes.set(out, [fresh(out.shape[0]), j])
