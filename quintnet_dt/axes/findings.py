"""What the rules have found so far: the factors of each dim of each value, what each
node does."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..keys import ValueId
from ..tracing.graph import Call, Node, Value
from .factors import Factor, flat, fresh, length, unify


@dataclass
class Effect:
    """What a node does beyond passing factors on."""

    # summed over: the output is Partial
    contract: set[Factor] = field(default_factory=set)
    # of each input, needed unsharded
    unsharded: dict[ValueId, set[Factor]] = field(default_factory=dict)
    bias: ValueId | None = None  # an addend that is to be added once
    lookup: bool = False  # the contraction is a lookup of rows by index
    mean: bool = False  # the contraction is a mean

    def of_leaves(self) -> "Effect":
        """The same, of the leaves that the factors have become."""
        unsharded = {
            value: set(flat(factors)) for value, factors in self.unsharded.items()
        }
        return Effect(
            set(flat(self.contract)), unsharded, self.bias, self.lookup, self.mean
        )


class Findings:
    """What a rule reads and adds to."""

    def __init__(self) -> None:
        self._dims: dict[ValueId, list[list[Factor]]] = {}
        self.effects: dict[int, Effect] = {}  # by the id() of a node
        # The lengths of all slices that are taken of a dim of a value.
        self.sliced: dict[tuple[ValueId, int], set[int]] = {}
        self.call: Call | None = None  # whose nodes' rules are applied

    def dims(self, value: Value) -> list[list[Factor]]:
        """The factors of each dim of a value, as found so far."""
        if value.id not in self._dims:
            self._dims[value.id] = [fresh(n) for n in value.shape]
        return self._dims[value.id]

    def set(self, value: Value, dims: list[list[Factor]]) -> None:
        """The dims of an output. If it already has some (an alias), they are
        unified."""
        assert [length(d) for d in dims] == list(value.shape), (dims, value.shape)
        if value.id in self._dims:
            for a, b in zip(self._dims[value.id], dims):
                unify(a, b)
        else:
            self._dims[value.id] = [list(d) for d in dims]

    def unsharded(self, node: Node, value: Value, factors: Iterable[Factor]) -> None:
        """A node needs these factors of an input unsharded."""
        self.effects[id(node)].unsharded.setdefault(value.id, set()).update(factors)

    def contract(self, node: Node, factors: Iterable[Factor]) -> None:
        """A node sums over these factors."""
        self.effects[id(node)].contract.update(factors)
