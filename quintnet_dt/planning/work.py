"""The work of a forward: floating-point operations and bytes of memory, by ATen
operator.

A plan is chosen for the size at which models run (`Scale`): what is traced may be a few
tokens, or a small sibling of the model that is meant.
"""

from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from math import fsum, prod, sqrt
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from ..axes.axes import Axes
from ..axes.sharding import Axis
from ..axes.split import Split
from ..devices import DeviceSpec
from ..keys import CallIndex, ValueId
from ..tracing.graph import Call, Graph, Node, Value

# A backward makes two products where the forward makes one, or reads and writes its
# tensors once more and their gradients.
BACKWARD = 2


# The size that a plan is chosen for, at least: how many rows a weight is applied to in
# one step, and how wide it is.
REAL_ROWS, REAL_WIDTH = 2048, 4096


@dataclass(frozen=True)
class Scale:
    """How many times as many rows as were traced, and as wide tensors, are counted."""

    rows: float = 1.0
    width: float = 1.0

    @property
    def flops(self) -> float:
        return self.rows * self.width**2

    @property
    def activations(self) -> float:
        return self.rows * self.width

    @property
    def weights(self) -> float:
        return self.width**2


@dataclass(frozen=True)
class NodeWork:
    """What one operator of the whole forward does. `made`: its outputs that are no
    views; `moved`: all that it reads or writes. `passes`: 1, or 3 where a backward
    follows."""

    flops: int
    made: tuple[Value, ...]
    moved: tuple[Value, ...]
    dtype: torch.dtype
    passes: int


@dataclass
class Share:
    """A rank's part of one forward's work."""

    flops: float = 0.0
    activation_bytes: float = 0.0
    seconds: list[float] = field(default_factory=list)


