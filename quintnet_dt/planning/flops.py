"""Floating-point operations of one operator, whole or on shards."""

from collections.abc import Callable
from math import prod
from typing import Any

from ..axes.axes import Axes
from ..tracing.graph import Node, Value


def flops_of(
    node: Node, axes: Axes, shape_of: Callable[[Value], tuple[int, ...]]
) -> int:
    """Floating-point operations of one operator in the forward, as
    torch.utils.flop_counter counts them, on tensors of these shapes; those operators
    too that it has no formula for."""
    # It needs what is private in torch: not for the import of the library.
    from torch.utils.flop_counter import flop_registry

    packet = getattr(node.op, "_overloadpacket", node.op)
    name = getattr(getattr(node.op, "_schema", None), "name", "")
    if packet in flop_registry:
        args, kwargs = _with_shapes((node.args, node.kwargs), shape_of)
        outs = tuple(shape_of(v) for v in node.outputs)
        out = outs[0] if len(outs) == 1 else outs
        return flop_registry[packet](*args, **kwargs, out_val=out)
    if name == "aten::_grouped_mm":
        rows, weights = map(shape_of, node.inputs[:2])
        return 2 * prod(rows) * weights[-1]
    if "scaled_dot_product" in name:
        query, key, value = map(shape_of, node.inputs[:3])
        pairs = prod(query[:-1]) * key[-2]
        return 2 * pairs * (query[-1] + value[-1])
    if not name.startswith("aten::") and axes.effect(node).contract:
        return _flops_of_product(node, axes, shape_of)
    return 0


def _flops_of_product(
    node: Node, axes: Axes, shape_of: Callable[[Value], tuple[int, ...]]
) -> int:
    """Of an operator of the user's whose rule says that it sums over an axis: a
    multiplication and an addition for each place along all of its axes."""
    values = (*node.inputs, *node.outputs)
    along = {f for v in values for dim in axes.final(v) for f in dim}
    share = min(prod(shape_of(v)) / max(v.numel, 1) for v in values)
    return round(2 * prod(f.size for f in along) * share)


def _with_shapes(obj: Any, shape_of: Callable[[Value], tuple[int, ...]]) -> Any:
    """Arguments with shapes in the place of Values."""
    if isinstance(obj, Value):
        return shape_of(obj)
    if isinstance(obj, (tuple, list)):
        return type(obj)(_with_shapes(x, shape_of) for x in obj)
    if isinstance(obj, dict):
        return {key: _with_shapes(x, shape_of) for key, x in obj.items()}
    return obj
