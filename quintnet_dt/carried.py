"""Tensors of dtypes that a backend does not send (gloo: float8, int16, unsigned ones)
go as others of the same size: what is only moved keeps its bits."""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

# and all floats and complex ones from 2 bytes
_SENT = {
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
}
_OF_SIZE = {1: torch.uint8, 2: torch.bfloat16, 4: torch.int32, 8: torch.int64}


def carried(t: torch.Tensor) -> torch.Tensor:
    """A view of a tensor, of a dtype that every backend sends; itself where its own is
    one."""
    wide = t.dtype.itemsize > 1 and (t.dtype.is_floating_point or t.dtype.is_complex)
    return t if wide or t.dtype in _SENT else t.view(_OF_SIZE[t.dtype.itemsize])


def distribute(
    t: torch.Tensor, mesh: DeviceMesh, placement: Placement, src_data_rank: int | None
) -> DTensor:
    """`distribute_tensor` of a tensor of any dtype over a 1-D mesh."""
    sent = carried(t)
    split = distribute_tensor(sent, mesh, [placement], src_data_rank=src_data_rank)
    if sent is t:
        return split
    local = split.to_local().view(t.dtype)
    return DTensor.from_local(
        local,
        mesh,
        [placement],
        run_check=False,
        shape=split.shape,
        stride=split.stride(),
    )


def whole_of(t: DTensor) -> torch.Tensor:
    """`full_tensor()` of a DTensor of any dtype."""
    local = t.to_local()
    sent = carried(local)
    if sent is local:
        return t.full_tensor()
    split = DTensor.from_local(
        sent,
        t.device_mesh,
        t.placements,
        run_check=False,
        shape=t.shape,
        stride=t.stride(),
    )
    return split.full_tensor().view(t.dtype)
