"""Which dims are one axis: every operator's rule applied in order, over the factors of each
tensor's dims.

A dim of a tensor is a list of factors, outermost first: 512 features may be 8 heads x 64. What
remains when the rules have merged the factors that are the same are the axes. The idea is that of
factor-based sharding rules (Shardy, https://openxla.org/shardy) and of named-dimension analysis
(TOAST, arXiv 2508.15010).
"""

from dataclasses import dataclass, field
from math import prod

from .factors import Factor, flat, leaves, unify
from .rules import rule_of
from .rules.table import arg, unknown
from .sharding import Axis


@dataclass
class Effect:
    """What a node does beyond passing factors on."""

    contract: list = field(default_factory=list)  # factors summed over: the output is Partial
    whole: dict = field(default_factory=dict)  # value id -> factors needed whole
    bias: int | None = None  # value id of an addend that is to be added once
    lookup: bool = False  # the contraction is a lookup of rows by index
    mean: bool = False  # the contraction is a mean


class Axes:
    """The factors of every dim of every value of a Graph, and the effect of every node."""

    def __init__(self, graph, calls=None):
        self.graph, calls = graph, graph.calls if calls is None else calls
        self._dims = {}
        self.effects = {}
        self.sliced = {}  # (value id, dim) -> the lengths of all slices that are taken of it there
        for node in (n for call in calls for n in call.nodes if n.op._schema.name == "aten::slice"):
            value, dim = node.inputs[0], arg(node, "dim") % len(node.inputs[0].shape)
            self.sliced.setdefault((value.id, dim), set()).add(node.outputs[0].shape[dim])
        for call in calls:
            self.call = call  # whose nodes' rules are applied
            for node in call.nodes:
                self.effects[id(node)] = Effect()
                (unknown if call.opaque else rule_of(node))(node, self)
                for v in node.outputs:  # what a rule left open is new
                    self.dims(v)
        self._final, self._sizes = {}, None

    def dims(self, value):
        """The factors of each dim of a value, as found so far."""
        if value.id not in self._dims:
            self._dims[value.id] = [[Factor(n)] if n != 1 else [] for n in value.shape]
        return self._dims[value.id]

    # What rules call.

    def set(self, value, dims):
        """The dims of an output. If it already has some (an alias), they are unified."""
        assert [prod(f.size for f in leaves(d)) for d in dims] == list(value.shape), (
            dims,
            value.shape,
        )
        if value.id in self._dims:
            for a, b in zip(self._dims[value.id], dims):
                unify(a, b)
        else:
            self._dims[value.id] = [list(d) for d in dims]

    def whole(self, node, value, factors):
        self.effects[id(node)].whole.setdefault(value.id, []).extend(factors)

    def contract(self, node, factors):
        self.effects[id(node)].contract.extend(factors)

    # What the planner asks.

    def final(self, value):
        """The leaf factors of each dim, after all merging (call only when the pass is over)."""
        if value.id not in self._final:
            self._final[value.id] = [leaves(d) for d in self.dims(value)]
        return self._final[value.id]

    def steady_within(self, value, dim, factor):
        """Whether what lies within a factor in a dim has sizes of the model's parameters, and not
        of an input's."""
        if self._sizes is None:
            self._sizes = {f for v in self.graph.params.values() for d in self.final(v) for f in d}
        factors = self.final(value)[dim]
        return set(factors[factors.index(factor) + 1 :]) <= self._sizes

    def effect(self, node):
        """A node's effect with its factors resolved to leaves, as sets."""
        e = self.effects[id(node)]
        if isinstance(e.contract, list):
            whole = {v: set(flat(f)) for v, f in e.whole.items()}
            e = self.effects[id(node)] = Effect(
                set(flat(e.contract)), whole, e.bias, e.lookup, e.mean
            )
        return e


def own_axis(graph, name, dim):
    """The whole dim of a weight, by itself. It is seen as the calls that use the weight see it:
    what is added to its output later cannot make both dims of a square weight one."""
    alone = Axes(graph, graph.users.get(name, ()))
    return Axis(tuple(alone.final(graph.params[name])[dim]), alone)


def lone_axis(size):
    """A dim's axis where it does not matter what it runs through: that of a weight which is
    gathered before its use."""
    return Axis((Factor(size),))
