"""What every rank does, or none: a step that fails on one rank raises on all of
them."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup


@contextlib.contextmanager
def together(group: ProcessGroup | None = None) -> Iterator[None]:
    """Around a step that every rank of a group takes (the whole world by default; with
    no process group, this process alone).

    An exception within it is told to all ranks at its end: the ranks that failed raise
    their own, the others a RuntimeError that names the ranks and their errors. Where
    the step communicates after a point at which a rank may fail, the others would wait
    for it: ask first, by one of these within the other, whether all ranks came so far.

        with together():
            header = read(file)
            with together():
                pass
            dist.broadcast(tensor, 0)
    """
    error: BaseException | None = None
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # torch's CheckpointException is no Exception
        if hasattr(e, _TOLD):
            raise
        error = e
    if dist.is_initialized():
        told: list = [None] * dist.get_world_size(group)
        dist.all_gather_object(
            told, error and f"{type(error).__name__}: {error}", group=group
        )
        error = error or _failed(told, group)
    if error is not None:
        setattr(error, _TOLD, True)
        raise error


def any_rank(yes: bool, group: ProcessGroup) -> bool:
    """Whether any rank of a group says yes. Within `together`, every rank that does not
    fail asks this; where one fails in its place, it raises RuntimeError on the
    others."""
    told: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, bool(yes), group=group)
    if (error := _failed(told, group)) is not None:
        setattr(error, _TOLD, True)
        raise error
    return any(told)


def _failed(told: list, group: ProcessGroup | None) -> RuntimeError | None:
    """The error to raise for those that ranks told of; None where there are none."""
    errors = [(r, e) for r, e in enumerate(told) if isinstance(e, str)]
    failed = [
        f"rank {dist.get_global_rank(group, r) if group else r}: {e}" for r, e in errors
    ]
    return (
        RuntimeError("failed on another rank: " + "; ".join(failed)) if failed else None
    )


_TOLD = "_told_to_all_ranks"  # the attribute of such an exception


def gather(x: Any, group: ProcessGroup | None = None) -> list:
    """Every rank's x, in the order of the ranks of a group (the world by default); of a
    picklable object."""
    if not dist.is_initialized():
        return [x]
    everyone: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, x, group=group)
    return everyone
