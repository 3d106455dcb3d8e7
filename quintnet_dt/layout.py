"""Given which axes are sharded: the state of every tensor, and the collectives that make every call right.

The states of a tensor, seen from one rank: *replicated* (None), *sharded* (the Axis it is a shard of), or `PARTIAL` (the ranks' tensors sum to it;
`AVERAGED`: their mean is it).
Gradients follow by one rule: the gradient of a tensor sums over every axis it does not have. So a replicated tensor that enters a call which works on a shard
gets a partial gradient there, and the action `enter` (identity forward, all-reduce backward) sums it.
"""

from dataclasses import dataclass, field, replace
from itertools import combinations
from math import prod

from .utils import is_float

PARTIAL, AVERAGED = "partial", "averaged"

LINEAR = set(
    "view _unsafe_view reshape t transpose permute unsqueeze squeeze clone alias detach expand add sub neg slice select".split()
)
FIRST = {"div", "index", "index_select", "sum", "mean", "_to_copy"}  # linear in their first argument
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
    """One collective on one tensor: `enter`, `sum`, `mean`, `gather`, `split`, `once`, `shard` (to a DTensor). A sharded dim is outer x `units` x `inner`."""

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
    instead: dict = field(default_factory=dict)  # call index -> Action: what on_shard.py runs in its place, and where its shard lies in the whole
    kept: dict = field(
        default_factory=dict
    )  # call index -> {path: Action}: buffers that the call updates, on its part of them
    axis_of: dict = field(default_factory=dict)  # call index -> Axis that it works on a shard of
    blockers: list = field(default_factory=list)  # calls that needed something gathered
    shards: dict = field(default_factory=dict)  # path of an object that keeps tensors -> {place: Action} of those that are shards


