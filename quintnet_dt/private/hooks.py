"""The hooks that users and tools have registered."""

import torch
from torch import nn


def global_hooks() -> list[dict]:
    """The hooks that run for every module, in the dicts that torch keeps them in."""
    names = (
        "_global_forward_pre_hooks",
        "_global_forward_hooks",
        "_global_backward_pre_hooks",
        "_global_backward_hooks",
    )
    return [getattr(torch.nn.modules.module, name, {}) for name in names]


def has_hooks(tensor: torch.Tensor) -> bool:
    """Whether hooks run on a tensor's gradient."""
    return bool(getattr(tensor, "_backward_hooks", None))


def share_hooks(old: torch.Tensor, new: torch.Tensor) -> None:
    """The hooks on one parameter's gradient become another's, with the handles that
    their user has."""
    for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if getattr(old, name, None):
            setattr(new, name, getattr(old, name))


def as_parameter(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that `isinstance(tensor, nn.Parameter)` holds of, as of what it stands
    for."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    if not tensor.requires_grad:  # it may be what a DTensor holds
        tensor = tensor.detach()
    tensor._is_param = True
    return tensor


def saves_by_hooks() -> bool:
    """Whether hooks for saved tensors are on, say a checkpoint's; as if they were where
    torch cannot tell."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None
