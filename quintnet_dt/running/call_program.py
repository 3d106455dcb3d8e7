"""What a program does around a single call."""

from dataclasses import replace as changed
from typing import Any, Callable

import torch

from ..axes.action import GATHER, Action
from ..groups import Group, SimulatedGroup, group_size
from ..keys import ArgPath
from ..private import RecomputationEnds
from ..utils import lookup, quiet, replace, tensors
from .context import Context
from .memory import laid_out
from .on_shard import on_shard
from .program import CallProgram
from .record import Frame
from .sizes import LocalSize


def run_program(
    call: CallProgram, frame: Frame, func: Callable, args: tuple, kwargs: dict
) -> Any:
    """Make a call as its program says."""
    context, whole = frame.context, (args, kwargs)
    if not call.buffers:
        args, kwargs = _arguments(call, frame, args, kwargs)
        return context.apply(_make(call, context, func, args, kwargs), call.outputs)
    parts = {
        path: context.act([a], lookup(whole, path)) for path, a in call.buffers.items()
    }
    args, kwargs = _arguments(call, frame, *replace(whole, parts))
    try:
        out = _make(call, context, func, args, kwargs)
    except RecomputationEnds:  # the call has written to the buffers by then
        _gather_buffers(context, whole, (args, kwargs), call.buffers)
        raise
    _gather_buffers(context, whole, (args, kwargs), call.buffers)
    return context.apply(out, call.outputs)


def _arguments(
    call: CallProgram, frame: Frame, args: tuple, kwargs: dict
) -> tuple[tuple, dict]:
    """What a call is given on shards."""
    args, kwargs = frame.context.apply((args, kwargs), call.inputs, call.unwritten)
    if call.sizes:
        group = frame.context.group
        args, kwargs = resize((args, kwargs), call.sizes, group, frame)
    if call.bounds:
        args, kwargs = replace(
            (args, kwargs),
            {p: b.local(frame.context.group) for p, b in call.bounds.items()},
        )
    if call.order is not None:
        args, kwargs = _in_order(args, kwargs, call.order)
    return args, kwargs


def _make(
    call: CallProgram, context: Context, func: Callable, args: tuple, kwargs: dict
) -> Any:
    proof = isinstance(context.group, SimulatedGroup) and not context.group.counts
    if call.instead is None or proof:  # a proof compares the model's own call
        return func(*args, **kwargs)
    with quiet():
        return on_shard(context, call.instead, func, args, kwargs, call.order)


def _in_order(args: tuple, kwargs: dict, order: tuple[int, ...]) -> tuple[tuple, dict]:
    """The first tensor that a call is given, laid out in this order in memory."""
    path, x = next(tensors((args, kwargs)))
    with quiet():
        return replace((args, kwargs), {path: laid_out(x, order)})


def resize(obj: Any, sizes: dict[ArgPath, LocalSize], group: Group, where: Any) -> Any:
    """Make the sizes at some paths what they must be on this rank's shard."""
    local: dict[ArgPath, int] = {}
    for path, rule in sizes.items():
        size = lookup(obj, path)
        new = rule.local(size, group) if isinstance(size, int) else None
        if new is None:
            where = getattr(where, "path", where)
            raise RuntimeError(
                f"{where}: expected a size that {group_size(group)} ranks share, as when"
                f" it was traced, found {size}"
            )
        local[path] = new
    return replace(obj, local)


def _gather_buffers(
    context: Context, whole: Any, parts: Any, at: dict[ArgPath, Action]
) -> None:
    """Write what a call made of the parts of buffers into the whole ones: those that
    are alike in one collective."""
    with quiet(), torch.no_grad():
        alike: dict[tuple, dict[ArgPath, torch.Tensor]] = {}
        for p, a in at.items():
            x = lookup(parts, p)
            alike.setdefault((a, x.shape, x.dtype), {})[p] = x
        for (a, _, _), made in alike.items():
            gather = Action(GATHER, changed(a.split, dim=a.split.dim + 1))
            for p, x in zip(made, context.act([gather], torch.stack([*made.values()]))):
                lookup(whole, p).copy_(x)
