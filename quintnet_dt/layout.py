"""Given which axes are sharded: the state of every tensor, and the collectives that make every call right.

The states of a tensor, seen from one rank: *replicated* (None), *sharded* (the Axis it is a shard of), or `PARTIAL` (the ranks' tensors sum to it).
Gradients follow by one rule: the gradient of a tensor sums over every axis it does not have. So a replicated tensor that enters a call which works on a shard
gets a partial gradient there, and the action `enter` (identity forward, all-reduce backward) sums it.
"""

from dataclasses import dataclass, field
from math import prod

PARTIAL = "partial"

LINEAR = set(
    "view _unsafe_view reshape t transpose permute unsqueeze squeeze clone alias detach expand add sub neg slice select".split()
)
ADDITIVE = {"add", "sub"}  # only where both are tensors: P + 1 is not the sum of the ranks' (P_r + 1)


class LayoutError(Exception):
    """The sharding of an axis cannot be carried through a call."""

    def __init__(self, reason, call=None, axis=None):
        super().__init__(f"{reason}{f': {call}' if call else ''}")
        self.reason, self.call, self.axis = reason, call, axis


@dataclass(frozen=True)
class Axis:
    """An axis that is sharded: adjacent leaf factors, outermost first; one for an axis of the model, a whole dim's for a weight's own."""

    factors: tuple

    @property
    def size(self):
        return prod(f.size for f in self.factors)

    def find(self, axes, value):
        """(dim, outer, inner) of the axis in a value; None where it has none of it; False where it has a part of it or has it twice."""
        found = None
        mine = set(self.factors)
        for i, dim in enumerate(axes.final(value)):
            j, n = 0, len(self.factors)
            while j < len(dim):
                if tuple(dim[j : j + n]) == self.factors:
                    if found is not None:
                        return False
                    found = (i, prod(f.size for f in dim[:j]), prod(f.size for f in dim[j + n :]))
                    j += n
                elif dim[j] in mine:
                    return False
                else:
                    j += 1
        return found


@dataclass(frozen=True)
class Action:
    """One collective on one tensor: `enter`, `sum`, `gather`, `split`, `once`. A sharded dim is outer x `units` x `inner`."""

    kind: str
    dim: int = 0
    units: int = 0
    inner: int = 1
    outer: int = 1


@dataclass
class Layout:
    """What `lay_out` found. `uses[(call index, path)]`, `values[value id]` and `root[path]` are the actions on an argument of a call, on
    a value where it is made, and on an output of the model."""

    uses: dict = field(default_factory=dict)
    values: dict = field(default_factory=dict)
    root: dict = field(default_factory=dict)
    states: dict = field(default_factory=dict)  # value id -> state as its call makes it
    lookups: dict = field(default_factory=dict)  # call index -> Axis of the rows that are looked up
    dropouts: dict = field(default_factory=dict)  # call index -> Action: where this rank's part of the whole mask lies
    kept: dict = field(
        default_factory=dict
    )  # call index -> {path: Action}: buffers that the call updates, on its part of them
    axis_of: dict = field(default_factory=dict)  # call index -> Axis that it works on a shard of
    blockers: list = field(default_factory=list)  # calls that needed something gathered


class Sharding:
    """What is sharded. `params[name]` is (dim, Axis); an Axis in `through` stays sharded beyond the calls that use the parameter; a
    parameter in `whole` is gathered before it is used. `outer[name]`: the dim is so many equal pieces, each of them split.
    """

    def __init__(self, params=(), through=(), whole=(), outer=()):
        self.params, self.through = dict(params), set(through)
        self.whole, self.outer = set(whole), dict(outer)


def lay_out(graph, axes, sharding, calls=None):
    """Walk the calls in order (all, or a subset whose other values are replicated). Returns Layout; raises LayoutError."""
    return _Pass(graph, axes, sharding).run(graph.calls if calls is None else calls)


