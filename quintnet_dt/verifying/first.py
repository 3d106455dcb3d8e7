"""The first module of a split model whose output is not the whole model's.

Within the model an output may be this rank's shard, or a part of a sum. So it is right
where the ranks' tensors together make the whole model's: each by itself, summed, as a
mean, or one after the other, each of so many blocks by itself.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..plan import EXCHANGED, TensorParallelPlan
from ..together import gather
from .compare import difference
from .report import Difference
from .step import ModuleCall, Step
from .tensors import NOTHING_APART, Distance, apart, distance, full

# q, k and v in one, or a gate and what it lets through
USUAL_BLOCKS = (1, 2, 3)


def first_output(
    split: Step,
    whole: Step,
    plan: TensorParallelPlan,
    tolerance: float,
    group: ProcessGroup,
) -> Difference | None:
    """The same on every rank of the group, all of which call this."""
    for call, expected in whole.outputs.items():
        mine = {path: full(x).cpu() for path, x in split.outputs.get(call, {}).items()}
        ranks = gather(mine, group)
        blocks = _blocks(split, plan, call)
        for path, x in expected.items():
            parts = [found[path] for found in ranks if path in found]
            if len(parts) < len(ranks) or not x.is_floating_point():
                continue
            rank, d = _worst(parts, full(x).cpu(), blocks, tolerance)
            if d.relative > tolerance:
                return difference(call.path, ".".join(map(str, path)), rank, d)
    return None


def _blocks(
    split: Step, plan: TensorParallelPlan, call: ModuleCall
) -> tuple[int, ...] | None:
    """In how many blocks a dim of what a module returns may be shared, by how its own
    weights are; None where that is not known."""
    module = split.model.get_submodule(call.path)
    prefix = f"{call.path}." if call.path else ""
    own = [
        plan[prefix + name]
        for name in module._parameters
        if prefix + name in plan.entries
    ]
    if not own or any(module.children()) or any(e.how == EXCHANGED for e in own):
        return None
    return tuple(e.pieces for e in own)


def _worst(
    parts: list[Tensor], whole: Tensor, blocks: tuple[int, ...] | None, tolerance: float
) -> tuple[int, Distance]:
    """The rank whose part is furthest from the whole, and how far; nothing where the
    parts make the whole, or may."""
    alone = [distance(part, whole) for part in parts]
    rank = max(range(len(parts)), key=lambda r: alone[r].relative)
    made = (distance(x, whole) for x in _together(parts, whole, blocks))
    if alone[rank].relative <= tolerance or any(d.relative <= tolerance for d in made):
        return rank, NOTHING_APART
    dim = _shared_dim(parts, whole)
    if dim is None:
        return rank, alone[rank]
    strays = [_stray(part, whole, dim, tolerance) for part in parts]
    rank = max(range(len(parts)), key=lambda r: strays[r].relative)
    covered = sum(part.shape[dim] for part in parts) == whole.shape[dim]
    if strays[rank].relative <= tolerance and blocks is not None and covered:
        return rank, distance(torch.cat(parts, dim), whole)
    return rank, strays[rank]


def _together(
    parts: list[Tensor], whole: Tensor, blocks: tuple[int, ...] | None
) -> Iterator[Tensor]:
    """What the ranks' tensors may make."""
    if all(part.shape == whole.shape for part in parts):
        total = torch.stack(parts).sum(0)
        yield total
        yield total / len(parts)
        return
    dim = _shared_dim(parts, whole)
    if dim is None or sum(part.shape[dim] for part in parts) != whole.shape[dim]:
        return
    for count in USUAL_BLOCKS if blocks is None else (1, *blocks):
        if any(part.shape[dim] % count for part in parts):
            continue
        cut = [part.unflatten(dim, (count, -1)).unbind(dim) for part in parts]
        yield torch.cat([block for same in zip(*cut) for block in same], dim)


def _shared_dim(parts: list[Tensor], whole: Tensor) -> int | None:
    """The one dim in which the ranks' tensors are shorter than the whole."""
    shapes = [part.shape for part in parts]
    if any(len(shape) != whole.dim() for shape in shapes):
        return None
    dims = {
        d for shape in shapes for d in range(whole.dim()) if shape[d] != whole.shape[d]
    }
    return dims.pop() if len(dims) == 1 else None


def _stray(part: Tensor, whole: Tensor, dim: int, tolerance: float) -> Distance:
    """How far that slice of a shard is from the whole's which is nearest to none."""
    slices = whole.unbind(dim)
    worst = NOTHING_APART
    for i, mine in enumerate(part.unbind(dim)):
        nearest = min((distance(mine, x) for x in slices), key=lambda d: d.relative)
        if nearest.relative > worst.relative:
            worst = nearest
            note = f"slice {i} of dim {dim} of its shard is none of the whole's"
    return apart(note) if worst.relative > tolerance else NOTHING_APART
