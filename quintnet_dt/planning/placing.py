"""What a walk over the calls does with values: single actions, at a use of a value or where
it is made."""

from ..axes.action import SUM, Action
from ..axes.axes import Axes
from ..axes.sharding import Axis, LayoutError, Sharding
from ..axes.split import Split
from ..axes.state import State
from ..keys import ArgPath, ValueId
from ..tracing.graph import Call, Graph, Value
from ..tracing.hidden import OPAQUE
from .layout import Layout
from .stored import Stored, given_axis


class Placing:
    """The states of values so far, and the layout that is made."""

    def __init__(self, graph: Graph, axes: Axes, sharding: Sharding):
        self.graph, self.axes, self.sharding = graph, axes, sharding
        self.layout = Layout()
        self.now: dict[ValueId, State] = {}  # after the actions on a value
        # partial values, not yet summed or passed on
        self.pending: dict[ValueId, Value] = {}
        self.summed_over: dict[ValueId, Axis] = {}  # the axes of partial values
        self.stored = Stored(graph, axes, sharding)
        for name, param in sharding.params.items():
            if name in graph.params:
                self.now[graph.params[name].id] = param.axis
        for i, action in graph.shards_given.items():
            self.now[i] = self.layout.states[i] = given_axis(
                graph.values[i], action, axes
            )

    def action(self, kind: str, value: Value, axis: Axis) -> Action:
        return Action(kind, self.split(value, axis))

    def split(self, value: Value, axis: Axis) -> Split:
        """How a value is split along an axis that it has."""
        split = axis.split_of(self.axes, value)
        if split.blocks not in (1, None) and not (axis.axes or self.axes).steady_within(
            value, split.dim, axis.factors[-1]
        ):
            raise LayoutError(
                "where the axis lies depends on sizes that may vary", axis=axis
            )
        return split

    def made_by(self, v: Value) -> Call:
        """The call that makes a value which is to be completed there. That may not lie
        within a forward with a backward of its own, which would not know of it."""
        call = self.graph.calls[v.producer]
        if call.own_backward:
            raise LayoutError(OPAQUE, call, self.layout.axis_of.get(call.index))
        return call

    def sum_value(self, v: Value) -> None:
        self.made_by(v)
        self.pending.pop(v.id, None)
        self.layout.values.setdefault(v.id, []).append(Action(SUM))
        self.now[v.id] = None

    def use(self, call: Call, path: ArgPath, action: Action) -> None:
        """An action on an argument. The call gets another tensor, so a write that comes
        later would miss the model's."""
        v = call.inputs[path]
        state = self.now.get(v.id)
        axis = state if isinstance(state, Axis) else self.layout.axis_of.get(call.index)
        if call.own_backward:
            raise LayoutError(OPAQUE, call, axis)
        if self.graph.last_write.get(v.memory.id, -1) >= call.index:
            raise LayoutError("a tensor is written to in place", call, axis)
        self.layout.uses.setdefault((call.index, path), []).append(action)

    def complete(self, v: Value, action: Action) -> None:
        self.made_by(v)
        self.layout.values.setdefault(v.id, []).append(action)
        self.now[v.id] = None
