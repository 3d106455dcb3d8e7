"""One call on a shard: what it needs of its inputs, and what comes out."""

import torch

from ..axes.sharding import AVERAGED, PARTIAL
from ..axes.split import NotSplit, Split
from ..utils import is_float

LINEAR = set(
    "view _unsafe_view reshape t transpose permute unsqueeze squeeze clone alias detach expand "
    "add sub neg slice select".split()
)
FIRST = {
    "div",
    "index",
    "index_select",
    "sum",
    "mean",
    "_to_copy",
}  # linear in their first argument
ADDITIVE = {
    "add",
    "sub",
}  # only where both are tensors: P + 1 is not the sum of the ranks' (P_r + 1)


def op_name(op):
    """The name of an ATen operator, less its namespace; one of another namespace keeps it."""
    return op._schema.name.removeprefix("aten::")


def linear(node):
    """Whether a node is linear in all its tensor inputs at once: a sum of partial results may then
    be taken after it."""
    name = op_name(node.op)
    return name in LINEAR and (name not in ADDITIVE or len(node.inputs) == 2)


def copes(node):
    """Whether a node surely works on an empty shard: convolutions and norms of nothing fail, or
    crash."""
    return torch.Tag.pointwise in node.op.tags or op_name(node.op) in LINEAR | FIRST | {
        "mm",
        "addmm",
        "bmm",
        "embedding",
    }


def aligned_only(node):
    """Whether a node's kernel wants every tensor's rows to begin at multiples of 16 bytes."""
    return op_name(node.op) == "_grouped_mm"


class Analysis:
    """One call on a shard of one axis: which inputs must be split, entered or added once, and what
    comes out; or the reason why it needs the whole."""

    def __init__(self, axes, call, axis, state, through):
        self.axes, self.call, self.axis, self.through = axis.axes or axes, call, axis, through
        self.external = {v.id: v for v in call.inputs.values()}
        self.given = {i for i, s in state.items() if s is not None}
        self.slices, self.enter, self.once, self.kept = set(), set(), set(), set()
        self.instead, self.reason, self.out = None, None, {}
        self.mine = set(axis.factors)
        self.made_of = {}  # id of an inner value -> the call's inputs that it is made from, by id

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
        if (
            self.call.name != "cross_entropy"
            or self.given != {x.id}
            or target.dtype.is_floating_point
        ):
            return False
        classes = Split(min(1, len(x.shape) - 1), self.axis.size)
        if given.get("weight") is not None or self.axis.find(self.axes, x) != classes:
            return False
        self.instead, self.out = x, {v.id: None for v in self.call.outputs.values()}
        return True

    def fail(self, reason):
        self.reason = reason
        return True

    def walk(self):
        """One pass over the nodes; False when another input needs a split, and the pass must be
        made again."""
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
                    self.made_of[v.id] = {r.id: r for x in node.inputs for r in self.roots(x)}
            if p_in:
                same = len({states[v.id] for v in p_in}) == 1
                if (
                    len(p_in) < len(ins) or not same or not linear(node)
                ):  # also what is no float adds to a sum
                    return self.fail("a partial sum is used within")
                states.update((v.id, states[p_in[0].id]) for v in node.outputs)
                continue
            if any(states.get(i) == "unknown" for i in ins):
                return self.fail(f"{op_name(node.op)} reads what has lost the axis")
            if not s_in:
                continue
            if any(effect.whole.get(v.id, set()) & self.mine for v in s_in):
                return self.fail(f"{op_name(node.op)} needs the whole dim")
            hit = effect.contract & self.mine
            if hit and hit != self.mine:
                return self.fail(f"{op_name(node.op)} sums over a part of the axis")
            if hit and effect.mean and self.axis not in self.through:
                return self.fail("it takes a mean over shards that may be uneven")
            outs = [(v, self.axis.find(self.axes, v)) for v in node.outputs]
            if hit:
                if any(at is not NotSplit.ABSENT for _, at in outs):
                    return self.fail(f"{op_name(node.op)} has the axis twice")
            elif op_name(node.op).startswith("new_") and outs[0][1] is NotSplit.ABSENT:
                continue  # it reads no values
            elif not outs or not outs[0][1]:
                return self.fail(f"{op_name(node.op)} loses the axis")
            found = len(self.slices)
            for v in ins.values():
                if states.get(v.id) is not None:
                    continue
                at = self.axis.find(self.axes, v)
                if at is NotSplit.IN_PART:
                    return self.fail(f"{op_name(node.op)} has a part of the axis")
                roots = self.roots(v)
                if at:
                    carrying = [r for r in roots if self.axis.find(self.axes, r)]
                    if len(roots) != 1 or len(carrying) != 1:
                        return self.fail(f"{op_name(node.op)} makes the axis anew")
                    root = roots[0]
                    written = any(root.id in n.mutated for n in self.call.nodes)
                    if written and root.producer is None and not root.trainable:
                        self.kept.add(root.id)  # a buffer
                    self.slices.add(root.id)
                    continue
                if not is_float(v):
                    continue
                if hit:
                    if effect.bias != v.id or v.id not in self.external:
                        return self.fail(f"{op_name(node.op)} adds to a partial sum")
                    self.once.add(v.id)
                else:
                    if v.id in node.mutated:
                        return self.fail("a replicated tensor is written to in place")
                    self.enter |= {r.id for r in roots if r.trainable}
            if len(self.slices) > found:
                return False
            if hit and effect.lookup:
                whole_dim = self.axis.find(self.axes, node.inputs[0]) == Split(0, self.axis.size)
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
            s = (
                None if v.memory.id in self.kept else states.get(v.id)
            )  # a buffer is completed after the call
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
        """The call's inputs that a value is made from."""
        return [v] if v.id in self.external else list(self.made_of.get(v.id, {}).values())
