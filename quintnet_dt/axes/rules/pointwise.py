"""Rules of operators that work on each element."""

from ...tracing.graph import Node
from ..factors import fresh, unify
from ..findings import Findings
from .table import aligned, arg, every, rule, unknown

SAME = (
    "clone _to_copy detach alias lift_fresh contiguous zeros_like ones_like full_like"
    " empty_like zero_ fill_ masked_fill_ masked_fill copy_ hardswish hardswish_"
    " log_sigmoid_forward _prelu_kernel"
)


@rule(SAME)
def pointwise(node: Node, axes: Findings) -> None:
    if not node.outputs:  # torch.equal reads values
        return unknown(node, axes)
    shape = node.outputs[0].shape
    dims = aligned(axes, node.inputs, shape)
    for v in node.outputs:
        if v.shape == shape:
            axes.set(v, dims)


@rule("bernoulli_ native_dropout dropout")
def dropout(node: Node, axes: Findings) -> None:
    """A mask for each element. Within a call of dropout the layout gives each rank its
    part of the whole mask."""
    within_dropout = axes.call is not None and axes.call.name == "dropout"
    (pointwise if within_dropout else unknown)(node, axes)


# ranks would draw the same
rule("rand_like randn_like uniform_ normal_ exponential_")(unknown)


@rule("glu")
def glu(node: Node, axes: Findings) -> None:
    """A dim is (two halves, c): the first is scaled by the second."""
    value, out = node.inputs[0], node.outputs[0]
    dim = arg(node, "dim") % len(out.shape)
    half, c = fresh(2), fresh(out.shape[dim])
    dims = list(axes.dims(value))
    unify(dims[dim], half + c)
    axes.unsharded(node, value, half)
    dims[dim] = c
    axes.set(out, dims)


@rule("new_empty new_zeros new_ones new_full")
def new(node: Node, axes: Findings) -> None:
    """Reads no values; dims as long as the input's are taken to be those."""
    value, out = node.inputs[0], node.outputs[0]
    dims = [fresh(n) for n in out.shape]
    for i, (found, size, n) in enumerate(zip(axes.dims(value), value.shape, out.shape)):
        if size == n:
            dims[i] = found
    axes.set(out, dims)


@rule("higher_order::flex_attention")
def flex_attention(node: Node, axes: Findings) -> None:
    """b h q d, b h k d, b h k e -> b h q e, b h q, b h q: heads pass (see
    HigherOrder.shards)."""
    qkv = {v.id for v in node.args[:3]}
    heads = axes.dims(node.args[0])[1]
    for v in node.inputs:
        dims = list(axes.dims(v))
        if v.id in qkv:
            unify(heads, dims.pop(1))
        axes.unsharded(node, v, every(dims))
    for out in node.outputs:
        dims = [fresh(n) for n in out.shape]
        dims[1] = heads
        axes.set(out, dims)
