"""What is said of a sharded model: an Axis, a Sharding of parameters, the states of tensors, the Actions on them.

The states of a tensor, seen from one rank: *replicated* (None), *sharded* (the Axis it is a shard of), or `PARTIAL` (the ranks' tensors sum to it;
`AVERAGED`: their mean is it).
"""

from dataclasses import dataclass
from math import prod

PARTIAL, AVERAGED = "partial", "averaged"


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


class Sharding:
    """What is sharded. `params[name]` is (dim, Axis); an Axis in `through` stays sharded beyond the calls that use the parameter; a
    parameter in `whole` is gathered before it is used. `outer[name]`: the dim is so many equal pieces, each of them split. `loss_parallel`: outputs
    that are sharded on their last dim stay so.
    """

    def __init__(self, params=(), through=(), whole=(), outer=(), loss_parallel=False):
        self.loss_parallel = loss_parallel
        self.params, self.through = dict(params), set(through)
        self.whole, self.outer = set(whole), dict(outer)
