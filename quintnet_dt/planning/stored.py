"""How what a forward is given is stored: sharded weights, and shards from earlier
calls."""

from itertools import combinations
from math import prod

from ..axes.action import GATHER, Action
from ..axes.axes import Axes
from ..axes.sharding import Axis, LayoutError, ShardedParam, Sharding
from ..keys import ParamName, ValueId
from ..tracing.graph import Graph, Value


class Stored:
    """The sharded parameters of a graph. `gathered`: the values that are gathered
    before their use. Raises LayoutError where one is stored otherwise than its axis
    needs it."""

    def __init__(self, graph: Graph, axes: Axes, sharding: Sharding):
        self.graph, self.axes, self.params = graph, axes, sharding.params
        self.gathered: set[ValueId] = set()
        for name, param in sharding.params.items():
            if name in graph.params:
                self.start(name, param)

    def start(self, name: ParamName, param: ShardedParam) -> None:
        """Check that a parameter is stored as its axis needs it."""
        v = self.graph.params[name]
        if param.gathered:
            self.gathered.add(v.id)
        elif not param.exchanged:
            split = param.axis.find(self.axes, v)
            if not split or (split.dim, split.blocks) != (param.dim, param.blocks):
                reason = f"{name} lies otherwise in memory than its axis does in it"
                raise LayoutError(reason, axis=param.axis)

    def exchanged(self, v: Value) -> bool:
        """Whether a value is a weight whose rows are exchanged before its use."""
        return v.param in self.params and self.params[v.param].exchanged

    def axis(self, v: Value) -> Axis:
        """The axis that a weight is sharded along."""
        return self.params[v.param].axis

    def gather(self, v: Value) -> Action:
        """The gather of a weight as it is stored."""
        return Action(GATHER, self.params[v.param].split(v.shape))


def given_axis(v: Value, action: Action, axes: Axes) -> Axis:
    """The axis of a shard that was kept from an earlier call."""
    split = action.split
    factors = axes.final(v)[split.dim]
    for i, j in combinations(range(len(factors) + 1), 2):
        outer, units = prod(f.size for f in factors[:i]), prod(
            f.size for f in factors[i:j]
        )
        if (outer, units) == (split.blocks, split.units):
            return Axis(tuple(factors[i:j]), balanced=split.balanced)
    raise LayoutError(
        f"a shard kept from an earlier call, of shape {v.shape}, is used in another way"
        " than there"
    )
