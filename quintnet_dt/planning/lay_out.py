"""Given which axes are sharded: the state of every tensor, and the collectives that
make every call right.

Gradients follow by one rule: the gradient of a tensor sums over every axis it does not
have. So a replicated tensor that enters a call which works on a shard gets a partial
gradient there, and the action SUM_GRADIENT (identity forward, all-reduce backward) sums
it.
"""

from collections.abc import Iterable

from ..axes.action import (
    ADD_ONCE,
    EXCHANGE,
    GATHER,
    MEAN,
    SPLIT,
    SUM_GRADIENT,
    TAKE_HEADS,
    TO_DTENSOR,
    Action,
    OnShard,
)
from ..axes.axes import Axes
from ..axes.sharding import Axis, LayoutError, Sharding
from ..axes.state import AVERAGED, PARTIAL, State
from ..keys import ArgPath, ValueId
from ..tracing.graph import Call, Graph, Value
from .analysis import Analysis
from .deferral import deferred
from .layout import Blocker, Layout
from .placing import Placing
from .worth import dearer, size


def lay_out(
    graph: Graph, axes: Axes, sharding: Sharding, calls: Iterable[Call] | None = None
) -> Layout:
    """Walk the calls in order (all, or some whose other values are replicated). Raises
    LayoutError."""
    return _Pass(graph, axes, sharding).run(graph.calls if calls is None else calls)


