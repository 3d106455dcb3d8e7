"""Parameters whose local tensors are shown while a forward runs, by whatever way they are read."""

import contextlib
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..utils import quiet


class _Writable(torch.autograd.Function):
    """y = x, in the same memory, which may be written to: autograd refuses that of a view made by a Function."""

    @staticmethod
    def forward(ctx, x):
        return torch.empty(0, dtype=x.dtype, device=x.device).set_(
            x.untyped_storage(), x.storage_offset(), x.shape, x.stride()
        )

    @staticmethod
    def backward(ctx, grad):
        return grad


def writable(x):
    return _Writable.apply(x)


class Shown(NamedTuple):
    """A parameter that is shown: what was there before, and the tensor; the DTensor, and its local tensor that it is
    made of."""

    owner: nn.Module
    attr: str
    before: torch.Tensor
    tensor: torch.Tensor
    param: torch.Tensor
    local: torch.Tensor
    actions: tuple
    written: bool  # the forward writes to it


def now(owner, attr):
    """What a module gives for one of its parameters now."""
    return owner._parameters[attr] if attr in owner._parameters else vars(owner)[attr]


def show(owner, attr, tensor):
    """Let a module's parameter be `tensor` for now, by whatever way it is read."""
    if type(owner).__setattr__ is nn.Module.__setattr__:
        owner._parameters[attr] = tensor
        return
    if isinstance(tensor, nn.Parameter):  # a DTensor parameter's local tensor is marked as one
        tensor = tensor.view_as(tensor)
    owner._parameters.pop(attr, None)
    setattr(owner, attr, tensor)  # keeps a list of its own, as nn.LSTM does


def hide(shown):
    """End `show`. What the forward assigned to the `.data` of the tensor is the parameter's."""
    owner, attr, before, tensor = shown[:4]
    if shown.written:
        keep_data(shown.param, shown.local)
    if type(owner).__setattr__ is nn.Module.__setattr__:
        if owner._parameters.get(attr) is tensor:
            owner._parameters[attr] = before
        return
    vars(owner).pop(attr, None)
    setattr(owner, attr, before)


def keep_data(param, local):
    """What a forward assigned to the `.data` of a parameter's local tensor is the parameter's own."""
    with quiet():
        kept = param.detach()
        kept = kept.to_local() if isinstance(kept, DTensor) else kept
        if kept.data_ptr() == local.data_ptr():
            return
        if (kept.shape, kept.dtype) != (local.shape, local.dtype):
            raise RuntimeError(
                f"expected `.data` of a parameter to stay {tuple(kept.shape)}, {kept.dtype} in a forward that assigns "
                f"it, found {tuple(local.shape)}, {local.dtype}: write to it in place, or use another tensor"
            )
        kept.data.copy_(local.detach())


@contextlib.contextmanager
def put_back(context):
    """While a forward runs, for as long as something looks at the model itself: its parameters as they are between
    forwards."""
    shown = [s for running in context.running for s in running[2]]
    for s in reversed(shown):
        hide(s)
    try:
        yield
    finally:
        for s in shown:
            show(s.owner, s.attr, s.tensor)
