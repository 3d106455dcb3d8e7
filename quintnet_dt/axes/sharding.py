"""What is sharded in a model: an Axis, the parameters along it, the states of
tensors."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from ..groups import Units
from ..keys import ParamName
from .factors import leaves
from .split import NotSplit, Segment, Split


class LayoutError(Exception):
    """The sharding of an axis cannot be carried through a call."""

    def __init__(self, reason: Any, call: Any = None, axis: "Axis | None" = None):
        super().__init__(f"{reason}{f': {call}' if call else ''}")
        self.reason, self.call, self.axis = reason, call, axis
        # of other axes, which failed in the same run
        self.others: list[LayoutError] = []


@dataclass(frozen=True)
class Axis:
    """An axis that is sharded: adjacent leaf factors, outermost first: one for an axis
    of the model, a dim's for a weight's own."""

    factors: tuple
    # The Axes in which a weight's own axis is found.
    axes: Any = field(default=None, compare=False, repr=False)
    # as Units are
    balanced: bool = field(default=False, compare=False)

    @property
    def units(self) -> Units:
        return Units(self.size, self.balanced)

    @property
    def all_units(self) -> Split:
        """A dim that is the axis and nothing else."""
        return Split(
            dim=0,
            units=self.size,
            balanced=self.balanced,
        )

    @property
    def size(self) -> Any:
        return _size(self.factors)

    def split_of(self, axes: Any, value: Any) -> Split:
        """How the axis splits a value that it does split."""
        split = self.find(axes, value)
        if isinstance(split, NotSplit):
            raise LayoutError(f"{value.shape}: {split.value}", axis=self)
        return split

    def find(self, axes: Any, value: Any) -> Split | NotSplit:
        """How the axis splits a value, or why it does not."""
        found = []
        for dim, factors in enumerate((self.axes or axes).final(value)):
            segments = self._segments(factors)
            if segments is NotSplit.IN_PART:
                return segments
            if segments:
                found.append(Split(dim, self.size, segments, self.balanced))
        if len(found) > 1:
            return NotSplit.IN_PART
        return found[0] if found else NotSplit.ABSENT

    def _segments(self, factors: Any) -> tuple[Segment, ...] | NotSplit:
        """The segments of a dim that is made of these factors; or why the axis does not
        split it."""
        found: tuple[Segment, ...] | NotSplit = NotSplit.ABSENT
        at = 0
        while at < len(factors):
            end = at + len(self.factors)
            here: tuple[Segment, ...] | NotSplit
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

    def _segments_within(
        self, factors: Any, factor: Any
    ) -> tuple[Segment, ...] | NotSplit:
        """As `_segments`, of one of the factors, which may be cut in unequal pieces:
        the axis splits a dim only if it splits all of its pieces."""
        inside = [self._segments(leaves(piece)) for piece in factor.pieces or ()]
        if all(segments is NotSplit.ABSENT for segments in inside):
            return NotSplit.IN_PART if factor in self.factors else NotSplit.ABSENT
        if len(factors) > 1 or not all(inside):
            return NotSplit.IN_PART
        return tuple(segment for segments in inside for segment in segments or ())


def _size(factors: Any) -> int:
    return prod(f.size for f in factors)


@dataclass(frozen=True)
class ShardedParam:
    """A parameter that is sharded on `dim` along an axis, stored as so many equal
    `blocks`.

    `exchanged`: stored as one block though its axis lies in several; the ranks exchange
    its rows before its use. `gathered`: it is gathered before its use.
    """

    dim: int
    axis: Axis
    blocks: int = 1
    exchanged: bool = False
    gathered: bool = False

    def split(self, shape: tuple[int, ...]) -> Split:
        """How the parameter is stored, of its whole shape."""
        return Split.of_blocks(self.dim, shape[self.dim], self.blocks)


class Sharding:
    """What is sharded: a ShardedParam for each such parameter, by name. The axes in
    `through` stay sharded beyond the calls that use the parameters. `loss_parallel`:
    outputs that are sharded on their last dim stay so.
    """

    def __init__(self, params: Any = (), through: Any = (), loss_parallel: Any = False):
        self.loss_parallel = loss_parallel
        self.params: dict[ParamName, ShardedParam] = dict(params)
        self.through: set[Axis] = set(through)
        # what was decided of lines of code before, as Layout has it
        self.dear: dict = {}

    def gather(self, names: Iterable[ParamName]) -> None:
        """Gather these parameters before their use."""
        for name in names:
            self.params[name] = replace(self.params[name], gathered=True)

    def follow(self, names: Iterable[ParamName], graph: Any, axes: Any) -> None:
        """Split these parameters too, along the axes that stay sharded through the
        model, where they have one."""
        # in every rank's order
        through = dict.fromkeys(
            p.axis for p in self.params.values() if p.axis in self.through
        )
        for name in sorted(names):
            for axis in through:
                split = axis.find(axes, graph.params[name])
                if split and split.blocks == 1:
                    self.params.setdefault(name, ShardedParam(split.dim, axis))