class Work:
    """The work of each call of a graph, whole and on shards, for one device."""

    def __init__(self, graph: Graph, axes: Axes, n: int, device: DeviceSpec):
        self.graph, self.axes, self.n, self.device = graph, axes, n, device
        self.scale = Scale()
        self.nodes: dict[CallIndex, list[NodeWork]] = {
            call.index: [work for node in call.nodes if (work := _work(node, axes))]
            for call in graph.calls
        }

    def at_real_size(self) -> "Work":
        """The same, counted for at least the rows and the width that models run at."""
        counted = copy(self)
        counted.scale = self._scale_to_real()
        return counted

    def _scale_to_real(self) -> Scale:
        """From the products with weights: how many rows each weight is applied to in
        the mean, and how wide those are that most of the work is done with."""
        flops = elements = widths = 0.0
        for work in (work for works in self.nodes.values() for work in works):
            if not work.flops:
                continue
            for weight in filter(self.of_weights, work.moved):
                flops += work.flops
                elements += weight.numel
                experts = weight.shape[0] if len(weight.shape) == 3 else 1
                widths += work.flops * sqrt(weight.numel / experts)
        if not flops or not elements:
            return Scale()
        rows, width = flops / elements / 2, widths / flops
        return Scale(max(1.0, REAL_ROWS / rows), max(1.0, REAL_WIDTH / width))

    def nbytes(self, value: Value) -> float:
        """Bytes of a value at the size that is counted."""
        scale = self.scale
        return value.nbytes * (
            scale.weights if self.of_weights(value) else scale.activations
        )

    def of_weights(self, value: Value) -> bool:
        """Whether a value is made of parameters alone."""
        made_of = self.graph.made_of
        return value.id in made_of or value.memory.id in made_of

    @cached_property
    def whole(self) -> dict[CallIndex, float]:
        """Seconds that each call of the whole model takes, forward and backward."""
        calls = self.graph.calls
        return {call.index: fsum(self.share([call], {}).seconds) for call in calls}

    def seconds(self, call: Call, axis: Axis) -> float:
        """Of one call that works on a shard of an axis."""
        return fsum(self.share([call], {call.index: axis}).seconds)

    def share(self, calls: Iterable[Call], axis_of: Mapping[CallIndex, Axis]) -> Share:
        """What a rank does of some calls, given the axes whose shards they work on."""
        total = Share()
        for call in calls:
            axis = axis_of.get(call.index)
            for work in self.nodes[call.index]:
                shares = {} if axis is None else self._shares(work, axis)
                total.flops += work.flops * min(shares.values(), default=1.0)
                total.activation_bytes += sum(
                    v.nbytes * shares.get(v.id, 1.0) for v in work.made
                )
                total.seconds.append(self._node_seconds(work, shares))
        return total

    def _node_seconds(self, work: NodeWork, shares: Mapping[ValueId, float]) -> float:
        """Forward and backward by a roofline (Williams, Waterman and Patterson 2009,
        https://doi.org/10.1145/1498765.1498785): as long as its operations take or its
        memory, whichever is more. `shares`: of the values of which a rank has only a
        part."""
        flops = work.flops * self.scale.flops * min(shares.values(), default=1.0)
        moved = sum(self.nbytes(v) * shares.get(v.id, 1.0) for v in work.moved)
        computing = flops / self.device.peak(work.dtype)
        return work.passes * max(computing, moved / self.device.memory_bandwidth)

    def _shares(self, work: NodeWork, axis: Axis) -> dict[ValueId, float]:
        """The share that the fullest rank has of each value that the axis splits."""
        share = -(-axis.size // self.n) / axis.size
        return {
            v.id: share
            for v in work.moved
            if isinstance(axis.find(self.axes, v), Split)
        }


def _work(node: Node, axes: Axes) -> NodeWork | None:
    """None for a view, which does nothing."""
    inputs = {v.id for v in node.inputs}
    new = {v.id: v for v in node.outputs if v.id not in inputs}
    made = tuple(v for v in new.values() if v.memory is v)
    if not made and not node.mutated:
        return None
    moved = tuple({v.id: v for v in (*node.inputs, *new.values())}.values())
    differentiable = any(v.differentiable for v in new.values())
    passes = 1 + BACKWARD * differentiable
    return NodeWork(_flops(node, axes), made, moved, moved[-1].dtype, passes)


def _flops(node: Node, axes: Axes) -> int:
    """Of one operator in the forward, as torch.utils.flop_counter counts them; those
    operators too that it has no formula for."""
    packet = getattr(node.op, "_overloadpacket", node.op)
    name = getattr(getattr(node.op, "_schema", None), "name", "")
    if packet in flop_registry:
        args, kwargs = _on_meta((node.args, node.kwargs))
        outs = [_on_meta(v) for v in node.outputs]
        return flop_registry[packet](
            *args, **kwargs, out_val=outs[0] if len(outs) == 1 else tuple(outs)
        )
    if name == "aten::_grouped_mm":
        rows, weights = node.inputs[:2]
        return 2 * prod(rows.shape) * weights.shape[-1]
    if "scaled_dot_product" in name:
        query, key, value = node.inputs[:3]
        pairs = prod(query.shape[:-1]) * key.shape[-2]
        return 2 * pairs * (query.shape[-1] + value.shape[-1])
    if not name.startswith("aten::") and axes.effect(node).contract:
        return _flops_of_product(node, axes)
    return 0


def _flops_of_product(node: Node, axes: Axes) -> int:
    """Of an operator of the user's whose rule says that it sums over an axis: a
    multiplication and an addition for each place along all of its axes."""
    values = (*node.inputs, *node.outputs)
    along = {f for v in values for dim in axes.final(v) for f in dim}
    return 2 * prod(f.size for f in along)


def _on_meta(obj: Any) -> Any:
    """Arguments with tensors of no memory in the place of Values."""
    if isinstance(obj, Value):
        return torch.empty(obj.shape, dtype=obj.dtype, device="meta")
    if isinstance(obj, (tuple, list)):
        return type(obj)(_on_meta(x) for x in obj)
    if isinstance(obj, dict):
        return {key: _on_meta(x) for key, x in obj.items()}
    return obj