class Sharding:
    """What is sharded. `params[name]` is (dim, Axis); an Axis in `through` stays sharded beyond the calls that use the parameter; a
    parameter in `whole` is gathered before it is used. `outer[name]`: the dim is so many equal pieces, each of them split. `loss_parallel`: outputs
    that are sharded on their last dim stay so.
    """

    def __init__(self, params=(), through=(), whole=(), outer=(), loss_parallel=False):
        self.loss_parallel = loss_parallel
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
        for i, action in graph.given.items():
            self.now[i] = self.layout.states[i] = self.given_axis(graph.values[i], action)

    def run(self, calls):
        for call in calls:
            if call.nodes or call.opaque:
                self.step(call)
        for path, v in self.graph.outputs.items():
            state = self.now.get(v.id)
            if state is not None and state is not PARTIAL:
                whole = [self.action("gather", v, state)]
                if self.sharding.loss_parallel and (whole[0].dim, whole[0].outer) == (len(v.shape) - 1, 1):
                    self.layout.root[path] = [replace(whole[0], kind="shard")]
                elif self.use_count[v.id] == 1 and v.producer is not None:
                    self.layout.values[v.id] = whole
                else:
                    self.layout.root[path] = whole
        for v in self.graph.stored:
            if self.layout.states.get(v.id) is not None:
                call = self.graph.calls[v.producer]
                raise LayoutError("a module keeps what would be a shard", call, self.layout.axis_of.get(call.index))
        for v in self.graph.seen.values():
            if self.now.get(v.id) not in (None, PARTIAL) and v.id not in self.gathered:
                raise LayoutError("a hook sees what would be a shard", axis=self.now[v.id])
        for v in list(self.pending.values()):
            self.sum_value(v)
        for path, place, v in self.graph.held:
            at, state = self.layout.shards.setdefault(path, {}), v and self.now.get(v.id)
            if state is not None:
                at[place] = self.action("gather", v, state)
        return self.layout

    def given_axis(self, v, action):
        """The axis of a shard that was kept from an earlier call."""
        factors = self.axes.final(v)[action.dim]
        for i, j in combinations(range(len(factors) + 1), 2):
            if (prod(f.size for f in factors[:i]), prod(f.size for f in factors[i:j])) == (action.outer, action.units):
                return Axis(tuple(factors[i:j]))
        raise LayoutError(f"a shard kept from an earlier call, of shape {v.shape}, is used in another way than there")


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
            scales = None if active else self.defers(call, state, inputs)
            if scales is not None:
                for v in partial:
                    self.pending.pop(v.id, None)
                for path in scales:
                    self.use(call, path, Action("enter"))
                return self.outputs(call, {v.id: PARTIAL for v in call.outputs.values()})
            for v in partial:
                self.sum_value(v)
                state[v.id] = None
        if not active:
            return
        effect, reason = None, "it works on two sharded axes"
        axis = active.pop()
        if call.opaque:
            raise LayoutError(call.opaque, call, axis)
        if not active:
            effect = Analysis(self.axes, call, axis, state, self.sharding.through).solve()
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
        if effect.instead is not None:
            self.layout.instead[call.index] = self.action(call.name, effect.instead, axis)
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
        """Whether the call can run on partial results and its output be summed instead: the paths of the replicated factors that it scales
        them by (small ones: their gradients are partial), or None."""
        if any(s is PARTIAL and (self.use_count.get(i) != 1 or i in self.graph.seen) for i, s in state.items()):
            return None
        summed, scales = {i for i, s in state.items() if s is PARTIAL}, set()
        for node in call.nodes:
            ins = {v.id: v for v in node.inputs}
            mine = [v for i, v in ins.items() if i in summed]
            others = {i: v for i, v in ins.items() if i not in summed and is_float(v)}
            if len(mine) == 1 and (op_name(node) == "mul" or op_name(node) in FIRST and node.inputs[0] is mine[0]):
                if any(v.nbytes * 4 > mine[0].nbytes or i not in inputs for i, v in others.items()):
                    return None
                if node.outputs[0].dtype.itemsize < mine[0].dtype.itemsize:
                    return None  # sums in the better precision
                scales |= others.keys()
            elif not mine or others or not linear(node):
                return None
            summed |= {v.id for v in node.outputs}
        return [p for p, v in call.inputs.items() if v.id in scales and v.trainable]

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
            if state is AVERAGED:
                self.layout.values.setdefault(v.id, []).append(Action("mean"))
                self.now[v.id] = None
            elif state is None or state is PARTIAL or state in self.sharding.through:
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

    def __init__(self, axes, call, axis, state, through):
        self.axes, self.call, self.axis, self.through = axes, call, axis, through
        self.external = {v.id: v for v in call.inputs.values()}
        self.given = {i for i, s in state.items() if s is not None}
        self.slices, self.enter, self.once, self.kept = set(), set(), set(), set()
        self.instead, self.reason, self.out = None, None, {}
        self.mine = set(axis.factors)
        self.maker = {}

    def solve(self):
        for _ in range(len(self.external) + 1):
            if self.classes() or self.walk():
                return self
        self.reason = self.reason or "its inputs do not agree"
        return self

    def classes(self):
        """Whether it is a cross entropy of logits that are sharded over their classes."""
        args, kwargs = self.call.args
        given = {**dict(zip(("input", "target", "weight"), args)), **kwargs}
        x, target = given.get("input"), given.get("target")
        if self.call.name != "cross_entropy" or self.given != {x.id} or target.dtype.is_floating_point:
            return False
        if given.get("weight") is not None or self.axis.find(self.axes, x) != (min(1, len(x.shape) - 1), 1, 1):
            return False
        self.instead, self.out = x, {v.id: None for v in self.call.outputs.values()}
        return True

    def fail(self, reason):
        self.reason = reason
        return True

    def walk(self):
        """One pass over the nodes; False when another input turned out to need a split and the pass must be made again."""
        sharded = self.given | self.slices
        states = {i: self.axis for i in sharded}
        self.enter, self.once, self.instead, self.out = set(), set(), None, {}
        for node in self.call.nodes:
            effect = self.axes.effect(node)
            ins = {v.id: v for v in node.inputs}
            s_in = [v for v in ins.values() if states.get(v.id) is self.axis]
            p_in = [v for v in ins.values() if states.get(v.id) in (PARTIAL, AVERAGED)]
            for v in node.outputs:
                if v.id not in ins:
                    self.maker[v.id] = node
            if p_in:
                others = [v for v in ins.values() if is_float(v) and v not in p_in]
                if s_in or others or not linear(node):
                    return self.fail("a partial sum is used within")
                states.update((v.id, states[p_in[0].id]) for v in node.outputs)
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
            if hit and effect.mean and self.axis not in self.through:
                return self.fail("it takes a mean over shards that may be uneven")
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
                    root = roots[0]
                    if root.producer is None and not root.trainable and any(root.id in n.mutated for n in self.call.nodes):
                        self.kept.add(root.id)  # a buffer
                    self.slices.add(root.id)
                    return False
                if not is_float(v):
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
                self.instead = node.inputs[0]
            for v, at in outs:
                total = AVERAGED if effect.mean else PARTIAL
                states[v.id] = total if hit else (self.axis if at else "unknown")
        return self.close(states)

    def close(self, states):
        made = [v for v in self.call.outputs.values() if v.id not in self.external]
        made += [v for n in self.call.nodes if n.mutated for v in n.outputs]
        for v in made:
            s = None if v.memory.id in self.kept else states.get(v.id)  # a buffer is completed after the call
            if s == "unknown":
                return self.fail("an output loses the axis")
            if s is None and v.trainable and (self.enter or self.once):
                return self.fail("it mixes sharded and replicated results")
            self.out[v.id] = s
        if self.enter & self.once:
            return self.fail("an input is used in two ways")
        if self.call.name == "dropout":
            self.instead = self.call.inputs.get((0, 0))
            if self.instead is None:
                return self.fail("its input is not its first argument")
        return True

    def roots(self, v):
        """The call's inputs that an inner value is made from."""
        if v.id in self.external:
            return [v]
        node = self.maker.get(v.id)
        if node is None:
            return []
        return list({r.id: r for x in node.inputs for r in self.roots(x)}.values())
