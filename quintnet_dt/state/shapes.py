"""A split model as it looked whole, for code that changes it by the shapes of its
parameters."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..huggingface import unmarked
from ..places import stand_in
from .given import check_model


@contextlib.contextmanager
def whole_shapes(model: nn.Module) -> Iterator[nn.Module]:
    """Within it, plain parameters of the whole shapes (with no memory and no values:
    all NaN) stand for the DTensors of a split model.

    For libraries that add modules to it: peft makes adapters for the local shape where
    it finds a DTensor in a Linear. Afterwards the DTensors are back, wherever their
    stand-ins have been moved, with the stand-ins' requires_grad; apply_tensor_parallel
    then splits what was added.

        with whole_shapes(model):
            model = peft.get_peft_model(model, config)
        apply_tensor_parallel(model, tp_size=4)

    Raises TypeError for what is no nn.Module.
    """
    check_model(model)
    real = {id(p): p for p in model.parameters() if isinstance(p, DTensor)}
    shown = {i: _without_values(p) for i, p in real.items()}
    stand_in(model, shown)
    try:
        with unmarked(model):
            yield model
    finally:
        for i, p in real.items():
            p.requires_grad_(shown[i].requires_grad)
        stand_in(model, {id(shown[i]): p for i, p in real.items()})


def _without_values(p):
    """A plain parameter of the shape of a DTensor."""
    value = torch.nan if p.dtype.is_floating_point else 0
    one = torch.full((), value, dtype=p.dtype, device=p.device)
    return nn.Parameter(one.expand(p.shape), p.requires_grad)
