"""Rules of indexing by tensors: the indexed dims are needed whole, the others pass."""

import torch

from ...tracing.graph import Node
from ..factors import fresh, unify
from ..findings import Findings
from .table import aligned, arg, rule, unknown


@rule("index")
def index(node: Node, axes: Findings) -> None:
    value, out = node.inputs[0], node.outputs[0]
    # The dims that are indexed: dim -> the tensor of its indices.
    indices = {k: i for k, i in enumerate(arg(node, "indices")) if i is not None}
    if any(i.dtype in (torch.bool, torch.uint8) for i in indices.values()):
        return unknown(node, axes)
    dims = axes.dims(value)
    for k in indices:
        axes.unsharded(node, value, dims[k])
    # The dims of the indices, which broadcast, take the place of the indexed ones; they
    # come first where those are not adjacent.
    first = min(indices)
    adjacent = max(indices) - first + 1 == len(indices)
    at = first if adjacent else 0
    n = max(len(i.shape) for i in indices.values())
    looked_up = aligned(axes, indices.values(), out.shape[at : at + n])
    kept = [d for k, d in enumerate(dims) if k not in indices]
    axes.set(out, kept[:at] + looked_up + kept[at:])


@rule(
    "gather scatter scatter_ scatter_add scatter_add_ scatter_reduce scatter_reduce_"
    " index_add index_add_"
)
def along(node: Node, axes: Findings) -> None:
    """Reads or writes along one dim by index: it is needed whole; so is one that is
    cut, where an index or a source is smaller."""
    value, out = node.inputs[0], node.outputs[0]
    dims = axes.dims(value)
    alike = [v for v in node.inputs if len(v.shape) == len(dims)]
    passing = [
        len(set(sizes)) == 1 for sizes in zip(out.shape, *(v.shape for v in alike))
    ]
    if dims:
        passing[arg(node, "dim")] = False
    for v in node.inputs:
        for i, found in enumerate(axes.dims(v)):
            if v in alike and passing[i]:
                unify(dims[i], found)
            else:
                axes.unsharded(node, v, found)
    if all(v in alike or len(v.shape) == 1 for v in node.inputs):
        axes.set(
            out, [d if p else fresh(n) for d, p, n in zip(dims, passing, out.shape)]
        )
