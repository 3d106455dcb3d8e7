"""One call on a shard: what it needs of its inputs, and what comes out."""

from collections.abc import Iterable

from ..axes.axes import Axes, Effect
from ..axes.sharding import Axis
from ..axes.split import Heads, NotSplit, Split
from ..axes.state import AVERAGED, LOST, PARTIAL, State
from ..keys import ValueId
from ..tracing.graph import Call, Node, Value
from ..utils import is_float
from .operators import linear, op_name
from .statistics import over_axis

ATTENTION = "scaled_dot_product_attention"


class Refused(Exception):
    """A call cannot work on a shard of the axis; says why."""


class _AnotherSplit(Exception):
    """One more input has to be split: what was found of the nodes before is to be found
    anew."""


class Analysis:
    """One call on a shard of one axis: which inputs must be split, which need their
    gradients summed or are added once, and what comes out; or the reason why it needs
    the whole.

    Args: `state`: of the call's inputs by id, those sharded along the axis alone.
    """

    def __init__(
        self,
        axes: Axes,
        call: Call,
        axis: Axis,
        state: dict[ValueId, State],
    ):
        self.axes, self.call, self.axis = (
            axis.axes or axes,
            call,
            axis,
        )
        self.factors = set(axis.factors)
        self.external = {v.id: v for v in call.inputs.values()}
        self.sharded = {i for i, s in state.items() if s is not None}
        self.buffers: set[ValueId] = set()  # split for the call, completed after it
        # replicated, of which each rank takes its part
        self.slices: set[ValueId] = set()
        self.sum_gradient: set[ValueId] = set()  # replicated, their gradients partial
        # key-value heads, replicated, of which each rank takes those that it attends to
        self.heads: dict[ValueId, Heads] = {}
        self.add_once: set[ValueId] = set()  # addends of a partial sum
        # the tensor on whose shard on_shard.py works instead
        self.instead: Value | None = None
        self.reason = ""
        self.out: dict[ValueId, State] = {}
        self.states: dict[ValueId, State] = {}
        # Id of an inner value -> the call's inputs that it is made from, by id.
        self.made_of: dict[ValueId, dict[ValueId, Value]] = {}

    def solve(self) -> "Analysis":
        try:
            taken = over_axis(self.call, self.axes, self.axis, self.sharded)
            if taken is not None:
                self.instead, self.slices, self.out = taken
                return self
            for _ in range(len(self.external) + 1):  # each time one more input is split
                if self.walk():
                    return self
            raise Refused("its inputs do not agree")
        except Refused as refused:
            self.reason = str(refused)
            return self

    def walk(self) -> bool:
        """One pass over the nodes; False when another input needs a split, and the pass
        must be made again."""
        self.states = {i: self.axis for i in self.sharded | self.slices}
        self.sum_gradient, self.add_once, self.instead, self.out = (
            set(),
            set(),
            None,
            {},
        )
        try:
            for node in self.call.nodes:
                self.note_sources(node)
                self.step(node)
        except _AnotherSplit:
            return False
        self.close()
        return True

    def note_sources(self, node: Node) -> None:
        inputs = {v.id for v in node.inputs}
        for v in node.outputs:
            if v.id not in inputs:
                self.made_of[v.id] = {
                    r.id: r for x in node.inputs for r in self.sources(x)
                }

    def sources(self, v: Value) -> list[Value]:
        """The call's inputs that a value is made from."""
        return (
            [v] if v.id in self.external else list(self.made_of.get(v.id, {}).values())
        )

    def step(self, node: Node) -> None:
        """The states of what one node makes."""
        operands = {v.id: v for v in node.inputs}
        states = [self.states.get(i) for i in operands]
        if PARTIAL in states or AVERAGED in states:
            self.pass_on(node, states)
        elif LOST in states:
            raise Refused(f"{op_name(node.op)} reads what has lost the axis")
        elif self.axis in states:
            self.work_on_shards(node, operands)

    def pass_on(self, node: Node, states: list[State]) -> None:
        """Of partial operands, a linear operator makes a partial result. What is no
        float adds to a sum too."""
        if len(set(states)) > 1 or not linear(node):
            raise Refused("a partial sum is used within")
        self.states.update((v.id, states[0]) for v in node.outputs)

    def work_on_shards(self, node: Node, operands: dict[ValueId, Value]) -> None:
        name, effect = op_name(node.op), self.axes.effect(node)
        for i in operands:
            if (
                self.states.get(i) is self.axis
                and effect.unsharded.get(i, set()) & self.factors
            ):
                raise Refused(f"{name} needs the whole dim")
        summed = self.sums_over_axis(name, effect)
        splits = [self.axis.find(self.axes, v) for v in node.outputs]
        if summed:
            made = self.sum_of_shards(name, effect, splits)
        elif name.startswith("new_") and splits[0] is NotSplit.ABSENT:
            return  # it reads no values
        elif not splits or not splits[0]:
            raise Refused(f"{name} loses the axis")
        else:
            made = [self.axis if split else LOST for split in splits]
        self.take_operands(node, operands.values(), effect, summed)
        if summed and effect.lookup:
            self.look_up(node)
        self.states.update((v.id, state) for v, state in zip(node.outputs, made))

    def sum_of_shards(
        self, name: str, effect: Effect, splits: list[Split | NotSplit]
    ) -> list[State]:
        """What a node makes that sums over the axis."""
        if any(split is not NotSplit.ABSENT for split in splits):
            raise Refused(f"{name} has the axis twice")
        return [AVERAGED if effect.mean else PARTIAL] * len(splits)

    def sums_over_axis(self, name: str, effect: Effect) -> bool:
        summed = effect.contract & self.factors
        if summed and summed != self.factors:
            raise Refused(f"{name} sums over a part of the axis")
        return bool(summed)

    def take_operands(
        self, node: Node, operands: Iterable[Value], effect: Effect, summed: bool
    ) -> None:
        """What the operands need that are replicated, for the node to work on
        shards."""
        found = len(self.slices)
        for v in operands:
            if self.states.get(v.id) is not None:
                continue
            split = self.axis.find(self.axes, v)
            if heads := self.grouped_heads(v):
                self.heads[v.id] = heads
            elif split is NotSplit.IN_PART:
                raise Refused(f"{op_name(node.op)} has a part of the axis")
            elif split:
                self.slice_source(node, v)
            elif is_float(v) and summed:
                self.count_once(node, v, effect)
            elif is_float(v):
                self.take_whole(node, v)
        if len(self.slices) > found:
            raise _AnotherSplit

    def slice_source(self, node: Node, v: Value) -> None:
        """An operand that has the axis: each rank takes its part of the input that it
        is made from."""
        sources = self.sources(v)
        carrying = [r for r in sources if self.axis.find(self.axes, r)]
        if len(sources) != 1 or len(carrying) != 1:
            raise Refused(f"{op_name(node.op)} makes the axis anew")
        (source,) = sources
        written = any(source.id in n.mutated for n in self.call.nodes)
        if written and source.producer is None and not source.trainable:
            self.buffers.add(source.id)
        self.slices.add(source.id)

    def grouped_heads(self, v: Value) -> Heads | None:
        """How key-value heads lie in an input of an attention, where each is one to
        several of the query heads that are the axis."""
        attends = self.call.name == ATTENTION
        if not attends or v.id not in self.external or len(v.shape) < 3:
            return None
        dim = len(v.shape) - 3
        heads, of_axis = tuple(self.axes.final(v)[dim]), self.axis.factors
        if not heads or heads == of_axis or heads != of_axis[: len(heads)]:
            return None
        return Heads(dim, v.shape[dim], self.axis.units)

    def count_once(self, node: Node, v: Value, effect: Effect) -> None:
        """An operand without the axis, of a node that sums over it: it must be an
        addend."""
        if effect.bias != v.id or v.id not in self.external:
            raise Refused(f"{op_name(node.op)} adds to a partial sum")
        self.add_once.add(v.id)

    def take_whole(self, node: Node, v: Value) -> None:
        """An operand without the axis that meets shards: its gradient will be
        partial."""
        if v.id in node.mutated:
            raise Refused("a replicated tensor is written to in place")
        self.sum_gradient |= {r.id for r in self.sources(v) if r.trainable}

    def look_up(self, node: Node) -> None:
        table = node.inputs[0]
        all_rows = self.axis.find(self.axes, table) == self.axis.all_units
        if self.call.name != "embedding" or not all_rows:
            raise Refused("it looks rows up otherwise than F.embedding in all rows")
        self.instead = table

    def made(self) -> list[Value]:
        """What the call makes or writes to."""
        new = [v for v in self.call.outputs.values() if v.id not in self.external]
        return new + [
            v for node in self.call.nodes if node.mutated for v in node.outputs
        ]

    def close(self) -> None:
        """The states of what the call makes or writes to."""
        for v in self.made():
            is_buffer = v.memory.id in self.buffers  # completed after the call
            state = None if is_buffer else self.states.get(v.id)
            if state is LOST:
                raise Refused("an output loses the axis")
            if state is None and v.trainable and (self.sum_gradient or self.add_once):
                raise Refused("it mixes sharded and replicated results")
            self.out[v.id] = state
        if self.sum_gradient & self.add_once:
            raise Refused("an input is used in two ways")
        if self.call.name == "dropout":
            self.instead = self.call.inputs.get((0, 0))
            if self.instead is None:
                raise Refused("its input is not its first argument")
        elif self.axis.balanced and self.call.name == ATTENTION:
            self.instead = next(v for v in self.made() if self.out[v.id])
