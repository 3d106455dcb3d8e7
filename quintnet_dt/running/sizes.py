"""Numbers in a model's code that size a tensor, and must be others on a shard."""

from dataclasses import dataclass
from typing import TypeAlias

from ..groups import Group, Units, part_of, whole_of


@dataclass(frozen=True)
class PartOf:
    """A size of the whole, dealt out in these units: the rank's part. A negative one
    stands for what is left, and does already."""

    units: Units

    def local(self, size: int, group: Group) -> int | None:
        return size if size < 0 else part_of(size, self.units, group)


@dataclass(frozen=True)
class WholeOf:
    """Computed from a shard's own size, `expand(b, y.shape[1])`: the whole."""

    units: Units

    def local(self, size: int, group: Group) -> int | None:
        return whole_of(size, self.units, group)


@dataclass(frozen=True)
class Rest:
    """Computed from a shard's own size by a number that is of the whole,
    `view(y.shape[0] // heads, heads, -1)`: what is left beside the other sizes."""

    def local(self, size: int, group: Group) -> int | None:
        return -1


# `local` gives the number for this rank; None where it cannot be dealt out.
LocalSize: TypeAlias = PartOf | WholeOf | Rest