class _Pass(Placing):
    """One walk over the calls of a graph."""

    def run(self, calls: Iterable[Call]) -> Layout:
        calls = list(calls)
        for call in calls:
            if call.nodes or call.why_whole:
                self.step(call)
        if len(calls) < len(self.graph.calls):
            self.follow_sums()
        for path, v in self.graph.outputs.items():
            self.complete_output(path, v)
        self.check_what_is_seen()
        for v in list(self.pending.values()):
            self.sum_value(v)
        for path, place, v in self.graph.in_objects:
            shards = self.layout.shards.setdefault(path, {})
            state = None if v is None else self.now.get(v.id)
            if v is not None and isinstance(state, Axis):
                shards[place] = self.action(GATHER, v, state)
        return self.layout

    def follow_sums(self) -> None:
        """Of a walk over some calls: let sums wait in those that follow, as they would
        in a walk over all."""
        waiting = list(self.pending)
        while waiting:
            i = waiting.pop()
            readers = self.graph.readers.get(i, [])
            if i not in self.pending or len(readers) != 1:
                continue
            before = set(self.pending)
            ((reader, _),) = readers
            self.step(reader)
            waiting += self.pending.keys() - before

    def complete_output(self, path: ArgPath, v: Value) -> None:
        """Gather an output of the model that is a shard: where it is made, if only the
        user reads it."""
        state = self.now.get(v.id)
        if not isinstance(state, Axis):
            return
        split = self.split(v, state)
        on_last_dim = split.dim == len(v.shape) - 1 and split.blocks == 1
        if self.sharding.loss_parallel and on_last_dim:
            self.layout.root[path] = [Action(TO_DTENSOR, split)]
            return
        read_once = self.graph.use_count[v.id] == 1 and v.producer is not None
        within = read_once and self.graph.calls[v.producer].own_backward
        if read_once and not within and v.id not in self.graph.made_in_place:
            self.layout.values[v.id] = [Action(GATHER, split)]
        else:
            self.layout.root[path] = [Action(GATHER, split)]

    def check_what_is_seen(self) -> None:
        """No shard may be kept by a module, or be given to a hook of the user's."""
        for v in self.graph.left_in_modules:
            if self.layout.states.get(v.id) is not None:
                call = self.graph.calls[v.producer]
                axis = self.layout.axis_of.get(call.index)
                raise LayoutError("something keeps what would be a shard", call, axis)
        for v in self.graph.seen_by_hooks.values():
            state = self.now.get(v.id)
            if isinstance(state, Axis) and v.id not in self.stored.gathered:
                raise LayoutError("a hook sees what would be a shard", axis=state)

    # One call.

    def step(self, call: Call) -> None:
        inputs = {v.id: v for v in call.inputs.values()}
        state = {i: self.now.get(i) for i in inputs}
        self.take_weights(call, state)
        active = [s for s in dict.fromkeys(state.values()) if isinstance(s, Axis)]
        if PARTIAL in state.values():
            if not active and self.defer(call, state):
                return
            for i in [i for i, s in state.items() if s is PARTIAL]:
                self.sum_value(inputs[i])
                state[i] = None
        if active:
            self.step_on_shards(call, inputs, state, active)

    def take_weights(self, call: Call, state: dict[ValueId, State]) -> None:
        """Weights that are stored otherwise than the call needs them."""
        for path, v in call.inputs.items():
            if v.id in self.stored.gathered:
                if self.now.get(v.id) is not None:
                    self.use(call, path, self.stored.gather(v))
                state[v.id] = None
            elif self.stored.exchanged(v):
                self.use(call, path, self.action(EXCHANGE, v, self.stored.axis(v)))

    def defer(self, call: Call, state: dict[ValueId, State]) -> bool:
        """Let a call run on partial results, and its output be summed instead, where it
        can."""
        partial = {i for i, s in state.items() if s is PARTIAL}
        waits = deferred(self.graph, call, partial)
        if waits is None:
            return False
        for i in partial:
            self.pending.pop(i, None)
        axis = self.summed_over[min(partial)]
        for path in waits.factors:
            self.use(call, path, Action(SUM_GRADIENT))
        for path in waits.addends:
            self.use(call, path, Action(ADD_ONCE, axis.all_units))
        self.take_outputs(call, {v.id: PARTIAL for v in call.outputs.values()}, axis)
        return True

    def step_on_shards(
        self,
        call: Call,
        inputs: dict[ValueId, Value],
        state: dict[ValueId, State],
        active: list[Axis],
    ) -> None:
        """Let the call work on shards of the axis of most of its inputs' bytes that it
        can; gather the others."""
        if call.why_whole:
            raise LayoutError(call.why_whole, call, active[0])

        def weight(axis: Axis) -> int:
            return size(inputs[i] for i, s in state.items() if s == axis)

        chosen = None
        for axis in sorted(active, key=weight, reverse=True):
            along: dict[ValueId, State] = {
                i: s if s == axis else None for i, s in state.items()
            }
            analysis = Analysis(self.axes, call, axis, along).solve()
            reason = analysis.reason or dearer(
                call, analysis, along, self.sharding.dear, self.layout.dear
            )
            if not reason:
                chosen = analysis
                break
            self.layout.blockers.append(Blocker(call, reason))
        self.gather_others(call, state, None if chosen is None else chosen.axis)
        if chosen is not None:
            self.work(call, chosen)

    def gather_others(
        self, call: Call, state: dict[ValueId, State], axis: Axis | None
    ) -> None:
        """Gather the inputs that are shards of other axes than the one that the call
        works on."""
        for path, v in call.inputs.items():
            other = state[v.id]
            if not isinstance(other, Axis) or other == axis:
                continue
            # gathered as it is stored, in place of the exchange
            if self.stored.exchanged(v):
                self.layout.uses[call.index, path] = [self.stored.gather(v)]
            else:
                self.use(call, path, self.action(GATHER, v, other))

    def work(self, call: Call, analysis: Analysis) -> None:
        """Let a call work on shards, as the analysis has found that it can."""
        axis = analysis.axis
        self.layout.axis_of[call.index] = axis
        for path, v in call.inputs.items():
            if v.id in analysis.buffers:
                at = self.layout.buffers.setdefault(call.index, {})
                at[path] = self.action(SPLIT, v, axis)
            elif v.id in analysis.heads:
                self.use(call, path, Action(TAKE_HEADS, analysis.heads[v.id]))
            elif v.id in analysis.slices:
                self.use(call, path, self.action(SPLIT, v, axis))
            elif v.id in analysis.add_once:
                self.use(call, path, Action(ADD_ONCE, axis.all_units))
            elif v.id in analysis.sum_gradient:
                self.use(call, path, Action(SUM_GRADIENT))
        if analysis.instead is not None:
            split = self.split(analysis.instead, axis)
            self.layout.instead[call.index] = OnShard(call.name, split)
        self.take_outputs(call, analysis.out, axis)

    def take_outputs(
        self, call: Call, states: dict[ValueId, State], axis: Axis
    ) -> None:
        """What a call makes, and what is done where it is made."""
        inputs = {v.id for v in call.inputs.values()}
        made = {v.id: v for v in call.outputs.values() if v.id not in inputs}
        for (
            node
        ) in (
            call.nodes
        ):  # what was written to in place is made anew without being returned
            if node.mutated:
                made.update(
                    {
                        v.id: v
                        for v in node.outputs
                        if v.id in states and v.memory is not v
                    }
                )
        for v in made.values():
            state = self.layout.states[v.id] = states.get(v.id)
            self.now[v.id] = state
            if state is PARTIAL:
                self.pending[v.id], self.summed_over[v.id] = v, axis
            elif state is AVERAGED:
                self.complete(v, Action(MEAN, axis.all_units))
            elif isinstance(state, Axis) and not self.goes_on(v, state):
                self.complete(v, self.action(GATHER, v, state))

    def goes_on(self, v: Value, axis: Axis) -> bool:
        """Whether a value stays a shard beyond the call that makes it: a weight's own
        axis ends with what is made of weights."""
        return axis in self.sharding.through or v.id in self.graph.made_of
