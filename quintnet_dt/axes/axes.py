"""Which dims are one axis: every operator's rule applied in order, over the factors of
each tensor's dims.

A dim of a tensor is a list of factors, outermost first: 512 features may be 8 heads x
64. What remains when the rules have merged the factors that are the same are the axes.
The idea is that of factor-based sharding rules (Shardy, https://openxla.org/shardy) and
of named-dimension analysis (TOAST, arXiv 2508.15010).
"""

from collections.abc import Iterable
from functools import cached_property

from ..keys import ParamName, ValueId
from ..tracing.graph import Call, Graph, Node, Value
from .factors import Factor, leaves
from .findings import Effect, Findings
from .rules import rule_of
from .rules.table import arg, unknown
from .sharding import Axis


class Axes(Findings):
    """The factors of every dim of every value of a Graph, and the effect of every
    node."""

    def __init__(self, graph: Graph, calls: Iterable[Call] | None = None) -> None:
        super().__init__()
        self.graph = graph
        calls = graph.calls if calls is None else list(calls)
        self._note_slices(calls)
        for call in calls:
            self.call = call
            for node in call.nodes:
                self._apply_rule(node, call)
        # All merging is over.
        self.effects = {
            node: effect.of_leaves() for node, effect in self.effects.items()
        }
        self._final: dict[ValueId, list[list[Factor]]] = {}

    def _note_slices(self, calls: list[Call]) -> None:
        for node in (node for call in calls for node in call.nodes):
            if node.op._schema.name == "aten::slice":
                value, out = node.inputs[0], node.outputs[0]
                dim = arg(node, "dim") % len(value.shape)
                self.sliced.setdefault((value.id, dim), set()).add(out.shape[dim])

    def _apply_rule(self, node: Node, call: Call) -> None:
        self.effects[id(node)] = Effect()
        rule = unknown if call.why_whole else rule_of(node)
        rule(node, self)
        for value in node.outputs:  # what a rule left open is new
            self.dims(value)

    def final(self, value: Value) -> list[list[Factor]]:
        """The leaf factors of each dim, after all merging."""
        if value.id not in self._final:
            self._final[value.id] = [leaves(d) for d in self.dims(value)]
        return self._final[value.id]

    def effect(self, node: Node) -> Effect:
        """A node's effect, in leaf factors."""
        return self.effects[id(node)]

    @cached_property
    def _of_parameters(self) -> set[Factor]:
        params = self.graph.params.values()
        return {f for value in params for dim in self.final(value) for f in dim}

    def steady_within(self, value: Value, dim: int, factor: Factor) -> bool:
        """Whether what lies within a factor in a dim has sizes of the model's
        parameters, and not of an input's."""
        factors = self.final(value)[dim]
        within = factors[factors.index(factor) + 1 :]
        return set(within) <= self._of_parameters


def own_axis(graph: Graph, name: ParamName, dim: int) -> Axis:
    """The whole dim of a weight, by itself. It is seen as the calls that use the weight
    see it: what is added to its output later cannot make both dims of a square weight
    one."""
    alone = Axes(graph, graph.users.get(name, ()))
    return Axis(tuple(alone.final(graph.params[name])[dim]), alone)


def lone_axis(size: int) -> Axis:
    """A dim's axis where it does not matter what it runs through: that of a weight
    which is gathered before its use."""
    return Axis((Factor(size),))
