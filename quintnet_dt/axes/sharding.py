"""What is said of a sharded model: an Axis, a Sharding of parameters, the states of tensors, the
Actions on them.

The states of a tensor, seen from one rank: *replicated* (None), *sharded* (the Axis it is a shard
of), or `PARTIAL` (the ranks' tensors sum to it; `AVERAGED`: their mean is it).
"""

from dataclasses import dataclass, field
from math import prod

from .factors import leaves

PARTIAL, AVERAGED = "partial", "averaged"


class LayoutError(Exception):
    """The sharding of an axis cannot be carried through a call."""

    def __init__(self, reason, call=None, axis=None):
        super().__init__(f"{reason}{f': {call}' if call else ''}")
        self.reason, self.call, self.axis, self.others = reason, call, axis, []


@dataclass(frozen=True)
class Axis:
    """An axis that is sharded: adjacent leaf factors, outermost first: one for an axis of the
    model, a dim's for a weight's own."""

    factors: tuple
    axes: object = field(
        default=None, compare=False, repr=False
    )  # in which a weight's own axis is found

    @property
    def size(self):
        return prod(f.size for f in self.factors)

    def find(self, axes, value):
        """(dim, outer, inner) of the axis in a value; None where it has none of it; False where it
        has a part of it or has it twice. In a dim of unequal pieces, each of which has it, outer is
        a tuple of each piece's (outer, inner), and inner is 0."""
        found = [
            (i, at)
            for i, dim in enumerate((self.axes or axes).final(value))
            if (at := self._within(dim)) is not None
        ]
        if not found:
            return None
        return False if len(found) > 1 or not found[0][1] else (found[0][0], *found[0][1])

    def _within(self, dim):
        """(outer, inner) of the axis in a dim's factors; None or False as `find`."""
        found, j, n, mine = None, 0, len(self.factors), set(self.factors)
        while j < len(dim):
            at = False if dim[j] in mine else None
            if tuple(dim[j : j + n]) == self.factors:
                at = prod(f.size for f in dim[:j]), prod(f.size for f in dim[j + n :])
            elif dim[j].pieces:
                inside = [self._within(leaves(piece)) for piece in dim[j].pieces]
                if any(p is not None for p in inside):  # in each of them, or it is no shard
                    at = (
                        len(dim) == 1
                        and all(inside)
                        and (sum((p[0] if p[1] == 0 else (p,) for p in inside), ()), 0)
                    )
            if at is not None:
                if found is not None or not at:
                    return False
                found = at
            j += n if at and at[1] else 1
        return found


@dataclass(frozen=True)
class Action:
    """One collective on one tensor: `enter`, `sum`, `mean`, `gather`, `split`, `once`, `shard` (to
    a DTensor), `exchange`. A sharded dim is outer x `units` x `inner`, or a piece of that kind for
    each (outer, inner) in a tuple `outer`. `exchange`: of a weight that is stored in its own order,
    for one whose pieces are split."""

    kind: str
    dim: int = 0
    units: int = 0
    inner: int = 1
    outer: int | tuple = 1


class Sharding:
    """What is sharded. `params[name]` is (dim, Axis); an Axis in `through` stays sharded beyond the
    calls that use the parameter; a parameter in `whole` is gathered before it is used.
    `outer[name]`: the dim is so many equal pieces, each of them split (a tuple: unequal ones, see
    `Axis.find`). `loss_parallel`: outputs that are sharded on their last dim stay so.
    """

    def __init__(self, params=(), through=(), whole=(), outer=(), loss_parallel=False):
        self.loss_parallel = loss_parallel
        self.params, self.through = dict(params), set(through)
        self.whole, self.outer = set(whole), dict(outer)
        self.dear = {}  # what was decided of lines of code before, as Layout has it

    def follow(self, names, graph, axes):
        """Split these parameters too, along the axes that stay sharded through the model, where
        they have one."""
        through = dict.fromkeys(
            axis for _, axis in self.params.values() if axis in self.through
        )  # every rank's order
        for name in sorted(names):
            for axis in through:
                at = axis.find(axes, graph.params[name])
                if at and at[1] == 1:
                    self.params.setdefault(name, (at[0], axis))


def pieces(sharding, name):
    """Of how many equal pieces the split dim of a parameter is as it is stored."""
    outer = sharding.outer.get(name, 1)
    return outer if type(outer) is int else 1
