"""DTensor, and what FSDP2, DistributedDataParallel and torch's loading do with
DTensors."""

import copy
import inspect
import sys
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .absent import absent

# Before it, DTensor cannot gather a _StridedShard of a 1-D mesh, and compiled
# collectives lose what they write.
SINCE_2_13 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
# Where DistributedDataParallel(device_mesh=...) notes of what a parameter is the local
# tensor.
DDP_SPEC = "_st_info"

# A dim of k fused pieces, each sharded ([q | k | v]).
try:
    from torch.distributed.tensor.placement_types import _StridedShard
except ImportError:
    _StridedShard = absent("torch.distributed.tensor.placement_types._StridedShard")

# `replicate` over dp is FSDP2 with a state of its own.
try:
    from torch.distributed import _composable_state
except ImportError:  # then its mixed precision is not seen while calls are planned
    _composable_state = None


# One block of a DTensor as torch has it, whatever state/pieces.py has taught DTensor.
_chunk_list = getattr(
    DTensor, "__create_chunk_list__", absent("DTensor.__create_chunk_list__")
)
own_chunk_list = getattr(_chunk_list, "own", _chunk_list)

# Whether a DTensor is made of what `_Read` takes it for; else it is read by to_local.
_AS_READ = {"_local_tensor", "_spec"} <= set(getattr(DTensor, "__slots__", ()))


class _Read(torch.autograd.Function):
    """A DTensor's local tensor, as `to_local` gives it, whose backward takes a sixth of
    the time: the gradient is a DTensor of the parameter's own spec."""

    @staticmethod
    def forward(ctx: Any, param: Any) -> torch.Tensor:
        local = param._local_tensor
        ctx.spec, ctx.stride = param._spec, local.stride()
        ctx.set_materialize_grads(False)
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> Any:
        if grad is None:
            return None
        spec = ctx.spec
        if grad.stride() != ctx.stride:
            # a DTensor's stride is to be that of its local tensor
            grad = grad.new_empty_strided(grad.shape, ctx.stride).copy_(grad)
        if not torch.is_grad_enabled():
            # without its `__init__`, which does nothing, in 3 us
            return DTensor.__new__(DTensor, grad, copy.copy(spec), requires_grad=False)
        whole = {"shape": spec.shape, "stride": spec.stride}
        return DTensor.from_local(grad, spec.mesh, spec.placements, **whole)


def read_local(param: Any) -> torch.Tensor:
    """This rank's part of a DTensor; differentiable."""
    if not _AS_READ or torch.compiler.is_compiling():
        return param.to_local()
    if torch.is_grad_enabled() and param.requires_grad:
        return _Read.apply(param)
    return param._local_tensor.detach()


def fsdp_state(module: nn.Module) -> Any:
    """The state of a module that FSDP2, or `replicate`, which is made of it, manages;
    None where it cannot be found."""
    from torch.distributed.fsdp import fully_shard

    state_of = getattr(_composable_state, "_get_module_state", lambda module: None)
    return fully_shard.state(module) or state_of(module)


def compute_dtype(state: Any) -> torch.dtype | None:
    """The dtype that FSDP2 computes in, of a module's FSDP state, which alone has it;
    None for the parameters'."""
    return getattr(getattr(state, "_mp_policy", None), "param_dtype", None)


def broadcasting() -> bool:
    """Whether torch's set_model_state_dict or set_state_dict runs in this thread with
    broadcast_from_rank0=True. It is told by the public functions' own code and their
    public argument; what they call is not looked at."""
    from torch.distributed.checkpoint import state_dict

    setters = (state_dict.set_model_state_dict, state_dict.set_state_dict)
    codes = {inspect.unwrap(setter).__code__ for setter in setters}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back
    options = None if frame is None else frame.f_locals.get("options")
    return getattr(options, "broadcast_from_rank0", False)
