"""Sharded checkpoints of a training run: each rank writes and reads its own part, any
layout loads what any other saved.

A checkpoint is a folder (see folder.py) of what torch.distributed.checkpoint writes
(`*.distcp`, `.metadata`; it can load them too), and `state.pt` for all that is no
tensor of the model or the optimizer.
"""

import io
import os
import secrets
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from ..agreement import random_state, set_random_state
from ..together import gather, together
from .contents import (
    check_fit,
    collect,
    model_state,
    name_of,
    nested,
    optimizer_to_fill,
    packed,
    plain,
)
from .dcp import Blocks, Reader, run_dcp
from .folder import (
    INDEX,
    STATE,
    begin,
    checksums,
    finish,
    marked,
    remove,
    saving,
    write_file,
)
from .given import check_model, check_optimizer, path_of
from .index import check_whole
from .opened import opened
from .saved import index_of, state_of


def save_checkpoint(
    path: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    extra: Any = None,
    async_: bool = False,
) -> Future | None:
    """Save a model, its optimizer and the ranks' random state; called on every rank.

    Atomic: killed at any moment, `load_checkpoint(path)` finds this checkpoint or the
    one before it. All ranks must see the same file system.

    Args:
        path: the checkpoint's folder, or a link to one. A checkpoint that is there is
            replaced (files that you put into it stay there); anything else is left
            alone, with an error.
        model: sharded by `apply_tensor_parallel`, by FSDP2 on top of it, or plain. What
            its `state_dict` holds is saved.
        optimizer: a torch.optim.Optimizer of the model's parameters.
        extra: what else the run needs, the same on every rank (rank 0's is saved):
            numbers, strings, tensors, in lists and dicts, such as the step and the
            `state_dict` of a scheduler.
        async_: copy everything now, and write while training goes on; call the result's
            `result()` before the next save.

    Returns: None, or with `async_` a concurrent.futures.Future, whose `result()` raises
    what went wrong.
    Raises: ValueError, TypeError, OSError, RuntimeError, on every rank, also when only
    one failed; what was there before is then as it was.
    """
    group = None
    with together(group):
        path = _checked(path, model, optimizer)
        items, state = collect(model, optimizer)
        state["extra"] = extra
    mine = _dp_leader(model), random_state(torch.cuda.is_initialized())
    # by tp group, that of its first rank
    state["random"] = dict(reversed(gather(mine)))
    if not async_:
        return _write(path, items, state, group)
    with together(group):
        items = {path: blocks.copied() for path, blocks in items.items()}
        state = torch.load(io.BytesIO(packed(state)), weights_only=True)  # a copy
    if dist.is_initialized():
        # the thread's collectives must not meet those of the training
        group = dist.new_group(backend="gloo")
    pool = ThreadPoolExecutor(1, "save_checkpoint")
    future = pool.submit(_write, path, items, state, group)
    pool.shutdown(wait=False)
    return future


def load_checkpoint(
    path: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
) -> Any:
    """Load what `save_checkpoint` saved, in this or any other layout, bit for bit;
    called on every rank.

    Everything is checked before anything is changed: the files against their checksums,
    names, shapes and dtypes against the model's. No code that a checkpoint may hold is
    run. The random state is restored too: each rank gets that of the ranks with its
    data-parallel index.

    A save that runs meanwhile does no harm: what is loaded is one checkpoint, or an
    error is raised.

    Args: as for `save_checkpoint`. The optimizer may be new, its groups hold the same
    parameters.
    Returns: `extra`.
    Raises: FileNotFoundError, TypeError, ValueError, RuntimeError, on every rank, also
    when only one failed.
    """
    with together():
        path = _checked(path, model, optimizer)
    with opened(path) as checkpoint:
        return _load(checkpoint, model, optimizer)


def _checked(path, model, optimizer):
    """The folder that is meant, where a link leads to."""
    path = path_of("path", path)
    check_model(model)
    check_optimizer(optimizer)
    return Path(os.path.realpath(path))


# ---- random state


def _dp_leader(model):
    """The first rank of this rank's tp group: what is random is the same in all of
    it."""
    mesh = getattr(plain(model), "tensor_parallel_mesh", None)
    return (
        int(mesh.mesh.min())
        if mesh is not None
        else dist.get_rank() if dist.is_initialized() else 0
    )


def _restore_random(model, saved):
    """Ranks take the state of those that had their place among the tp groups."""
    leaders = sorted(set(gather(_dp_leader(model))))
    set_random_state(
        saved[sorted(saved)[leaders.index(_dp_leader(model)) % len(saved)]]
    )


# ---- writing


def _write(path, items, state, group):
    rank = dist.get_rank(group) if dist.is_initialized() else 0
    first, token = rank == 0, gather(secrets.token_hex(8), group)[0]
    temporary = saving(path, token)
    try:
        with together(group):
            if first:
                begin(path, token)
                write_file(temporary / STATE, packed(state))
        with together(group):
            if not marked(temporary, path, token):
                raise FileNotFoundError(
                    f"{temporary}: expected the folder that rank 0 made, found none:"
                    " all ranks must save to one file system, by the same path"
                )
        run_dcp(
            dcp.save,
            nested(items),
            storage_writer=dcp.FileSystemWriter(temporary),
            process_group=group,
        )
        with together(group):
            sums = checksums(
                [*temporary.glob(f"__{rank}_*")]
                + [temporary / STATE, temporary / INDEX] * first
            )
        files = {
            name: found for sums in gather(sums, group) for name, found in sums.items()
        }
        with together(group):
            if first:
                finish(path, token, files)
    except BaseException:
        if first and marked(temporary, path, token):
            remove(temporary)
        raise
    finally:
        if group is not None:
            dist.destroy_process_group(group)


# ---- reading


def _load(checkpoint, model, optimizer):
    with together():
        checkpoint.verify()
    with together():  # only now: what a damaged file is read as, is no matter
        index, state = index_of(checkpoint), state_of(checkpoint)
        saved, path = index.state_dict_metadata, checkpoint.path
        items = {
            name_of(("model", k)): Blocks.of(t)
            for k, t in model_state(model)[0].items()
        }
        check_fit(path, items, saved, {n for n in saved if n.startswith("model.")})
        if optimizer is not None:
            filled = optimizer_to_fill(
                path, model, optimizer, saved, state["optimizer"]
            )
            items |= filled.blocks
        check_whole(path / INDEX, index, items, checkpoint.files)
    run_dcp(dcp.load, items, storage_reader=Reader(checkpoint, index))
    if optimizer is not None:
        optimizer.state.clear()
        optimizer.state.update(filled.state)
        for group, options in zip(optimizer.param_groups, filled.groups):
            group.update(options)
    if state["objects"]:
        model.load_state_dict(state["objects"], strict=False)
    _restore_random(model, state["random"])
    return state["extra"]
