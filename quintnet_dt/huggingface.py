"""What transformers and peft look for on a split model of theirs: their trainers take
it, their `save_pretrained` saves the whole.

Nothing is imported: a model is transformers' if its class has the names below.
"""

import contextlib
import sys

import torch
from torch.distributed.tensor import DTensor

from .parts import modules

GATHER = (  # what transformers' save_pretrained asks for whole tensors
    "gather_sharded_state_dict_for_save"
)
# of a model that transformers split
MARKS = (
    "_tp_size",
    "_device_mesh",
    "_is_distributed_loading_by_transformers",
)


def mark(model, mesh):
    """Mark a model that was split, and models within it, as transformers marks those
    that it splits itself."""
    config_class = getattr(
        sys.modules.get("transformers.distributed"), "DistributedConfig", None
    )
    for module in modules(model):
        if hasattr(type(module), "save_pretrained") and hasattr(module, "peft_config"):
            vars(module)["_tp_size"] = mesh.size()  # peft then saves whole adapters
        config = getattr(module, "config", None)
        if not hasattr(type(module), GATHER) or config is None:
            continue
        setattr(module, GATHER, gathered)
        if (
            mesh.size() > 1
            and config_class is not None
            and all(hasattr(type(module), name) for name in MARKS)
        ):
            vars(module).update(zip(MARKS, (mesh.size(), mesh, True)))
            config.distributed_config = config_class(tp_size=mesh.size())


@contextlib.contextmanager
def unmarked(model):
    """For a while, a model that looks as if nobody had split it."""
    kept = [
        (vars(m), {name: vars(m).pop(name) for name in MARKS if name in vars(m)})
        for m in modules(model)
    ]
    try:
        yield
    finally:
        for attributes, marks in kept:
            attributes.update(marks)


def gathered(model, state, distributed_config=None, *, save_on_this_rank=True):
    """{name: whole tensor, on the CPU} of a state dict, on the ranks that save; {} on
    the others. On every rank."""
    whole = {}
    for name, x in state.items():
        x = x.detach().full_tensor() if isinstance(x, DTensor) else x
        if save_on_this_rank:
            whole[name] = (
                x.detach().cpu().contiguous() if isinstance(x, torch.Tensor) else x
            )
    return whole
