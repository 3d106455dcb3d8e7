"""Rules of indexing: the indexed dims are needed whole, the others pass."""

import torch

from ..factors import unify
from .table import arg, every, fresh, pass_but, rule, unknown


@rule("index")
def index(node, axes):
    value, out = node.inputs[0], node.outputs[0]
    indices = list(arg(node, "indices"))
    indices += [None] * (len(value.shape) - len(indices))
    if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
        return unknown(node, axes)
    dims, at = axes.dims(value), [k for k, i in enumerate(indices) if i is not None]
    for k in at:
        axes.whole(node, value, dims[k])
    n = max(len(indices[k].shape) for k in at)
    adjacent = at == list(range(at[0], at[-1] + 1))
    lead = at[0] if adjacent else 0
    looked = [fresh(s) for s in out.shape[lead : lead + n]]
    for k in at:
        for j, (dim, size) in enumerate(zip(axes.dims(indices[k])[::-1], indices[k].shape[::-1])):
            if size == out.shape[lead + n - 1 - j]:
                unify(looked[n - 1 - j], dim)
    kept = [d for k, d in enumerate(dims) if indices[k] is None]
    axes.set(out, kept[:lead] + looked + kept[lead:])


@rule("index_select")
def index_select(node, axes):
    dim = arg(node, "dim") % len(node.inputs[0].shape)
    axes.whole(node, node.inputs[1], every(axes.dims(node.inputs[1])))
    pass_but(node, axes, [dim])


@rule(
    "gather scatter scatter_ scatter_add scatter_add_ scatter_reduce scatter_reduce_ index_add"
    " index_add_"
)
def along(node, axes):
    """Reads or writes along one dim by index: it is needed whole; so is one that is cut, where an
    index or a source is smaller."""
    value, out = node.inputs[0], node.outputs[0]
    dim = arg(node, "dim") % max(len(value.shape), 1)
    alike = [v for v in node.inputs if len(v.shape) == len(value.shape)]
    same = [
        i != dim and all(v.shape[i] == n for v in [*alike, out]) for i, n in enumerate(value.shape)
    ]
    for v in node.inputs:
        if len(v.shape) != len(value.shape):
            axes.whole(node, v, every(axes.dims(v)))
            continue
        for i, d in enumerate(axes.dims(v)):
            if same[i]:
                unify(axes.dims(value)[i], d)
            else:
                axes.whole(node, v, d)
    if all(v in alike or len(v.shape) == 1 for v in node.inputs):
        axes.set(out, [d if s else fresh(n) for d, s, n in zip(axes.dims(value), same, out.shape)])
