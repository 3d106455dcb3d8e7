"""Which parts of a whole tensor a rank holds, whatever its layout: what checkpoints are written
from and read into."""

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from ..comm_ops import chunk_sizes
from ..private import _StridedShard


@dataclass(frozen=True)
class Chunk:
    """A block of a whole tensor: where it starts in each dim, and this rank's memory of it (a view
    of its shape)."""

    offsets: tuple
    tensor: torch.Tensor


def chunks(tensor):
    """The blocks of a tensor that this rank holds, as a list of Chunk; empty where it has none of
    it.

    A plain or replicated tensor is one block at 0, a shard one block, a fused weight of k pieces
    (`_StridedShard(dim, k)`, which torch.distributed.checkpoint cannot place) k blocks. Writing to
    a block writes to the tensor. Raises ValueError for a DTensor with a Partial placement, and for
    pieces that are sharded again on the same dim (FSDP2 over a plan that is not `contiguous`),
    which no torch function places rightly.
    """
    if not isinstance(tensor, DTensor):
        return [Chunk((0,) * tensor.dim(), tensor.detach())]
    local, mesh, fused = tensor.detach().to_local(), tensor.device_mesh, None
    if mesh.get_coordinate() is None or not local.numel() and tensor.numel():
        return []
    if any(p.is_partial() for p in tensor.placements):
        raise ValueError(
            f"expected a tensor that is sharded or replicated, found {tensor.placements}"
        )
    if isinstance(tensor.placements[-1], _StridedShard):  # one of FSDP2's is never the last: tp is
        fused, dim = tensor.placements[-1], tensor.placements[-1].dim
        again = [
            p
            for p, n in zip(tensor.placements[:-1], mesh.shape)
            if not p.is_replicate() and p.dim == dim and n > 1
        ]
        if again:
            raise ValueError(
                f"found placements {tensor.placements}: pieces of a fused weight, sharded again on"
                " the same dim; give apply_tensor_parallel contiguous=True"
            )
    (block,) = tensor.__create_chunk_list__()
    offsets = tuple(block.offsets)
    if fused is None:
        return [Chunk(offsets, local)]
    whole, k = tensor.shape[fused.dim], fused.split_factor
    sizes, rank = chunk_sizes(whole // k, mesh.size(-1)), mesh.get_coordinate()[-1]
    starts = [piece * (whole // k) + sum(sizes[:rank]) for piece in range(k)]
    at = [(*offsets[: fused.dim], start, *offsets[fused.dim + 1 :]) for start in starts]
    return (
        [Chunk(a, part) for a, part in zip(at, local.split(sizes[rank], fused.dim))]
        if sizes[rank]
        else []
    )
