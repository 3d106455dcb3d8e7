"""Which parts of a whole tensor a rank holds, whatever its layout: what checkpoints are
written from and read into."""

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from ..axes.split import Split
from ..private import _StridedShard, own_chunk_list


@dataclass(frozen=True)
class Chunk:
    """A block of a whole tensor: where it starts in each dim, and this rank's memory of
    it (a view of its shape)."""

    offsets: tuple
    tensor: torch.Tensor


def chunks(tensor):
    """The blocks of a tensor that this rank holds, as a list of Chunk; empty where it
    has none of it.

    A plain or replicated tensor is one block at 0, a shard one block, a fused weight of
    k pieces (`_StridedShard(dim, k)`) k blocks. Writing to a block writes to the
    tensor. Raises ValueError for a DTensor with a Partial placement, and for pieces
    that are sharded again on the same dim (FSDP2 over a plan that is not `contiguous`),
    which no torch function places rightly.
    """
    if not isinstance(tensor, DTensor):
        return [Chunk((0,) * tensor.dim(), tensor.detach())]
    local, mesh = tensor.detach().to_local(), tensor.device_mesh
    if mesh.get_coordinate() is None or not local.numel() and tensor.numel():
        return []
    if any(p.is_partial() for p in tensor.placements):
        raise ValueError(
            "expected a tensor that is sharded or replicated, found"
            f" {tensor.placements}"
        )
    fused = tensor.placements[-1]
    (block,) = own_chunk_list(tensor)
    if not isinstance(fused, _StridedShard):  # one of FSDP2's is never the last: tp is
        return [Chunk(tuple(block.offsets), local)]
    _check_not_sharded_again(tensor, fused.dim)
    return _fused_chunks(tensor, local, tuple(block.offsets), fused)


def _fused_chunks(
    tensor: DTensor, local: torch.Tensor, offsets: tuple, fused: _StridedShard
) -> list[Chunk]:
    """The blocks of a weight of k fused pieces. `offsets`: where it begins in the other
    dims."""
    dim, mesh = fused.dim, tensor.device_mesh
    split = Split.of_blocks(dim, tensor.shape[dim], fused.split_factor)
    ranges = split.ranges(mesh.get_coordinate()[-1], mesh.size(-1))
    parts = local.split([r.length for r in ranges], dim)
    return [
        Chunk((*offsets[:dim], r.start, *offsets[dim + 1 :]), part)
        for r, part in zip(ranges, parts)
        if r.length
    ]


def _check_not_sharded_again(tensor: DTensor, dim: int) -> None:
    outer = zip(tensor.placements[:-1], tensor.device_mesh.shape)
    if any(not p.is_replicate() and p.dim == dim and n > 1 for p, n in outer):
        raise ValueError(
            f"found placements {tensor.placements}: pieces of a fused weight, sharded"
            " again on the same dim; give apply_tensor_parallel contiguous=True"
        )
