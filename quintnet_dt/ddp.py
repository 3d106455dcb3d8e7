"""Under DistributedDataParallel(model, device_mesh=mesh["dp"]): it makes of every
DTensor parameter a plain one, its local tensor, of which it averages the gradient over
dp."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .private import DDP_SPEC

SPEC = (  # the attribute of such a parameter that says of which DTensor it is the local tensor
    "_tp_spec"
)


def take_local(model: nn.Module) -> None:
    """Before a forward: parameters are read as the plain ones that they are. DDP's own
    hooks, which would make DTensors of them for each forward, find nothing to do."""
    for p in model.parameters():
        if DDP_SPEC in vars(p):
            vars(p)[SPEC] = vars(p).pop(DDP_SPEC)


def is_local(p: torch.Tensor) -> bool:
    """Whether a parameter is the local tensor of what was a DTensor."""
    return SPEC in vars(p)


def whole_shape(p: torch.Tensor) -> tuple[int, ...]:
    """The shape of a parameter in the whole model."""
    return tuple(vars(p)[SPEC].shape if is_local(p) else p.shape)


def as_dtensor(p: torch.Tensor) -> torch.Tensor:
    """The DTensor that a parameter is, or is the local tensor of; a plain one as it
    is."""
    if not is_local(p):
        return p
    spec = vars(p)[SPEC]
    return DTensor.from_local(
        p.detach(),
        spec.mesh,
        spec.placements,
        run_check=False,
        shape=spec.shape,
        stride=spec.stride,
    )
