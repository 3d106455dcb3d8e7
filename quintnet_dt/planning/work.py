"""The work of a forward: floating-point operations and bytes of memory, by ATen
operator.

A plan is chosen for the size at which models run (`Scale`): what is traced may be a few
tokens, or a small sibling of the model that is meant.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from math import fsum, sqrt

import torch

from ..axes.axes import Axes
from ..axes.factors import Factor
from ..axes.sharding import Axis
from ..axes.split import Split
from ..devices import DeviceSpec
from ..keys import CallIndex, ValueId
from ..tracing.graph import Call, Graph, Node, Value
from .flops import flops_of

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
    def products_with_weights(self) -> float:
        return self.rows * self.width**2

    @property
    def products_of_activations(self) -> float:
        """As in attention: each row with each, over the width."""
        return self.rows**2 * self.width

    def activations(self, order: int) -> float:
        """`order`: how often a length of the inputs is in one, twice in the scores of
        an attention."""
        return self.rows**order * self.width

    @property
    def weights(self) -> float:
        return self.width**2


@dataclass(frozen=True)
class NodeWork:
    """What one operator of the whole forward does. `made`: its outputs that are no
    views; `moved`: all that it reads or writes. `passes`: 1, or 3 where a backward
    follows."""

    node: Node
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
        self.orders: dict[ValueId, int] = {}
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
        flops = 0.0
        elements = 0
        widths = 0.0
        for work, weight in self._products_with_weights():
            experts = weight.shape[0] if len(weight.shape) == 3 else 1
            flops += work.flops
            elements += weight.numel
            widths += work.flops * sqrt(weight.numel / experts)
        if not flops or not elements:
            return Scale()
        rows = flops / elements / 2
        width = widths / flops
        return Scale(
            rows=max(1.0, REAL_ROWS / rows),
            width=max(1.0, REAL_WIDTH / width),
        )

    def _products_with_weights(self) -> Iterator[tuple[NodeWork, Value]]:
        for works in self.nodes.values():
            for work in works:
                if not work.flops:
                    continue
                for weight in filter(self.of_weights, work.moved):
                    yield work, weight

    @cached_property
    def multiplied(self) -> Counter[ValueId]:
        """By value, how many calls multiply it with weights."""
        found: Counter[ValueId] = Counter()
        for call in self.graph.calls:
            works = self.nodes[call.index]
            if any(w.flops and any(map(self.of_weights, w.moved)) for w in works):
                found.update({v.id for v in call.inputs.values()})
        return found

    def nbytes(self, value: Value) -> float:
        """Bytes of a value at the size that is counted."""
        if self.of_weights(value):
            return value.nbytes * self.scale.weights
        return value.nbytes * self.scale.activations(self._order(value))

    def _order(self, value: Value) -> int:
        """How often a length of the inputs is in a value: twice in the scores of an
        attention."""
        if value.id in self.orders:
            return self.orders[value.id]
        found: Counter[Factor] = Counter()
        for dim in self.axes.final(value):
            found.update(f for f in dim if f in self._lengths)
        self.orders[value.id] = max(found.values(), default=1)
        return self.orders[value.id]

    def of_weights(self, value: Value) -> bool:
        """Whether a value is made of parameters alone."""
        return value.id in self._weights or value.memory.id in self._weights

    @cached_property
    def _weights(self) -> set[ValueId]:
        """Parameters and what is made of them alone, within a call too."""
        found = set(self.graph.made_of)
        for call in self.graph.calls:
            for node in call.nodes:
                given = {v.id for v in node.inputs}
                if given and given <= found:
                    found |= {v.id for v in node.outputs}
        return found

    @cached_property
    def _lengths(self) -> set[Factor]:
        """The factors of the inputs that no parameter has."""
        given = self._factors(self.graph.modules[0].inputs.values())
        of_weights = self._factors(self.graph.params.values())
        return given - of_weights

    def _factors(self, values: Iterable[Value]) -> set[Factor]:
        found: set[Factor] = set()
        for value in values:
            for dim in self.axes.final(value):
                found.update(dim)
        return found

    @cached_property
    def whole(self) -> dict[CallIndex, float]:
        """Seconds that each call of the whole model takes, forward and backward."""
        calls = self.graph.calls
        return {call.index: fsum(self.share([call], {}).seconds) for call in calls}

    def seconds(self, call: Call, axis: Axis) -> float:
        """Of one call that works on a shard of an axis."""
        return fsum(self.share([call], {call.index: axis}).seconds)

    def share(self, calls: Iterable[Call], axis_of: Mapping[CallIndex, Axis]) -> Share:
        """What the fullest rank does of some calls, given the axes whose shards they
        work on."""
        total = Share()
        for call in calls:
            axis = axis_of.get(call.index)
            for work in self.nodes[call.index]:
                splits = {} if axis is None else self._splits(work, axis)
                flops = self._flops(work, splits)
                total.flops += flops
                total.activation_bytes += sum(
                    v.nbytes * self._part(v, splits) for v in work.made
                )
                total.seconds.append(self._node_seconds(work, flops, splits))
        return total

    def _splits(self, work: NodeWork, axis: Axis) -> dict[ValueId, Split]:
        """How the values are split that an operator works on."""
        found = {v.id: axis.find(self.axes, v) for v in work.moved}
        return {i: split for i, split in found.items() if isinstance(split, Split)}

    def _part(self, value: Value, splits: Mapping[ValueId, Split]) -> float:
        """The share of a value that the fullest rank has."""
        split = splits.get(value.id)
        return 1.0 if split is None else split.sizes(self.n)[0] / split.units

    def _flops(self, work: NodeWork, splits: Mapping[ValueId, Split]) -> int:
        if not work.flops or not splits:
            return work.flops

        def local_shape(value: Value) -> tuple[int, ...]:
            split = splits.get(value.id)
            if split is None:
                return value.shape
            return split.local_shape(value.shape, 0, self.n)

        return flops_of(work.node, self.axes, local_shape)

    def _node_seconds(
        self, work: NodeWork, flops: float, splits: Mapping[ValueId, Split]
    ) -> float:
        """Forward and backward by a roofline (Williams, Waterman and Patterson 2009,
        https://doi.org/10.1145/1498765.1498785): as long as its operations take or its
        memory, whichever is more."""
        moved = sum(self.nbytes(v) * self._part(v, splits) for v in work.moved)
        if any(map(self.of_weights, work.moved)):
            flops *= self.scale.products_with_weights
        else:
            flops *= self.scale.products_of_activations
        computing = flops / self.device.peak(work.dtype)
        return work.passes * max(computing, moved / self.device.memory_bandwidth)


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
    flops = flops_of(node, axes, lambda value: value.shape)
    return NodeWork(node, flops, made, moved, moved[-1].dtype, passes)
