"""SPLIT moved to where its backward gathers less: of what is made alike on every rank
and then cut, each rank makes its own part. Experts' inputs are the tokens repeated for
each expert; a mask is zeros for each head."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..axes.action import SPLIT, SUM_GRADIENT, Action
from ..axes.axes import Axes
from ..axes.sharding import Axis
from ..axes.state import State
from ..keys import ArgPath, CallIndex, ValueId
from ..tracing.graph import Call, Graph, Value
from .analysis import Analysis
from .layout import Layout
from .work import Work

# These make an axis: of a number, or of what they repeat along it.
_MAKE_AXES = set(
    "zeros ones full empty new_zeros new_ones new_full new_empty expand repeat".split()
)


def sink(graph: Graph, axes: Axes, layout: Layout, work: Work) -> Layout:
    """Let calls make their parts, where fewer bytes are sent so at the size that `work`
    counts."""
    split = {
        graph.calls[index].inputs[path].id
        for (index, path), actions in layout.uses.items()
        if actions[0].kind == SPLIT
    }
    sinking = _Sinking(graph, axes, layout, work)
    for i in sorted(split, reverse=True):
        sinking.try_to_move(graph.values[i])
    return layout


@dataclass(frozen=True)
class _Uses:
    """Every use of a value, at which it is split along one axis."""

    axis: Axis
    split: Action
    places: list[tuple[CallIndex, ArgPath]]


@dataclass
class _Way:
    """To make a value in parts. `bytes`: that a rank sends in the backward, in shares of
    (n - 1) / n; `calls`: those that work on parts then, with what their inputs need."""

    bytes: float
    calls: dict[CallIndex, dict[ArgPath, Action]] = field(default_factory=dict)


class _Sinking:
    def __init__(self, graph: Graph, axes: Axes, layout: Layout, work: Work):
        self.graph, self.axes, self.layout = graph, axes, layout
        self.work = work
        # Those that must stay whole: objects are to keep what they keep in a plan.
        in_objects = {x.value.id for x in graph.in_objects if x.value is not None}
        self.kept = graph.kept_elsewhere | in_objects

    def try_to_move(self, v: Value) -> None:
        uses = self.uses_of(v)
        if uses is None:
            return
        way = self.best(v, uses.axis, uses.split)
        if not way.calls:
            return
        for use in uses.places:
            del self.layout.uses[use]
        for index, actions in way.calls.items():
            self.layout.axis_of[index] = uses.axis
            for made in self.graph.calls[index].outputs.values():
                self.layout.states[made.id] = uses.axis
            for path, action in actions.items():
                self.layout.uses[index, path] = [action]

    def uses_of(self, v: Value) -> _Uses | None:
        """The uses of a value that is split at each of them."""
        places = self.places(v)
        actions = [self.layout.uses.get(place) for place in places]
        first = actions[0] if actions else None
        if first is None or any(found != first for found in actions):
            return None
        if len(first) != 1 or first[0].kind != SPLIT:
            return None
        axis, *others = {self.layout.axis_of[index] for index, _ in places}
        # a weight's own axis is known in its own calls alone
        if others or axis.axes is not None:
            return None
        return _Uses(axis, first[0], places)

    def places(self, v: Value) -> list[tuple[CallIndex, ArgPath]]:
        return [(call.index, path) for call, path in self.graph.readers.get(v.id, ())]

    def sent_for(self, v: Value) -> float:
        """What a rank sends in the backward if a value is made whole and split then."""
        return self.work.nbytes(v) if v.differentiable else 0

    def best(self, v: Value, axis: Axis, split: Action) -> _Way:
        """The way to have a value in parts that sends the least."""
        here = _Way(self.sent_for(v))
        call = self.movable(v)
        actions = None if call is None else self.on_parts(call, v, axis)
        if call is None or actions is None:
            return here
        way = _Way(0, {call.index: actions})
        for path, action in list(actions.items()):
            x = call.inputs[path]
            if action.kind == SUM_GRADIENT:
                way.bytes += 0 if self.sums(x) else 2 * self.sent_for(x)
                continue
            read_once = self.graph.use_count[x.id] == 1
            above = self.best(x, axis, action) if read_once else _Way(self.sent_for(x))
            way.bytes += above.bytes
            if above.calls:
                way.calls |= above.calls
                del actions[path]
        makes_it = not call.inputs
        return way if way.bytes < here.bytes or makes_it else here

    def movable(self, v: Value) -> Call | None:
        """The call that makes a value, on every rank alike, and nothing else."""
        if v.producer is None or v.id in self.kept:
            return None
        if v.id in self.layout.states:
            return None
        call = self.graph.calls[v.producer]
        if call.why_whole or call.own_backward or call.index in self.layout.axis_of:
            return None
        writes = any(node.mutated for node in call.nodes)
        if writes or not self.graph.numbered(call, call.module):
            return None
        written_later = [v, *call.inputs.values()]
        if any(self.graph.last_write.get(x.memory.id, -1) >= 0 for x in written_later):
            return None
        if any((call.index, path) in self.layout.uses for path in call.inputs):
            return None
        return call if list(call.outputs.values()) == [v] else None

    def on_parts(
        self, call: Call, v: Value, axis: Axis
    ) -> dict[ArgPath, Action] | None:
        """What a call's inputs need for it to make its part; None where it cannot."""
        splits = {
            path: split
            for path, x in call.inputs.items()
            if (split := axis.find(self.axes, x))
        }
        if not splits:
            return self.made_anew(call)
        if any(split.blocks != 1 for split in splits.values()):
            return None
        if any(self.layout.states.get(x.id) for x in call.inputs.values()):
            return None
        state: dict[ValueId, State] = {call.inputs[p].id: axis for p in splits}
        found = Analysis(self.axes, call, axis, state).solve()
        needs = found.slices, found.heads, found.add_once, found.buffers
        if found.reason or any(needs) or found.instead or found.out.get(v.id) != axis:
            return None
        actions = {path: Action(SPLIT, split) for path, split in splits.items()}
        return actions | self.summed(call, found.sum_gradient)

    def made_anew(self, call: Call) -> dict[ArgPath, Action] | None:
        """For a call that makes the axis itself."""
        if call.name not in _MAKE_AXES:
            return None
        return self.summed(call, [x.id for x in call.inputs.values() if x.trainable])

    def summed(self, call: Call, ids: Iterable[ValueId]) -> dict[ArgPath, Action]:
        partial = set(ids)
        paths = [path for path, x in call.inputs.items() if x.id in partial]
        return dict.fromkeys(paths, Action(SUM_GRADIENT))

    def sums(self, x: Value) -> bool:
        """Whether a value's gradient is summed for other readers already."""
        summed = [Action(SUM_GRADIENT)]
        return any(self.layout.uses.get(place) == summed for place in self.places(x))
