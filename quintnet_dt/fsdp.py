"""Under FSDP2: its hooks on modules that are split, and copies of modules that it
manages."""

import contextlib

from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from .private import compute_dtype, fsdp_state
from .utils import Quietly


def is_fsdp(hook):
    """Whether a module's hook is FSDP2's."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp")


def wrapped_by_fsdp1(model):
    """The path of the first module that FullyShardedDataParallel (FSDP1) wraps; ""
    where there is none."""
    return next(
        (
            path or "the model"
            for path, m in model.named_modules()
            if isinstance(m, FullyShardedDataParallel)
        ),
        "",
    )


def quieten(model):
    """FSDP2's hooks run within the forward of the module around theirs, whose calls may
    be counted."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            hooks.update(
                {key: Quietly(hook) for key, hook in hooks.items() if is_fsdp(hook)}
            )


@contextlib.contextmanager
def copyable(model, memo):
    """For a while, modules that FSDP2 manages have the class that they had before,
    which can be copied; its state is not copied with them. Yields the dtype that each
    of their parameters computes in, by the parameter's id."""
    managed = [m for m in model.modules() if isinstance(m, FSDPModule)]
    dtypes = {}
    for (
        m
    ) in managed:  # the outermost first, so that an inner one's parameters are its own
        state = fsdp_state(m)
        memo[id(state)] = state
        if dtype := compute_dtype(state):
            dtypes.update(
                (id(p), dtype) for p in m.parameters() if p.dtype.is_floating_point
            )
    classes = [type(m) for m in managed]
    try:
        for m, cls in zip(managed, classes):
            m.__class__ = cls.__mro__[cls.__mro__.index(FSDPModule) + 1]
        yield dtypes
    finally:
        for m, cls in zip(managed, classes):
            m.__class__ = cls
