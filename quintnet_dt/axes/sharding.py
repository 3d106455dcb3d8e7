"""What is sharded in a model: an Axis, the parameters along it, the states of tensors."""

from dataclasses import dataclass, field, replace
from math import prod

from ..keys import ParamName
from .factors import leaves
from .split import NotSplit, Segment, Split


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
    # The Axes in which a weight's own axis is found.
    axes: object = field(default=None, compare=False, repr=False)

    @property
    def size(self):
        return _size(self.factors)

    def find(self, axes, value) -> Split | NotSplit:
        """How the axis splits a value, or why it does not."""
        found = []
        for dim, factors in enumerate((self.axes or axes).final(value)):
            segments = self._segments(factors)
            if segments is NotSplit.IN_PART:
                return segments
            if segments:
                found.append(Split(dim, self.size, segments))
        if len(found) > 1:
            return NotSplit.IN_PART
        return found[0] if found else NotSplit.ABSENT

    def _segments(self, factors) -> tuple[Segment, ...] | NotSplit:
        """The segments of a dim that is made of these factors; or why the axis does not split
        it."""
        found, at = NotSplit.ABSENT, 0
        while at < len(factors):
            end = at + len(self.factors)
            if tuple(factors[at:end]) == self.factors:
                here = (Segment(_size(factors[:at]), _size(factors[end:])),)
                at = end
            else:
                here = self._segments_within(factors, factors[at])
                at += 1
            if here is NotSplit.IN_PART or (here and found):
                return NotSplit.IN_PART
            found = here or found
        return found

    def _segments_within(self, factors, factor) -> tuple[Segment, ...] | NotSplit:
        """As `_segments`, of one of the factors, which may be cut in unequal pieces: the axis
        splits a dim only if it splits all of its pieces."""
        inside = [self._segments(leaves(piece)) for piece in factor.pieces or ()]
        if all(segments is NotSplit.ABSENT for segments in inside):
            return NotSplit.IN_PART if factor in self.factors else NotSplit.ABSENT
        if len(factors) > 1 or not all(inside):
            return NotSplit.IN_PART
        return tuple(segment for segments in inside for segment in segments)


def _size(factors) -> int:
    return prod(f.size for f in factors)


@dataclass(frozen=True)
class ShardedParam:
    """A parameter that is sharded on `dim` along an axis, stored as so many equal `blocks`.

    `exchanged`: stored as one block though its axis lies in several; the ranks exchange its rows
    before its use. `gathered`: it is gathered before its use.
    """

    dim: int
    axis: Axis
    blocks: int = 1
    exchanged: bool = False
    gathered: bool = False

    def split(self, shape) -> Split:
        """How the parameter is stored, of its whole shape."""
        return Split.of_blocks(self.dim, shape[self.dim], self.blocks)


class Sharding:
    """What is sharded: a ShardedParam for each such parameter, by name. The axes in `through` stay
    sharded beyond the calls that use the parameters. `loss_parallel`: outputs that are sharded on
    their last dim stay so.
    """

    def __init__(self, params=(), through=(), loss_parallel=False):
        self.loss_parallel = loss_parallel
        self.params: dict[ParamName, ShardedParam] = dict(params)
        self.through: set[Axis] = set(through)
        self.dear = {}  # what was decided of lines of code before, as Layout has it

    def gather(self, names):
        """Gather these parameters before their use."""
        for name in names:
            self.params[name] = replace(self.params[name], gathered=True)

    def follow(self, names, graph, axes):
        """Split these parameters too, along the axes that stay sharded through the model, where
        they have one."""
        # in every rank's order
        through = dict.fromkeys(p.axis for p in self.params.values() if p.axis in self.through)
        for name in sorted(names):
            for axis in through:
                split = axis.find(axes, graph.params[name])
                if split and split.blocks == 1:
                    self.params.setdefault(name, ShardedParam(split.dim, axis))
