"""Under FSDP2: its hooks on modules that are split, and copies of modules that it
manages."""

import contextlib
from collections.abc import Callable

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard

from .private import _StridedShard, compute_dtype, fsdp_state
from .utils import Quietly


def fsdp_shard_placement(
    model: nn.Module,
) -> Callable[[nn.Parameter], Shard | None]:
    """Where FSDP2 is to shard the parameters of a split model:
    `fully_shard(module, shard_placement_fn=fsdp_shard_placement(model))`.

    Fused weights that the tp ranks share on dim 0, a part of each piece, it shards on
    dim 1, all others as always, on dim 0: so no rows are exchanged. The model is to be
    split with `contiguous="vectors"`.

    Args: `model`: what `apply_tensor_parallel` has split.
    Returns: a function that gives a parameter's Shard, None for FSDP2's own choice.
    Raises: ValueError, if a vector is in pieces, which has no other dim.
    """
    for name, p in model.named_parameters():
        if _in_pieces(p) and p.ndim == 1:
            raise ValueError(
                f"{name}: expected one block of a vector a rank, found {p.placements}:"
                ' give apply_tensor_parallel contiguous="vectors"'
            )
    return lambda p: Shard(1) if _in_pieces(p) else None


def _in_pieces(p: nn.Parameter) -> bool:
    """Whether a rank holds a part of each of several pieces of dim 0."""
    if not isinstance(p, DTensor):
        return False
    placement = p.placements[-1]
    return isinstance(placement, _StridedShard) and placement.dim == 0


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
