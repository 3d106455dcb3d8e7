"""Calls that take statistics over the very dim that is sharded: a norm of features, a
cross entropy of classes. The ranks exchange the statistics and keep their shards; how is
in running/on_shard.py.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

from ..axes.axes import Axes
from ..axes.sharding import Axis
from ..axes.state import State
from ..keys import ValueId
from ..tracing.graph import Call, Value
from .sizes import OF_LAST_DIMS
from .work import Work

_PARAMETERS = {
    "layer_norm": ("input", "normalized_shape", "weight", "bias"),
    "rms_norm": ("input", "normalized_shape", "weight"),
    "group_norm": ("input", "num_groups", "weight", "bias"),
    "cross_entropy": ("input", "target", "weight"),
}
_PRECISE = 4  # bytes of the shortest float that statistics are taken in


class OverAxis(NamedTuple):
    """A call that takes statistics over the axis. `instead`: on whose shard it works;
    `slices`: inputs that are replicated, of which each rank takes its part; `out`: what
    it makes."""

    instead: Value
    slices: set[ValueId]
    out: dict[ValueId, State]


def over_axis(
    call: Call, axes: Axes, axis: Axis, sharded: set[ValueId]
) -> OverAxis | None:
    """How a call runs on shards along the axis, the inputs in `sharded`, if it takes
    statistics over it; None for any other call."""
    taken = _TAKEN.get(call.name)
    if taken is None or not call.nodes:
        return None
    return taken(call, axes, axis, sharded, _given(call))


def _cross_entropy(
    call: Call, axes: Axes, axis: Axis, sharded: set[ValueId], given: dict[str, Any]
) -> OverAxis | None:
    """Of logits that are sharded over their classes."""
    logits, target = given["input"], given["target"]
    if sharded != {logits.id}:
        return None
    if target.dtype.is_floating_point or given.get("weight") is not None:
        return None
    (dim,) = _dims_over(call.name, given)
    classes = replace(axis.all_units, dim=dim)
    if axis.find(axes, logits) != classes:
        return None
    return OverAxis(logits, set(), {v.id: None for v in call.outputs.values()})


def _norm(
    call: Call, axes: Axes, axis: Axis, sharded: set[ValueId], given: dict[str, Any]
) -> OverAxis | None:
    """Of features that are sharded, the scales with them."""
    x = given["input"]
    scales = [given.get(name) for name in ("weight", "bias")]
    values = [x, *(v for v in scales if v is not None)]
    along = [*values, *call.outputs.values()]
    if not all(isinstance(v, Value) and axis.find(axes, v) for v in along):
        return None
    if given.get("num_groups", 1) != 1:
        return None  # each rank may have groups of its own
    if axis.split_of(axes, x).dim not in _dims_over(call.name, given):
        return None
    slices = {v.id for v in values} - sharded
    return OverAxis(x, slices, {v.id: axis for v in call.outputs.values()})


def _dims_over(name: str, given: dict[str, Any]) -> Iterable[int]:
    """The dims of its input over which a call takes statistics; a group norm of one
    group."""
    ndim = len(given["input"].shape)
    if name in OF_LAST_DIMS:
        return range(ndim - len(given["normalized_shape"]), ndim)
    if name == "group_norm":
        return range(1, ndim)
    return [min(1, ndim - 1)]  # classes


def row_bytes(call: Call, work: Work) -> float:
    """Bytes of one number for each row that a call takes statistics of."""
    given = _given(call)
    x = given["input"]
    in_a_row = prod(x.shape[dim] for dim in _dims_over(call.name, given))
    short = max(1.0, _PRECISE / x.dtype.itemsize)  # statistics are not short floats
    return short * work.nbytes(x) / in_a_row


def _given(call: Call) -> dict[str, Any]:
    """A call's arguments by name."""
    args, kwargs = call.args
    return {**dict(zip(_PARAMETERS[call.name], args)), **kwargs}


_TAKEN: dict[str, Callable[..., OverAxis | None]] = {
    "cross_entropy": _cross_entropy,
    **dict.fromkeys(["layer_norm", "rms_norm", "group_norm"], _norm),
}
