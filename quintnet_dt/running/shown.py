"""Parameters whose local tensors are shown while a forward runs, by whatever way they
are read."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from ..places import Place, put
from ..utils import quiet


class _Writable(torch.autograd.Function):
    """y = x, in the same memory, which may be written to: autograd refuses that of a
    view made by a Function."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.empty(0, dtype=x.dtype, device=x.device).set_(
            x.untyped_storage(), x.storage_offset(), x.shape, x.stride()
        )

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def writable(x: torch.Tensor) -> torch.Tensor:
    return _Writable.apply(x)


class Shown(NamedTuple):
    """A parameter that is shown: what was there before, and the tensor; the DTensor,
    and its local tensor that it is made of."""

    place: Place
    before: torch.Tensor
    tensor: torch.Tensor
    param: torch.Tensor
    local: torch.Tensor
    actions: tuple
    written: bool  # the forward writes to it


def hide(shown: Shown) -> None:
    """Put back what was there before. What the forward assigned to the `.data` of the
    tensor is the parameter's."""
    (owner, attr), before, tensor = shown.place, shown.before, shown.tensor
    if shown.written:
        keep_data(shown.param, shown.local)
    if owner._parameters.get(attr) is tensor:
        put(owner, attr, before)


def keep_data(param: torch.Tensor, local: torch.Tensor) -> None:
    """What a forward assigned to the `.data` of a parameter's local tensor is the
    parameter's own."""
    with quiet():
        kept = param.to_local() if isinstance(param, DTensor) else param
        if _place(kept) == _place(local):
            return
        if (kept.shape, kept.dtype) != (local.shape, local.dtype):
            raise RuntimeError(
                f"expected `.data` of a parameter to stay {tuple(kept.shape)},"
                f" {kept.dtype} in a forward that assigns it, found"
                f" {tuple(local.shape)}, {local.dtype}: write to it in place, or use"
                " another tensor"
            )
        kept.data.copy_(local.detach())


def _place(tensor: torch.Tensor) -> tuple[torch.UntypedStorage, int]:
    """Where a tensor's elements begin; of a fake one, which has no address, too."""
    return tensor.untyped_storage(), tensor.storage_offset()


@contextlib.contextmanager
def put_back(context: Any) -> Iterator[None]:
    """While a forward runs, for as long as something looks at the model itself: its
    parameters and numbers as they are between forwards."""
    shown = [s for running in context.running for s in running.shown]
    numbers = [r.numbers for r in context.running if r.numbers is not None]
    for s in reversed(shown):
        hide(s)
    for n in numbers:
        n.hide()
    try:
        yield
    finally:
        for s in shown:
            put(s.place.owner, s.place.attr, s.tensor)
        for n in numbers:
            n.show()