class _Pass:
    def __init__(self, graph, axes, sharding):
        self.graph, self.axes, self.sharding = graph, axes, sharding
        self.layout = Layout()
        self.now = {}  # value id -> state after the actions on it
        self.pending = {}  # value id -> Partial value, not yet summed or passed on
        self.use_count = graph.use_count
        for name, (_, axis) in sharding.params.items():
            if name in graph.params:
                self.now[graph.params[name].id] = axis
        self.gathered = {graph.params[name].id for name in sharding.whole if name in graph.params}

    def run(self, calls):
        for call in calls:
            if call.nodes:
                self.step(call)
        for path, v in self.graph.outputs.items():
            state = self.now.get(v.id)
            if state is not None and state is not PARTIAL:
                whole = [self.action("gather", v, state)]
                if self.use_count[v.id] == 1 and v.producer is not None:
                    self.layout.values[v.id] = whole
                else:
                    self.layout.root[path] = whole
        for v in self.graph.stored:
            if self.layout.states.get(v.id) is not None:
                call = self.graph.calls[v.producer]
                raise LayoutError("a module keeps what would be a shard", call, self.layout.axis_of.get(call.index))
        for v in list(self.pending.values()):
            self.sum_value(v)
        return self.layout

    def action(self, kind, value, axis):
        dim, outer, inner = axis.find(self.axes, value)
        if outer != 1 and not self.axes.steady_within(value, dim, axis.factors[-1]):
            raise LayoutError("where the axis lies depends on sizes that may vary", axis=axis)
        return Action(kind, dim, axis.size, inner, outer)

    def weight_gather(self, v):
        dim, _ = self.sharding.params[v.param]
        outer = self.sharding.outer.get(v.param, 1)
        return Action("gather", dim, v.shape[dim] // outer, 1, outer)

    def sum_value(self, v):
        self.pending.pop(v.id, None)
        self.layout.values.setdefault(v.id, []).append(Action("sum"))
        self.now[v.id] = None

    def step(self, call):
        inputs = {v.id: v for v in call.inputs.values()}
        state = {i: self.now.get(i) for i in inputs}
        for path, v in call.inputs.items():
            if v.id in self.gathered and state[v.id] is not None:
                self.use(call, path, self.weight_gather(v))
        state = {i: None if i in self.gathered else s for i, s in state.items()}
        active = {s for s in state.values() if s is not None and s is not PARTIAL}
        partial = [inputs[i] for i, s in state.items() if s is PARTIAL]
        if partial:
            if not active and self.defers(call, state, inputs):
                for v in partial:
                    self.pending.pop(v.id, None)
                return self.outputs(call, {v.id: PARTIAL for v in call.outputs.values()})
            for v in partial:
                self.sum_value(v)
                state[v.id] = None
        if not active:
            return
        effect, reason = None, "it works on two sharded axes"
        axis = active.pop()
        if call.name == "dropout" and (0, 0) not in call.inputs:
            reason = "its input is not its first argument"
        elif not active:
            effect = Analysis(self.axes, call, axis, state).solve()
            reason = effect.reason
        if effect is None or effect.reason:
            self.layout.blockers.append((call, reason))
            for path, v in call.inputs.items():
                if state[v.id] is not None:
                    self.use(call, path, self.action("gather", v, state[v.id]))
            return
        self.layout.axis_of[call.index] = axis
        for path, v in call.inputs.items():
            if v.id in effect.kept:
                self.layout.kept.setdefault(call.index, {})[path] = self.action("split", v, axis)
            elif v.id in effect.slices:
                self.use(call, path, self.action("split", v, axis))
            elif v.id in effect.once:
                self.use(call, path, Action("once"))
            elif v.id in effect.enter:
                self.use(call, path, Action("enter"))
        if effect.lookup:
            self.layout.lookups[call.index] = axis
        if call.name == "dropout":
            self.layout.dropouts[call.index] = self.action("split", call.inputs[(0, 0)], axis)
        self.outputs(call, effect.out)

    def use(self, call, path, action):
        """An action on an argument. What the call gets is another tensor, so a write that comes later would miss the model's."""
        v = call.inputs[path]
        if self.graph.last_write.get(v.memory.id, -1) >= call.index:
            raise LayoutError(
                "a tensor is written to in place", call, self.now.get(v.id) or self.layout.axis_of.get(call.index)
            )
        self.layout.uses[(call.index, path)] = [action]

    def defers(self, call, state, inputs):
        """Whether the call can run on partial results and its output be summed instead."""
        tensors = [v for v in inputs.values() if v.dtype.is_floating_point or v.dtype.is_complex]
        if any(state[v.id] is not PARTIAL or self.use_count.get(v.id) != 1 for v in tensors):
            return False
        return all(linear(node) for node in call.nodes)

    def outputs(self, call, states):
        mine = {v.id for v in call.inputs.values()}
        made = {v.id: v for v in call.outputs.values() if v.id not in mine}
        for node in call.nodes:  # what was written to in place is made anew without being returned
            if node.mutated:
                made.update({v.id: v for v in node.outputs if v.id in states})
        for v in made.values():
            state = states.get(v.id)
            self.layout.states[v.id] = state
            if state is PARTIAL:
                self.pending[v.id] = v
            if state is None or state is PARTIAL or state in self.sharding.through:
                self.now[v.id] = state
            else:  # a weight's own axis ends here
                self.layout.values.setdefault(v.id, []).append(self.action("gather", v, state))
                self.now[v.id] = None


def op_name(node):
    return node.op._schema.name.removeprefix("aten::")


def linear(node):
    """Whether a node is linear in all its tensor inputs at once, so that a sum of partial results may be taken after it."""
    name = op_name(node)
    return name in LINEAR and (name not in ADDITIVE or len(node.inputs) == 2)


class Analysis:
    """One call on a shard of one axis: which inputs must be split, entered or added once, and what comes out; or the reason why it needs the whole."""

    def __init__(self, axes, call, axis, state):
        self.axes, self.call, self.axis = axes, call, axis
        self.external = {v.id: v for v in call.inputs.values()}
        self.given = {i for i, s in state.items() if s is not None}
        self.slices, self.enter, self.once, self.kept = set(), set(), set(), set()
        self.lookup, self.reason, self.out = False, None, {}
        self.mine = set(axis.factors)
        self.maker = {}

    def solve(self):
        for _ in range(len(self.external) + 1):
            if self.walk():
                return self
        self.reason = self.reason or "its inputs do not agree"
        return self

    def fail(self, reason):
        self.reason = reason
        return True

    def walk(self):
        """One pass over the nodes; False when another input turned out to need a split and the pass must be made again."""
        sharded = self.given | self.slices
        states = {i: self.axis for i in sharded}
        self.enter, self.once, self.lookup, self.out = set(), set(), False, {}
        for node in self.call.nodes:
            effect = self.axes.effect(node)
            ins = {v.id: v for v in node.inputs}
            s_in = [v for v in ins.values() if states.get(v.id) is self.axis]
            p_in = [v for v in ins.values() if states.get(v.id) is PARTIAL]
            for v in node.outputs:
                if v.id not in ins:
                    self.maker[v.id] = node
            if p_in:
                others = [v for v in ins.values() if v.dtype.is_floating_point and v not in p_in]
                if s_in or others or not linear(node):
                    return self.fail("a partial sum is used within")
                states.update((v.id, PARTIAL) for v in node.outputs)
                continue
            if any(states.get(i) == "unknown" for i in ins):
                return self.fail(f"{op_name(node)} reads what has lost the axis")
            if not s_in:
                continue
            if any(effect.whole.get(v.id, set()) & self.mine for v in s_in):
                return self.fail(f"{op_name(node)} needs the whole dim")
            hit = effect.contract & self.mine
            if hit and hit != self.mine:
                return self.fail(f"{op_name(node)} sums over a part of the axis")
            outs = [(v, self.axis.find(self.axes, v)) for v in node.outputs]
            if hit:
                if any(at is not None for _, at in outs):
                    return self.fail(f"{op_name(node)} has the axis twice")
            elif not outs or outs[0][1] in (None, False):
                return self.fail(f"{op_name(node)} loses the axis")
            for v in ins.values():
                if states.get(v.id) is not None:
                    continue
                at = self.axis.find(self.axes, v)
                if at is False:
                    return self.fail(f"{op_name(node)} has a part of the axis")
                roots = self.roots(v)
                if at is not None:
                    carrying = [r for r in roots if self.axis.find(self.axes, r)]
                    if len(roots) != 1 or len(carrying) != 1:
                        return self.fail(f"{op_name(node)} makes the axis anew")
                    if roots[0].id in node.mutated and v.producer is None and not v.trainable:
                        self.kept.add(roots[0].id)  # a buffer
                    self.slices.add(roots[0].id)
                    return False
                if not (v.dtype.is_floating_point or v.dtype.is_complex):
                    continue
                if hit:
                    if effect.bias != v.id or v.id not in self.external:
                        return self.fail(f"{op_name(node)} adds to a partial sum")
                    self.once.add(v.id)
                else:
                    if v.id in node.mutated:
                        return self.fail("a replicated tensor is written to in place")
                    self.enter |= {r.id for r in roots if r.trainable}
            if hit and effect.lookup:
                whole_dim = self.axis.find(self.axes, node.inputs[0]) == (0, 1, 1)
                if self.call.name != "embedding" or not whole_dim:
                    return self.fail("it looks rows up otherwise than F.embedding in all rows")
                self.lookup = True
            for v, at in outs:
                states[v.id] = PARTIAL if hit else (self.axis if at else "unknown")
        return self.close(states)

    def close(self, states):
        made = [v for v in self.call.outputs.values() if v.id not in self.external]
        made += [v for n in self.call.nodes if n.mutated for v in n.outputs]
        for v in made:
            s = states.get(v.id)
            if s == "unknown":
                return self.fail("an output loses the axis")
            if s is None and v.trainable and (self.enter or self.once):
                return self.fail("it mixes sharded and replicated results")
            self.out[v.id] = s
        if self.enter & self.once:
            return self.fail("an input is used in two ways")
        return True

    def roots(self, v):
        """The call's inputs that an inner value is made from."""
        if v.id in self.external:
            return [v]
        node = self.maker.get(v.id)
        if node is None:
            return []
        return list({r.id: r for x in node.inputs for r in self.roots(x)}.values())
