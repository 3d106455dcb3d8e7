"""Which axes to shard: each is tried alone, its bytes counted; the best that do not
conflict are taken, then weights."""

from collections.abc import Collection, Iterable
from functools import cached_property
from math import fsum, inf

from ..axes.sharding import Axis, LayoutError, Sharding
from ..keys import CallIndex, ParamName
from ..tracing.graph import Call
from .alone import Alone
from .candidates import Candidate, candidates, regions
from .cost import cost
from .lay_out import lay_out
from .layout import Layout
from .task import Task

# Up to so many axes that stand in each other's way, every choice among them is tried.
EXHAUSTIVE = 10
# A call that reads so many times as many weights as an axis runs through is not split
# along it.
FEW_OF_MANY = 8


class Planner:
    """Chooses a Sharding."""

    def __init__(self, task: Task):
        self.task = task
        self.alone = Alone(task)

    def choose(self, banned: Collection[Axis] = ()) -> Sharding:
        """A Sharding. Axes in `banned` are not sharded through the model."""
        sharding = Sharding(loss_parallel=self.task.loss_parallel)
        used: set[CallIndex] = set()
        for region in regions([c for c in self.good if c.axis not in banned]):
            for candidate in self.best_of(region):
                used |= {call.index for call in candidate.calls}
                sharding.through.add(candidate.axis)
                sharding.params.update(candidate.params)
        self.fill(sharding, used)
        return sharding

    # Axes that run through the model.

    @cached_property
    def good(self) -> list[Candidate]:
        """Candidates that can be laid out, and send no more than their weights split
        alone."""
        found = []
        for c in candidates(self.task):
            if self.weigh(c) and c.bytes <= self.bytes_apart(c.params):
                found.append(c)
            elif c.bytes:
                why = (
                    f"sharded through the model, its axis would send {c.bytes:.0f}"
                    " bytes a step"
                )
                self.task.note(c.params, why)
        return found

    def weigh(self, candidate: Candidate) -> bool:
        """Whether a candidate can be laid out, taken alone; counts its bytes."""
        task = self.task
        most = FEW_OF_MANY * len(candidate.params)
        if any(task.crowded.get(call.index, 0) > most for call in candidate.calls):
            return False
        if (
            task.graph.unsteady
            and _common_module(candidate.calls) in task.graph.unsteady
        ):
            why = "its axis runs through a module whose forward reads values"
            task.note(candidate.params, why)
            return False
        try:
            layout = self.lay_out(candidate)
        except LayoutError as e:
            task.note(candidate.params, str(e))
            return False
        candidate.elements = sum(map(task.numel, candidate.params))
        candidate.calls = [c for c in candidate.calls if c.index in layout.axis_of]
        if not candidate.elements:
            return False
        candidate.bytes = cost(task.graph, layout, task.n)
        return True

    def lay_out(self, candidate: Candidate) -> Layout:
        """The layout of a candidate alone. Weights that a call needs whole are left out
        of it."""
        task = self.task
        while True:
            sharding = Sharding(
                candidate.params, {candidate.axis}, loss_parallel=task.loss_parallel
            )
            layout = lay_out(task.graph, task.axes, sharding, candidate.calls)
            gathered = task.gathered_weights(layout) & candidate.params.keys()
            if not gathered:
                return layout
            task.note(gathered, str(layout.blockers[0]))
            for name in gathered:
                del candidate.params[name]

    def bytes_apart(self, params: Iterable[ParamName]) -> float:
        """Bytes a step if each of these weights is split alone; those that would stay
        replicated send none."""
        sent = (self.alone.best(p).bytes for p in params if p not in self.task.small)
        # rounded once: the same in any order of a set
        return fsum(b for b in sent if b != inf)

    def best_of(self, region: list[Candidate]) -> list[Candidate]:
        """Of candidates that stand in each other's way, those that send the fewest
        bytes, counting the weights left as split alone: all choices tried where the
        region is small, else the cheapest for each element first."""
        region = sorted(region, key=lambda c: (c.bytes / c.elements, -c.elements))
        if len(region) > EXHAUSTIVE:
            chosen: list[Candidate] = []
            for c in region:
                if not any(c.conflicts(other) for other in chosen):
                    chosen.append(c)
            return chosen
        choices: list[list[Candidate]] = [[]]
        for c in region:
            choices += [
                [*some, c] for some in choices if not any(c.conflicts(o) for o in some)
            ]
        everything = {p for c in region for p in c.params}

        def worth(chosen: list[Candidate]) -> tuple[float, int]:
            left = everything - {p for c in chosen for p in c.params}
            sent = sum(c.bytes for c in chosen) + self.bytes_apart(left)
            return sent, -sum(c.elements for c in chosen)

        return min(choices, key=worth)

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
                continue
            sharding.params.update(way.params(name))
            if way.gathered:
                task.why[name] = way.why

    def replicated(self, name: ParamName) -> bool:
        if name in self.task.user_dims:
            return self.task.user_dims[name] is None
        return name in self.task.small


def _common_module(calls: list[Call]) -> int:
    """The id of the innermost module run that holds all the calls."""
    first, *others = [call.module for call in calls]
    return next(id(m) for m in first.chain() if all(o.within(m) for o in others))
