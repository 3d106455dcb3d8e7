"""Weights that no axis of the model takes: the cheapest way to split each by itself."""

from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from ..axes.axes import lone_axis, own_axis
from ..axes.sharding import Axis, LayoutError, ShardedParam, Sharding
from ..axes.split import NotSplit
from ..keys import CallIndex, ParamName
from ..tracing.graph import Call
from .cost import Change, change_by, change_by_gather
from .lay_out import lay_out
from .layout import Layout
from .task import CROWDED, Task


@dataclass
class Way:
    """One weight split by itself. `gathered`: it is gathered before its use; else
    `partners` (biases) are split with it. `change`: against the whole weight on every
    rank."""

    dim: int
    axis: Axis | None
    change: Change
    gathered: bool = True
    partners: list[ParamName] = field(default_factory=list)
    why: str = ""

    def params(self, name: ParamName) -> dict[ParamName, ShardedParam]:
        """The weight of this name and its partners, sharded."""
        assert self.axis is not None, f"{name} cannot be split"
        shard = ShardedParam(self.dim, self.axis, gathered=self.gathered)
        bias = ShardedParam(0, self.axis)
        return {name: shard, **dict.fromkeys(self.partners, bias)}


class Alone:
    """The ways to split weights by themselves."""

    def __init__(self, task: Task):
        self.task = task
        self._best: dict[ParamName, Way] = {}

    def best(self, name: ParamName, taken: Container[ParamName] = ()) -> Way:
        """The cheapest Way; biases in `taken` are split otherwise already."""
        if taken or name not in self._best:
            shape = self.task.params[name].shape
            dims = [d for d, size in enumerate(shape) if size >= self.task.n]
            ways = [
                self.way(name, d, taken) for d in dims if self.task.may_split(name, d)
            ]
            none = Way(0, None, Change())
            best = min(ways, key=_seconds, default=none)
            if taken:
                return best
            self._best[name] = best
        return self._best[name]

    def gathered(self, name: ParamName, dim: int) -> Way:
        """To split a weight on one dim, and to gather it before its use."""
        v = self.task.params[name]
        return Way(dim, lone_axis(v.shape[dim]), change_by_gather(v, self.task.work))

    def way(self, name: ParamName, dim: int, taken: Container[ParamName]) -> Way:
        """To split a weight on one dim: computing on shards where that can be laid out
        and takes less, else gathered."""
        task, v = self.task, self.task.params[name]
        calls = task.users.get(name, [])
        gathered = self.gathered(name, dim)
        if not calls or sum(len(call.inputs) for call in calls) > CROWDED:
            return gathered
        axis = own_axis(task.graph, name, dim)
        if self.depends_on_inputs(name, dim, axis) or not axis.find(task.axes, v):
            return gathered
        way = Way(dim, axis, Change(), False, self.biases(axis, calls, taken))
        try:
            layout = self.lay_out(name, way)
        except LayoutError as e:
            gathered.why = str(e)
            return gathered
        if task.gathered_weights(layout):
            gathered.why = str(layout.blockers[0])
            return gathered
        way.change = change_by(task.graph, layout, task.work)
        if way.change.seconds > gathered.change.seconds:
            gathered.why = "split, it would take longer"
            return gathered
        return way

    def depends_on_inputs(self, name: ParamName, dim: int, axis: Axis) -> bool:
        """Whether it is a table of positions, of which another input takes other
        rows."""
        if dim not in self.task.cut_by_numbers.get(name, ()):
            return False
        inputs = self.task.graph.modules[0].inputs.values()
        return any(axis.find(self.task.axes, x) is not NotSplit.ABSENT for x in inputs)

    def biases(
        self, axis: Axis, calls: Iterable[Call], taken: Container[ParamName]
    ) -> list[ParamName]:
        """What is read by these calls alone, and has the axis as its one dim."""
        found = {}
        for x in (x for call in calls for x in call.inputs.values()):
            if not x.param or len(x.shape) != 1:
                continue
            if x.param in taken or x.param in self.task.user_dims:
                continue
            split = axis.find(self.task.axes, x)
            mine_alone = indices(self.task.users[x.param]) <= indices(calls)
            if mine_alone and split and split.blocks == 1:
                found[x.param] = True
        return list(found)

    def lay_out(self, name: ParamName, way: Way) -> Layout:
        sharding = Sharding(way.params(name), loss_parallel=self.task.loss_parallel)
        return lay_out(self.task.graph, self.task.axes, sharding, self.task.users[name])


def indices(calls: Iterable[Call]) -> set[CallIndex]:
    return {call.index for call in calls}


def _seconds(way: Way) -> tuple[float, bool]:
    return way.change.seconds, way.gathered
