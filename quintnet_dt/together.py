"""What is done on every rank, and fails on every rank if it fails on one."""

import contextlib

import torch.distributed as dist


@contextlib.contextmanager
def together(group=None):
    """Run the body on every rank of a group (None: of the world; by itself where there is none). It must not communicate.

    Raises: the body's own Exception on the ranks where it raised one, RuntimeError that tells of it on the others.
    """
    error = None
    try:
        yield
    except Exception as e:
        error = e
    if dist.is_initialized():
        told = [None] * dist.get_world_size(group)
        dist.all_gather_object(told, error and f"{type(error).__name__}: {error}", group=group)
        failed = [f"rank {r}: {text}" for r, text in enumerate(told) if text]
        if failed and error is None:
            raise RuntimeError("failed on another rank: " + "; ".join(failed))
    if error is not None:
        raise error
