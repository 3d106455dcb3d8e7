"""Split: how a dim is shared by the ranks."""

from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple

from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement

from ..groups import Units
from ..private import _StridedShard


class Segment(NamedTuple):
    """A stretch of a dim in which an axis lies: `outer` blocks, each of all units, each
    `inner` elements long."""

    outer: int = 1
    inner: int = 1


class Range(NamedTuple):
    """`length` elements of a dim from `start` on."""

    start: int
    length: int


@dataclass(frozen=True)
class Split:
    """A dim that the ranks share along an axis of `units`: of every block, a rank has
    its run of units, as `torch.chunk` deals them out, or `balanced` as in Units.

    The dim is its segments one after the other, `outer x units x inner` elements each:

        512 features, 8 heads of 64            Split(0, 8, (Segment(1, 64),))
        [q | k | v], each 8 heads of 64        Split(0, 8, (Segment(3, 64),))
        [q | k | v], 8 q heads, 2 k, v heads   Split(0, 2, (Segment(1, 256), Segment(2,
        64)))
    """

    dim: int
    units: int
    segments: tuple[Segment, ...] = (Segment(),)
    balanced: bool = False

    @classmethod
    def of_blocks(cls, dim: int, length: int, blocks: int = 1) -> "Split":
        """A dim of equal blocks, each shared element by element: how a parameter is
        stored."""
        return cls(dim, length // blocks, (Segment(blocks),))

    @property
    def blocks(self) -> int | None:
        """Of how many equal blocks the dim is; None where they are unequal."""
        return self.segments[0].outer if len(self.segments) == 1 else None

    def sizes(self, n: int) -> list[int]:
        """How many units each of n ranks has."""
        return Units(self.units, self.balanced).sizes(n)

    @property
    def width(self) -> int:
        """How many elements of the dim belong to one unit."""
        return sum(outer * inner for outer, inner in self.segments)

    @property
    def length(self) -> int:
        return self.units * self.width

    def local_shape(self, shape: tuple[int, ...], rank: int, n: int) -> tuple[int, ...]:
        """The shape of a rank's part of a tensor of this shape."""
        local = self.width * self.sizes(n)[rank]
        return (*shape[: self.dim], local, *shape[self.dim + 1 :])

    def ranges(self, rank: int, n: int) -> list[Range]:
        """Where a rank's part lies in the dim, block by block."""
        sizes = self.sizes(n)
        before, mine = sum(sizes[:rank]), sizes[rank]
        start, found = 0, []
        for outer, inner in self.segments:
            for _ in range(outer):
                found.append(Range(start + before * inner, mine * inner))
                start += self.units * inner
        return found

    def placement(self) -> Placement:
        """As DTensor places a parameter that is stored so. Raises ValueError for
        unequal blocks, which it has no placement for."""
        if self.blocks is None:
            raise ValueError(f"expected equal blocks, found {self}")
        return (
            Shard(self.dim)
            if self.blocks == 1
            else _StridedShard(self.dim, split_factor=self.blocks)
        )


class NotSplit(Enum):
    """Why an axis does not split a tensor. False where a Split is true."""

    ABSENT = "the tensor has none of it"
    IN_PART = "the tensor has a part of it, or has it twice"

    def __bool__(self) -> Literal[False]:
        return False


def joined(ranges: list[Range]) -> list[Range]:
    """Ranges, those that touch made one."""
    found: list[Range] = []
    for start, length in ranges:
        if found and sum(found[-1]) == start:
            found[-1] = Range(found[-1].start, found[-1].length + length)
        else:
            found.append(Range(start, length))
    return found


@dataclass(frozen=True)
class Heads:
    """Key-value heads along a dim, which query heads attend to, as many to each; the
    ranks share the query heads in these units."""

    dim: int
    count: int
    queries: Units

    def of_rank(self, rank: int, n: int) -> list[int]:
        """The heads that a rank attends to: one that all of its query heads do, else
        one for each of them."""
        sizes = self.queries.sizes(n)
        first = sum(sizes[:rank])
        group = self.queries.count // self.count
        each = [head // group for head in range(first, first + sizes[rank])]
        return each[:1] if len(set(each)) == 1 else each
