"""Which axes to shard: each is tried alone, the seconds that it saves counted; the best
that do not conflict are taken, then weights."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from math import fsum

from ..axes.sharding import Axis, LayoutError, Sharding
from ..keys import CallIndex, ParamName, ValueId
from ..tracing.graph import Call, Graph
from .alone import Alone
from .candidates import Candidate, candidates
from .cost import change_by, change_by_gather
from .lay_out import lay_out
from .layout import Layout
from .search import best_set
from .sink import sink
from .task import Task
from .work import Scale

# A call that reads so many times as many weights as an axis runs through is not split
# along it.
FEW_OF_MANY = 8
# A small weight is split by itself only where that saves more of the step.
WORTH_SPLITTING = 0.01


class Planner:
    """Chooses a Sharding."""

    def __init__(self, task: Task):
        self.task = task
        self.alone = Alone(task)

    def choose(self, banned: Collection[Axis] = ()) -> Sharding:
        """A Sharding. Axes in `banned` are not sharded through the model."""
        sharding = Sharding(loss_parallel=self.task.loss_parallel)
        used: set[CallIndex] = set()
        open_ = [c for c in self.good if c.axis not in banned]
        chosen = [open_[i] for i in best_set(open_, [self.saved(c) for c in open_])]
        for candidate in chosen:
            used |= candidate.indices
            sharding.through.add(candidate.axis)
            sharding.params.update(candidate.params)
        self.note_rivals(open_, chosen)
        self.fill(sharding, used)
        return sharding

    def note_rivals(self, open_: list[Candidate], chosen: list[Candidate]) -> None:
        """Why good candidates were left: what stands in their way saves more."""
        at: dict[CallIndex | ParamName, Candidate] = {}
        for candidate in chosen:
            at |= dict.fromkeys([*candidate.indices, *candidate.params], candidate)
        for candidate in open_:
            places = [*candidate.params, *sorted(candidate.indices)]
            rival = next((at[place] for place in places if place in at), None)
            if rival is not None and rival is not candidate:
                why = "its axis would stand in the way of that of {}, which saves more"
                self.task.note(candidate.params, why.format(next(iter(rival.params))))

    # Axes that run through the model.

    @cached_property
    def good(self) -> list[Candidate]:
        """Candidates that can be laid out, and save no less than their weights split
        alone."""
        found = []
        for c in candidates(self.task):
            if not self.weigh(c):
                continue
            if self.saved(c) >= 0:
                found.append(c)
            else:
                self.task.note(c.params, self.why_not(c))
        return found

    def why_not(self, candidate: Candidate) -> str:
        longer = "sharded through the model, its axis would take longer"
        if self.task.work.scale != Scale():
            return longer  # the time of a larger model
        return f"{longer}, {-self.saved(candidate) * 1e3:.3g} ms a step"

    def saved(self, candidate: Candidate) -> float:
        """Seconds that a candidate saves against its weights split alone."""
        return self.seconds_apart(candidate.params) - candidate.seconds

    def weigh(self, candidate: Candidate) -> bool:
        """Whether a candidate can be laid out, taken alone; counts its seconds."""
        task = self.task
        most = FEW_OF_MANY * len(candidate.params)
        if any(task.crowded.get(call.index, 0) > most for call in candidate.calls):
            return False
        if decided := self.decided_by_user(candidate):
            task.note(candidate.params, f"{decided} is split otherwise by the user")
            return False
        try:
            layout = self.lay_out(candidate)
        except LayoutError as e:
            task.note(candidate.params, str(e))
            return False
        if self.runs_through_unsteady(layout):
            why = "its axis runs through a module whose forward reads values"
            task.note(candidate.params, why)
            return False
        candidate.elements = sum(map(task.numel, candidate.params))
        candidate.calls = [c for c in candidate.calls if c.index in layout.axis_of]
        if not candidate.elements:
            return False
        candidate.seconds = change_by(task.graph, layout, task.work).seconds
        return True

    def runs_through_unsteady(self, layout: Layout) -> bool:
        """Whether shards are handed on by the code of a module whose forward reads
        values: it may make other calls the next time."""
        graph = self.task.graph
        return bool(graph.unsteady) and any(
            _common_module(calls) in graph.unsteady
            for calls in _handing_on(graph, layout)
        )

    def decided_by_user(self, candidate: Candidate) -> ParamName | None:
        """A weight that the user has split on another dim, in a call that the axis runs
        through: that call computes by the user's placement."""
        for name, dim in self.task.user_dims.items():
            if dim is None or name in candidate.params or name not in self.task.params:
                continue
            calls = {call.index for call in self.task.users.get(name, ())}
            splits_it = candidate.axis.find(self.task.axes, self.task.params[name])
            if splits_it and not candidate.indices.isdisjoint(calls):
                return name
        return None

    def lay_out(self, candidate: Candidate) -> Layout:
        """The layout of a candidate alone. Weights that a call needs whole are left out
        of it."""
        task = self.task
        while True:
            sharding = Sharding(
                candidate.params, {candidate.axis}, loss_parallel=task.loss_parallel
            )
            layout = lay_out(task.graph, task.axes, sharding, candidate.calls)
            layout = sink(task.graph, task.axes, layout, task.work)
            gathered = task.gathered_weights(layout) & candidate.params.keys()
            if not gathered:
                return layout
            task.note(gathered, str(layout.blockers[0]))
            for name in gathered:
                del candidate.params[name]

    def seconds_apart(self, params: Iterable[ParamName]) -> float:
        """Seconds that a step takes more if each of these weights is split alone, the
        largest first; those that would stay replicated change nothing."""
        seconds: list[float] = []
        shared: set[CallIndex] = set()
        for name in sorted(params, key=lambda name: (-self.task.numel(name), name)):
            if self.replicated(name):
                continue
            change = self.alone.best(name).change
            if not shared.isdisjoint(change.computed):  # a bias
                change = change_by_gather(self.task.params[name], self.task.work)
            shared |= change.computed.keys()
            seconds.append(change.seconds)
        # rounded once: the same in any order of a set
        return fsum(seconds)

    # Weights that no axis took.

    def fill(self, sharding: Sharding, used: Collection[CallIndex]) -> None:
        """Split the weights left, the largest first; the small ones stay replicated.
        `used`: the calls that work on an axis of the model."""
        task = self.task
        for name in sorted(task.params, key=task.numel, reverse=True):
            if name in sharding.params or self.replicated(name):
                continue
            way = self.alone.best(name, sharding.params)
            busy = any(call.index in used for call in task.users.get(name, ()))
            if way.axis is None:
                continue
            if busy and not way.gathered and len(task.params[name].shape) == 1:
                # A row-parallel layer's bias: split, it would break the axis that runs
                # there.
                if name not in task.user_dims:
                    continue
                way = self.alone.gathered(name, way.dim)
            sharding.params.update(way.params(name))
            if way.gathered:
                task.why[name] = way.why

    def replicated(self, name: ParamName) -> bool:
        """Whether a weight that no axis takes stays whole on every rank."""
        if name in self.task.user_dims:
            return self.task.user_dims[name] is None
        if name not in self.task.small:
            return False
        worth_it = -WORTH_SPLITTING * self.task.whole_seconds
        return self.alone.best(name).change.seconds >= worth_it


@dataclass(eq=False)
class _Together:
    """Calls that hand values on to each other."""

    values: set[ValueId]
    calls: list[Call]


def _handing_on(graph: Graph, layout: Layout) -> list[list[Call]]:
    """The calls that work on shards, those together that hand shards or partial results
    on to each other."""
    completed = layout.values.keys()
    groups: list[_Together] = []
    for call in graph.calls:
        values = {v.id for v in (*call.inputs.values(), *call.outputs.values())}
        # what is completed where it is made is handed on whole
        passed = {i for i in values - completed if layout.states.get(i) is not None}
        if not passed and call.index not in layout.axis_of:
            continue
        new = _Together(passed, [call])
        for group in [group for group in groups if group.values & passed]:
            groups.remove(group)
            new.values |= group.values
            new.calls = group.calls + new.calls
        groups.append(new)
    return [group.calls for group in groups]


def _common_module(calls: list[Call]) -> int:
    """The id of the innermost module run that holds all the calls."""
    first, *others = [call.module for call in calls]
    return next(id(m) for m in first.chain() if all(o.within(m) for o in others))
