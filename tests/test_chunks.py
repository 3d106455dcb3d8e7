"""Which blocks of a whole tensor each rank holds: together, by every layout, the
whole."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.placement_types import _StridedShard

from quintnet_dt.state.chunks import chunks


def assembled(tensor):
    """The whole, put together from every rank's blocks."""
    mine = [(c.offsets, c.tensor) for c in chunks(tensor)]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    whole = torch.full(tensor.shape, float("nan"), dtype=tensor.dtype)
    for offsets, part in (block for blocks in everyone for block in blocks):
        whole[tuple(slice(o, o + s) for o, s in zip(offsets, part.shape))] = part
    return whole


def holder(tensor):
    module = torch.nn.Module()
    module.p = torch.nn.Parameter(tensor)
    return module


@pytest.mark.parametrize("n", [2, 3])
def test_one_mesh_dim(n):
    def ranks(rank):
        mesh = init_device_mesh("cpu", (n,), mesh_dim_names=("tp",))
        for shape in (12, 5), (13, 7), (2, 3), (0, 4):
            whole = torch.arange(shape[0] * shape[1]).double().view(shape)
            for placement in Shard(0), Shard(1), Replicate():
                assert torch.equal(
                    assembled(distribute_tensor(whole, mesh, [placement])), whole
                ), (
                    shape,
                    placement,
                )
        for k, dim in (2, 0), (3, 0), (2, 1):
            whole = torch.arange(36 * 12).double().view(36, 12)
            fused = distribute_tensor(whole, mesh, [_StridedShard(dim, split_factor=k)])
            assert len(chunks(fused)) == k and torch.equal(assembled(fused), whole)
        assert (
            torch.equal(assembled(whole), whole) and assembled(torch.tensor(3.0)) == 3
        )
        chunks(fused)[0].tensor.zero_()
        assert not fused.full_tensor()[:, : 6 // n].any()
        with pytest.raises(ValueError, match="Partial"):
            chunks(DTensor.from_local(whole, mesh, [Partial()]))

    run_ranks(ranks, n)


def test_fsdp_over_tensor_parallel():
    def ranks(rank):
        for shape in (2, 2), (4, 1), (1, 4):
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
            for size in (12, 4), (13, 6), (5, 8):
                for placement in (
                    Shard(0),
                    Shard(1),
                    Replicate(),
                    _StridedShard(1, split_factor=2),
                ):
                    if isinstance(placement, _StridedShard) and size[1] % (
                        2 * shape[1]
                    ):
                        continue
                    whole = torch.arange(size[0] * size[1]).double().view(size)
                    model = holder(distribute_tensor(whole, mesh["tp"], [placement]))
                    fully_shard(model, mesh=mesh["dp"])
                    assert model.p.device_mesh.ndim == 2
                    assert torch.equal(assembled(model.p), whole), (
                        shape,
                        size,
                        placement,
                    )
        mesh = init_device_mesh(
            "cpu", (2, 1, 2), mesh_dim_names=("replicate", "shard", "tp")
        )
        model = holder(distribute_tensor(whole, mesh["tp"], [Shard(0)]))
        fully_shard(model, mesh=mesh["replicate", "shard"])
        assert torch.equal(assembled(model.p), whole)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        model = holder(
            distribute_tensor(
                torch.ones(12, 4), mesh["tp"], [_StridedShard(0, split_factor=3)]
            )
        )
        fully_shard(model, mesh=mesh["dp"])
        with pytest.raises(ValueError, match="contiguous=True"):
            chunks(model.p)

    run_ranks(ranks, 4)
