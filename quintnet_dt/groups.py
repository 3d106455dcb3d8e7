"""Groups of ranks that collectives run in, real and simulated, and how they share a
length."""

from dataclasses import dataclass, field
from typing import Any, Sequence, TypeAlias

import torch
from torch.distributed import ProcessGroup

from .private import SINCE_2_13


@dataclass(frozen=True)
class SimulatedGroup:
    """A group whose other ranks are imagined to hold what this one holds. ValueError
    unless ``0 <= rank < size``.

    Its collectives communicate nothing and give tensors of the right shape, fake
    tensors too: a plan can be proved and costed in one process. Where lengths differ,
    the others hold this rank's tensor cut to theirs, or zero-filled.
    """

    rank: int
    size: int
    counts = False

    def __post_init__(self):
        if not 0 <= self.rank < self.size:
            raise ValueError(f"expected 0 <= rank < size, found {self}")

    @property
    def share(self) -> float:
        """Of a tensor, what a rank sends in one pass around a ring."""
        return (self.size - 1) / self.size

    def sends(self, collective: str, nbytes: float) -> None:
        """Told of each collective, and what this rank sends in it."""


@dataclass(frozen=True)
class CountedGroup(SimulatedGroup):
    """A simulated group that keeps account of what is sent in it."""

    counts = True
    # (collective, bytes), in order
    log: list[tuple[str, float]] = field(default_factory=list, compare=False)

    def sends(self, collective: str, nbytes: float) -> None:
        self.log.append((collective, nbytes))


Group: TypeAlias = ProcessGroup | SimulatedGroup
Sizes: TypeAlias = Sequence[int] | None


def group_of(mesh: Any) -> Group:
    """The group of a 1-D DeviceMesh; of one rank, one that outlives its process group,
    which it does not need."""
    return SimulatedGroup(0, 1) if mesh.size() == 1 else mesh.get_group()


def group_rank(group: Group) -> int:
    """This process's rank in ``group``, from 0."""
    return group.rank if isinstance(group, SimulatedGroup) else group.rank()


def group_size(group: Group) -> int:
    """The number of ranks in ``group``; ValueError if it is no group of this rank's."""
    if isinstance(group, SimulatedGroup):
        return group.size
    if not isinstance(group, ProcessGroup):  # new_group gives outsiders an int
        found = f"found {group!r}; of a DeviceMesh pass mesh.get_group()"
        raise ValueError(
            "expected a ProcessGroup that this rank is in, or a SimulatedGroup,"
            f" {found}"
        )
    if not SINCE_2_13 and torch.compiler.is_compiling():
        raise RuntimeError(
            "torch.compile of collectives: expected torch 2.13 or newer, found"
            f" {torch.__version__}"
        )
    return group.size()


def chunk_sizes(length: int, n: int) -> list[int]:
    """The lengths of a dim's n parts, as ``torch.chunk`` and DTensor's Shard cut it:
    ``ceil(length / n)`` while that lasts. 10 over 4 is 3, 3, 3, 1; 3 over 4 is 1, 1, 1,
    0. Raises ValueError if ``length < 0`` or ``n < 1``."""
    if length < 0 or n < 1:
        raise ValueError(f"expected length >= 0 and n >= 1, found {length} and {n}")
    full = -(-length // n)
    return [min(full, max(0, length - full * r)) for r in range(n)]


@dataclass(frozen=True)
class Units:
    """How many units ranks share: as `chunk_sizes` deals them out, or `balanced`: the
    first ranks have one more than the others, and none is without while there are as
    many as ranks."""

    count: int
    balanced: bool = False

    def sizes(self, n: int) -> list[int]:
        """How many each of n ranks has."""
        if not self.balanced:
            return chunk_sizes(self.count, n)
        least, more = divmod(self.count, n)
        return [least + (rank < more) for rank in range(n)]


def part_of(size: int, units: Units, group: Group) -> int | None:
    """This rank's part of a size that is dealt out to the group in these units; None if
    it cannot be. What is within a unit may have any length."""
    n = group_size(group)
    if units.count % n == 0:
        return None if size % n else size // n
    mine = units.sizes(n)[group_rank(group)]
    return None if size % units.count else size // units.count * mine


def whole_of(size: int, units: Units, group: Group) -> int | None:
    """The size of which this rank's part is `size`; None if there is none."""
    n = group_size(group)
    if units.count % n == 0:
        return size * n
    mine = units.sizes(n)[group_rank(group)]
    return None if not mine or size % mine else size // mine * units.count
