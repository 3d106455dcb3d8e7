"""Given which axes are sharded: the state of every tensor, and the collectives that make every call
right.

Gradients follow by one rule: the gradient of a tensor sums over every axis it does not have. So a
replicated tensor that enters a call which works on a shard gets a partial gradient there, and the
action `enter` (identity forward, all-reduce backward) sums it.
"""

from dataclasses import dataclass, field
from itertools import combinations
from math import prod

from ..axes.action import (
    ADD_ONCE,
    EXCHANGE,
    GATHER,
    MEAN,
    SPLIT,
    SUM,
    SUM_GRADIENT,
    TO_DTENSOR,
    Action,
    OnShard,
)
from ..axes.sharding import AVERAGED, PARTIAL, Axis, LayoutError
from ..utils import is_float
from .analysis import FIRST, Analysis, linear, op_name


@dataclass
class Layout:
    """What `lay_out` found. `uses[(call index, path)]`, `values[value id]` and `root[path]` are the
    actions on an argument of a call, on a value where it is made, and on an output of the model."""

    uses: dict = field(default_factory=dict)
    values: dict = field(default_factory=dict)
    root: dict = field(default_factory=dict)
    states: dict = field(default_factory=dict)  # value id -> state as its call makes it
    # Call index -> OnShard: what on_shard.py runs in its place.
    instead: dict = field(default_factory=dict)
    # Call index -> {path: Action}: buffers that the call updates, on its part of them.
    kept: dict = field(default_factory=dict)
    axis_of: dict = field(default_factory=dict)  # call index -> Axis that it works on a shard of
    blockers: list = field(default_factory=list)  # calls that needed something gathered
    dear: dict = field(
        default_factory=dict
    )  # (module path, call's name, line) -> whether it is dearer on shards
    # Path of an object that keeps tensors -> {place: Action} of those that are shards.
    shards: dict = field(default_factory=dict)


def lay_out(graph, axes, sharding, calls=None):
    """Walk the calls in order (all, or some whose other values are replicated). Returns Layout;
    raises LayoutError."""
    return _Pass(graph, axes, sharding).run(graph.calls if calls is None else calls)


