"""What every rank does, or none: a step that fails on one rank raises on all of them."""

import contextlib

import torch.distributed as dist


@contextlib.contextmanager
def together(group=None):
    """Around a step that every rank of a group takes (the whole world by default; with no process group, this process alone).

    An exception within it is told to all ranks at its end: the ranks that failed raise their own, the others a RuntimeError that names the ranks
    and their errors. The step may not communicate after the point where a rank may fail, as the others would wait for it there.

        with together():
            read(file)
    """
    error = None
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # torch's CheckpointException is no Exception
        error = e
    if dist.is_initialized():
        told = [None] * dist.get_world_size(group)
        dist.all_gather_object(told, error and f"{type(error).__name__}: {error}", group=group)
        failed = [f"rank {dist.get_global_rank(group, r) if group else r}: {e}" for r, e in enumerate(told) if e]
        if failed and error is None:
            raise RuntimeError("failed on another rank: " + "; ".join(failed))
    if error is not None:
        raise error
