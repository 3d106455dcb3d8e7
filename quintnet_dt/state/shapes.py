"""A split model as it looked whole, for code that changes it by the shapes of its parameters."""

import contextlib

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..huggingface import unmarked
from .given import check_model


@contextlib.contextmanager
def whole_shapes(model):
    """Within it, plain parameters of the whole shapes (with no memory and no values: all NaN) stand
    for the DTensors of a split model.

    For libraries that add modules to it: peft makes adapters for the local shape where it finds a
    DTensor in a Linear. Afterwards the DTensors are back, wherever their stand-ins have been moved,
    with the stand-ins' requires_grad; apply_tensor_parallel then splits what was added.

        with whole_shapes(model):
            model = peft.get_peft_model(model, config)
        apply_tensor_parallel(model, tp_size=4)

    Raises TypeError for what is no nn.Module.
    """
    check_model(model)
    real = {}
    for module in model.modules():
        for attr, p in module._parameters.items():
            if isinstance(p, DTensor):
                if id(p) not in real:
                    nan = torch.full(
                        (),
                        torch.nan if p.dtype.is_floating_point else 0,
                        dtype=p.dtype,
                        device=p.device,
                    )
                    real[id(p)] = nn.Parameter(nan.expand(p.shape), p.requires_grad), p
                module._parameters[attr] = real[id(p)][0]
    try:
        with unmarked(model):
            yield model
    finally:
        back = {id(shown): p for shown, p in real.values()}
        for module in model.modules():
            for attr, shown in module._parameters.items():
                if id(shown) in back:
                    module._parameters[attr] = back[id(shown)].requires_grad_(shown.requires_grad)