class _Pass:
    def __init__(self, graph, axes, sharding):
        self.graph, self.axes, self.sharding = graph, axes, sharding
        self.layout = Layout()
        self.now = {}  # value id -> state after the actions on it
        self.pending = {}  # value id -> Partial value, not yet summed or passed on
        self.use_count = graph.use_count
        self.gathered = set()  # ids of weights that are gathered before their use
        for name, param in sharding.params.items():
            if name in graph.params:
                self.now[graph.params[name].id] = param.axis
                self.start(name, param)
        for i, action in graph.given.items():
            self.now[i] = self.layout.states[i] = self.given_axis(graph.values[i], action)

    def start(self, name, param):
        """Check that a sharded parameter is stored as its axis needs it."""
        v = self.graph.params[name]
        if param.gathered:
            self.gathered.add(v.id)
        elif not param.exchanged:
            split = param.axis.find(self.axes, v)
            if not split or (split.dim, split.blocks) != (param.dim, param.blocks):
                reason = f"{name} lies otherwise in memory than its axis does in it"
                raise LayoutError(reason, axis=param.axis)

    def exchanged(self, v):
        """Whether a value is a weight whose rows are exchanged before its use."""
        return v.param in self.sharding.params and self.sharding.params[v.param].exchanged

    def run(self, calls):
        for call in calls:
            if call.nodes or call.opaque:
                self.step(call)
        for path, v in self.graph.outputs.items():
            state = self.now.get(v.id)
            if state is not None and state is not PARTIAL:
                split = self.split(v, state)
                whole = [Action(GATHER, split)]
                on_last_dim = split.dim == len(v.shape) - 1 and split.blocks == 1
                if self.sharding.loss_parallel and on_last_dim:
                    self.layout.root[path] = [Action(TO_DTENSOR, split)]
                elif (
                    self.use_count[v.id] == 1
                    and v.producer is not None
                    and v.id not in self.graph.made_in_place
                ):
                    self.layout.values[v.id] = whole
                else:
                    self.layout.root[path] = whole
        for v in self.graph.stored:
            if self.layout.states.get(v.id) is not None:
                call = self.graph.calls[v.producer]
                raise LayoutError(
                    "something keeps what would be a shard",
                    call,
                    self.layout.axis_of.get(call.index),
                )
        for v in self.graph.seen.values():
            if self.now.get(v.id) not in (None, PARTIAL) and v.id not in self.gathered:
                raise LayoutError("a hook sees what would be a shard", axis=self.now[v.id])
        for v in list(self.pending.values()):
            self.sum_value(v)
        for path, place, v in self.graph.held:
            at, state = self.layout.shards.setdefault(path, {}), v and self.now.get(v.id)
            if state is not None:
                at[place] = self.action(GATHER, v, state)
        return self.layout

    def given_axis(self, v, action):
        """The axis of a shard that was kept from an earlier call."""
        split = action.split
        factors = self.axes.final(v)[split.dim]
        for i, j in combinations(range(len(factors) + 1), 2):
            outer, units = prod(f.size for f in factors[:i]), prod(f.size for f in factors[i:j])
            if (outer, units) == (split.blocks, split.units):
                return Axis(tuple(factors[i:j]))
        raise LayoutError(
            f"a shard kept from an earlier call, of shape {v.shape}, is used in another way than"
            " there"
        )

    def action(self, kind, value, axis):
        return Action(kind, self.split(value, axis))

    def split(self, value, axis):
        """How a value is split along an axis that it has."""
        split = axis.find(self.axes, value)
        if split.blocks not in (1, None) and not (axis.axes or self.axes).steady_within(
            value, split.dim, axis.factors[-1]
        ):
            raise LayoutError("where the axis lies depends on sizes that may vary", axis=axis)
        return split

    def weight_gather(self, v):
        return Action(GATHER, self.sharding.params[v.param].split(v.shape))

    def sum_value(self, v):
        self.pending.pop(v.id, None)
        self.layout.values.setdefault(v.id, []).append(Action(SUM))
        self.now[v.id] = None

    def step(self, call):
        inputs = {v.id: v for v in call.inputs.values()}
        state = {i: self.now.get(i) for i in inputs}
        for path, v in call.inputs.items():
            if v.id in self.gathered and state[v.id] is not None:
                self.use(call, path, self.weight_gather(v))
            elif self.exchanged(v):
                self.use(call, path, self.action(EXCHANGE, v, state[v.id]))
        state = {i: None if i in self.gathered else s for i, s in state.items()}
        active = [s for s in dict.fromkeys(state.values()) if s is not None and s is not PARTIAL]
        partial = [inputs[i] for i, s in state.items() if s is PARTIAL]
        if partial:
            scales = None if active else self.defers(call, state, inputs)
            if scales is not None:
                for v in partial:
                    self.pending.pop(v.id, None)
                for path in scales:
                    self.use(call, path, Action(SUM_GRADIENT))
                return self.outputs(call, {v.id: PARTIAL for v in call.outputs.values()})
            for v in partial:
                self.sum_value(v)
                state[v.id] = None
        if not active:
            return
        if call.opaque:
            raise LayoutError(call.opaque, call, active[0])
        for axis in sorted(
            active, key=lambda a: -size(inputs[i] for i, s in state.items() if s == a)
        ):
            given = {
                i: s if s == axis else None for i, s in state.items()
            }  # the others are gathered
            effect = Analysis(self.axes, call, axis, given, self.sharding.through).solve()
            reason = effect.reason or self.dearer(call, effect, inputs, given)
            if not reason:
                break
            self.layout.blockers.append((call, reason))
        for path, v in call.inputs.items():
            if state[v.id] in active and (reason or state[v.id] != axis):
                if self.exchanged(v):  # gathered as it is stored, instead
                    self.layout.uses[call.index, path] = [self.weight_gather(v)]
                else:
                    self.use(call, path, self.action(GATHER, v, state[v.id]))
        if reason:
            return
        self.layout.axis_of[call.index] = axis
        for path, v in call.inputs.items():
            if v.id in effect.kept:
                self.layout.kept.setdefault(call.index, {})[path] = self.action(SPLIT, v, axis)
            elif v.id in effect.slices:
                self.use(call, path, self.action(SPLIT, v, axis))
            elif v.id in effect.once:
                self.use(call, path, Action(ADD_ONCE))
            elif v.id in effect.enter:
                self.use(call, path, Action(SUM_GRADIENT))
        if effect.instead is not None:
            self.layout.instead[call.index] = OnShard(call.name, self.split(effect.instead, axis))
        self.outputs(call, effect.out)

    def use(self, call, path, action):
        """An action on an argument. The call gets another tensor, so a write that comes later would
        miss the model's."""
        v = call.inputs[path]
        if self.graph.last_write.get(v.memory.id, -1) >= call.index:
            axis = self.now.get(v.id) or self.layout.axis_of.get(call.index)
            raise LayoutError("a tensor is written to in place", call, axis)
        self.layout.uses.setdefault((call.index, path), []).append(action)

    def dearer(self, call, effect, inputs, given):
        """Why a call is not worth running on shards, though it could: what it needs split is larger
        than they are. One line of code is decided once, and as on the path that a forward leaves,
        which what ran must be the same on."""
        shards = [inputs[i] for i, s in given.items() if s is not None]
        split = [inputs[i] for i in effect.slices if inputs[i].differentiable]
        if any(v.param for v in shards) or not split:
            return ""
        key = call.module.path, call.name, call.source
        dear = self.sharding.dear.get(key, self.layout.dear.get(key, size(split) > size(shards)))
        self.layout.dear[key] = dear
        return "its other inputs are larger than its shards" if dear else ""

    def defers(self, call, state, inputs):
        """Whether the call can run on partial results and its output be summed instead: the paths
        of the replicated factors that it scales them by (small ones: their gradients are partial),
        or None."""
        if (
            call.opaque
            or not self.graph.numbered(call, call.module)
            or any(
                s is PARTIAL and (self.use_count.get(i) != 1 or i in self.graph.seen)
                for i, s in state.items()
            )
        ):
            return None
        summed, scales = {i for i, s in state.items() if s is PARTIAL}, set()
        for node in call.nodes:
            ins = {v.id: v for v in node.inputs}
            mine = [v for i, v in ins.items() if i in summed]
            others = {i: v for i, v in ins.items() if i not in summed}
            factors = {i: v for i, v in others.items() if is_float(v)}
            if len(mine) == 1 and (
                op_name(node.op) == "mul" or op_name(node.op) in FIRST and node.inputs[0] is mine[0]
            ):
                if any(
                    v.nbytes * 4 > mine[0].nbytes or i not in inputs for i, v in factors.items()
                ):
                    return None
                out = node.outputs[0]
                if out.dtype.itemsize < mine[0].dtype.itemsize:
                    return None  # sums in the better precision
                if not is_float(out) or node.kwargs.get("rounding_mode"):
                    return None  # what is rounded is no longer linear
                scales |= factors.keys()
            elif not mine or others or not linear(node):  # an addend that is no float adds up, too
                return None
            summed |= {v.id for v in node.outputs}
        return [p for p, v in call.inputs.items() if v.id in scales and v.trainable]

    def outputs(self, call, states):
        mine = {v.id for v in call.inputs.values()}
        made = {v.id: v for v in call.outputs.values() if v.id not in mine}
        for node in call.nodes:  # what was written to in place is made anew without being returned
            if node.mutated:
                made.update({v.id: v for v in node.outputs if v.id in states and v.memory is not v})
        for v in made.values():
            state = states.get(v.id)
            self.layout.states[v.id] = state
            if state is PARTIAL:
                self.pending[v.id] = v
            if state is AVERAGED:
                self.layout.values.setdefault(v.id, []).append(Action(MEAN))
                self.now[v.id] = None
            elif (
                state is None
                or state is PARTIAL
                or state in self.sharding.through
                or v.id in self.graph.made_of
            ):
                self.now[v.id] = state
            else:  # a weight's own axis ends here
                self.layout.values.setdefault(v.id, []).append(self.action(GATHER, v, state))
                self.now[v.id] = None


def size(values):
    return sum(v.nbytes for v in values)
