"""Sums of gradients moved to where there are fewer: two norms of one tensor, each of
which enters a region, cost two reductions below and one above (and those of their small
weights)."""

from collections.abc import Iterable
from dataclasses import dataclass

from ..axes.action import SUM_GRADIENT, Action
from ..keys import ArgPath, CallIndex, ValueId
from ..tracing.graph import Call, Graph, Value
from .layout import Layout


def hoist(graph: Graph, layout: Layout) -> Layout:
    """Move SUM_GRADIENT above replicated calls where that sends fewer bytes."""
    hoisting = _Hoisting(graph, layout)
    moved = True
    while moved:
        moved = False
        for v in graph.values:
            if v.trainable:
                moved |= hoisting.move_above_readers(v)
    return layout


@dataclass(frozen=True)
class _Movable:
    """A replicated call, whose trainable `outputs` are read by nothing but calls on
    shards."""

    call: Call
    outputs: list[Value]


class _Hoisting:
    def __init__(self, graph: Graph, layout: Layout):
        self.graph, self.layout = graph, layout
        self.readers: dict[ValueId, list[tuple[Call, ArgPath]]] = graph.readers

    def move_above_readers(self, v: Value) -> bool:
        """Move the sums of what is made of a value above the calls that make it, if
        that sends less; or as much, above a view."""
        found = {c.index: self.movable(c) for c, _ in self.readers.get(v.id, ())}
        group = [movable for movable in found.values() if movable is not None]
        if not group:
            return False
        before = _bytes(out for movable in group for out in movable.outputs)
        after = _bytes(x for movable in group for x in self.inputs_to_sum(movable.call))
        if after > before or (after == before and not all(map(_is_view, group))):
            return False
        for movable in group:
            self.move(movable)
        return True

    def inputs_to_sum(self, call: Call) -> list[Value]:
        """The inputs whose gradients are to be summed instead, and are not yet."""
        return [x for x in call.inputs.values() if x.trainable and not self.entries(x)]

    def entries(self, v: Value) -> list[tuple[CallIndex, ArgPath]]:
        """The uses of a value at which its gradient is summed, and nothing else
        done."""
        uses = [(call.index, path) for call, path in self.readers.get(v.id, ())]
        return [
            use for use in uses if self.layout.uses.get(use) == [Action(SUM_GRADIENT)]
        ]

    def movable(self, call: Call) -> _Movable | None:
        """A call whose results all enter regions, and with which nothing else is
        done."""
        if call.why_whole or call.own_backward:
            return None
        if call.index in self.layout.axis_of:
            return None
        if not self.graph.numbered(call, call.module) or self.writes_or_is_overwritten(
            call
        ):
            return None
        if any((call.index, path) in self.layout.uses for path in call.inputs):
            return None
        outputs = {v.id: v for v in call.outputs.values() if v.trainable}
        inputs = {v.id for v in call.inputs.values()}
        elsewhere = (
            self.graph.kept_elsewhere,
            inputs,
            self.layout.values,
            self.layout.states,
        )
        only_here = all(outputs.keys().isdisjoint(others) for others in elsewhere)
        if outputs and only_here and all(map(self.only_enters, outputs.values())):
            return _Movable(call, list(outputs.values()))
        return None

    def writes_or_is_overwritten(self, call: Call) -> bool:
        """Whether a call writes to a tensor, or one of its inputs is written to
        later."""
        if any(node.mutated for node in call.nodes):
            return True
        last_write = self.graph.last_write
        return any(
            last_write.get(v.memory.id, -1) >= call.index for v in call.inputs.values()
        )

    def only_enters(self, v: Value) -> bool:
        return 0 < len(self.readers.get(v.id, ())) == len(self.entries(v))

    def move(self, movable: _Movable) -> None:
        for out in movable.outputs:
            for use in self.entries(out):
                del self.layout.uses[use]
        for path, v in movable.call.inputs.items():
            if v.trainable:
                self.layout.uses[movable.call.index, path] = [Action(SUM_GRADIENT)]


def _is_view(movable: _Movable) -> bool:
    call = movable.call
    return len(call.inputs) == 1 and call.name in ("view", "reshape")


def _bytes(values: Iterable[Value]) -> int:
    return sum({v.id: v.nbytes for v in values}.values())
