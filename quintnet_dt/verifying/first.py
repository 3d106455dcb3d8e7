"""The first module of a split model whose output is not the whole model's.

Within the model an output may be this rank's shard, or a part of a sum. So it is right
where the ranks' tensors together make the whole model's: each by itself, summed, as a
mean, or one after the other, each of so many blocks by itself.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..plan import EXCHANGED, TensorParallelPlan
from ..together import gather
from .compare import difference, path_name
from .report import Difference
from .step import ModuleCall, Step
from .tensors import NOTHING_APART, Distance, apart, distance, full

# q, k and v in one, or a gate and what it lets through
USUAL_BLOCKS = 2, 3


@dataclass(frozen=True)
class _Shares:
    """What the ranks returned where the whole model returned `whole`.

    blocks: in how many a shared dim may lie, by the weights of the module that returned
    them; None where that is not known.
    """

    parts: list[Tensor]
    whole: Tensor
    blocks: tuple[int, ...] | None
    tolerance: float

    @property
    def dim(self) -> int | None:
        """The one dim in which the ranks' tensors are shorter than the whole."""
        shape = self.whole.shape
        if any(part.dim() != len(shape) for part in self.parts):
            return None
        shorter = {
            dim
            for dim, length in enumerate(shape)
            if any(part.shape[dim] != length for part in self.parts)
        }
        return shorter.pop() if len(shorter) == 1 else None

    def covers(self, dim: int) -> bool:
        """Whether the ranks' tensors are as long as the whole, and none overlap."""
        lengths = [part.shape[dim] for part in self.parts]
        return sum(lengths) == self.whole.shape[dim]

    def right(self, x: Tensor) -> bool:
        return distance(x, self.whole).relative <= self.tolerance


def first_output(
    split: Step,
    whole: Step,
    plan: TensorParallelPlan,
    tolerance: float,
    group: ProcessGroup,
) -> Difference | None:
    """The same on every rank of the group, all of which call this."""
    for call, expected in whole.outputs.items():
        outputs = split.outputs.get(call, {})
        mine = {path: full(x).cpu() for path, x in outputs.items()}
        ranks = gather(mine, group)
        blocks = _blocks(split, plan, call)
        for path, x in expected.items():
            parts = [found[path] for found in ranks if path in found]
            if len(parts) < len(ranks) or not x.is_floating_point():
                continue
            shares = _Shares(parts, full(x).cpu(), blocks, tolerance)
            far = _far(shares)
            rank = max(range(len(far)), key=lambda r: far[r].relative)
            if far[rank].relative > tolerance:
                name = path_name(path)
                return difference(call.path, name, rank, far[rank])
    return None


def _blocks(
    split: Step,
    plan: TensorParallelPlan,
    call: ModuleCall,
) -> tuple[int, ...] | None:
    module = split.model.get_submodule(call.path)
    prefix = f"{call.path}." if call.path else ""
    own = [
        plan[prefix + name]
        for name in module._parameters
        if prefix + name in plan.entries
    ]
    exchanged = any(entry.how == EXCHANGED for entry in own)
    if not own or exchanged or any(module.children()):
        return None
    return tuple(entry.pieces for entry in own)


def _far(shares: _Shares) -> list[Distance]:
    """How far each rank's tensor is from what it should be; nothing where they make the
    whole, or may."""
    right = [NOTHING_APART] * len(shares.parts)
    alone = [distance(part, shares.whole) for part in shares.parts]
    if all(d.relative <= shares.tolerance for d in alone):
        return right
    if any(map(shares.right, _together(shares))):
        return right
    dim = shares.dim
    if dim is None:
        alike = all(part.shape == shares.whole.shape for part in shares.parts)
        return alone if alike else right
    strays = [_stray(part, shares, dim) for part in shares.parts]
    if shares.blocks is None or not shares.covers(dim) or strays != right:
        return strays
    # each slice is the whole's, in another place
    order = torch.cat(shares.parts, dim)
    return [distance(order, shares.whole)]


def _together(shares: _Shares) -> Iterator[Tensor]:
    """What the ranks' tensors may make."""
    parts = shares.parts
    if all(part.shape == shares.whole.shape for part in parts):
        total = torch.stack(parts).sum(0)
        yield total
        yield total / len(parts)
        return
    dim = shares.dim
    if dim is None or not shares.covers(dim):
        return
    for count in (1, *(shares.blocks or USUAL_BLOCKS)):
        if any(part.shape[dim] % count for part in parts):
            continue
        cut = [part.unflatten(dim, (count, -1)).unbind(dim) for part in parts]
        in_order = itertools.chain(*zip(*cut))
        yield torch.cat(list(in_order), dim)


def _stray(part: Tensor, shares: _Shares, dim: int) -> Distance:
    """Of a slice of a shard that is none of the whole's."""
    slices = shares.whole.unbind(dim)
    for i, mine in enumerate(part.unbind(dim)):
        apart_by = [distance(mine, x).relative for x in slices]
        if min(apart_by) > shares.tolerance:
            note = f"slice {i} of dim {dim} of its shard is none of the whole's"
            return apart(note)
    return NOTHING_APART
