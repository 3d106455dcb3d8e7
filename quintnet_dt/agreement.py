"""What the ranks of a tp group must have in common as a model runs: the batch, and what is random."""

import ctypes
import os
import sys
import zlib

import torch
import torch.distributed as dist

from .comm_ops import all_gather
from .processgroup import ProcessGroupManager
from .utils import leaves


def check_batch(batch, mesh, values=True):
    """Raise ValueError, on every rank, unless all ranks of a tp mesh were given the same batch; called on every rank.

    A sharded model does so by itself in its first calls of each kind; call this where a batch may come to differ later,
    say after each epoch. Costs one small exchange, and a checksum of the batch.

    Args:
        batch: tensors, numbers and strings, in tuples, lists, dicts and dataclasses.
        mesh: the 1-D DeviceMesh of the tp group (`model.tensor_parallel_mesh`), or a ProcessGroupManager.
        values: False compares what the tensors are, but not their values.
    """
    mesh = mesh.mesh if isinstance(mesh, ProcessGroupManager) else mesh
    mine = {path: _digest(x) if values else (_digest(x)[0], 0) for path, x in leaves(batch)}
    if _alike(zlib.crc32(repr(mine).encode()), mesh):
        return
    everyone = [None] * mesh.size()
    dist.all_gather_object(everyone, mine, group=mesh.get_group())
    for rank, other in enumerate(everyone):
        for path in {**everyone[0], **other}:
            (a, x), (b, y) = (ranks.get(path, ("nothing", 0)) for ranks in (everyone[0], other))
            if (a, x) != (b, y):
                where, values = "".join(f"[{key!r}]" for key in path), "" if a != b else ", with other values"
                raise ValueError(
                    f"the ranks of a tp group were given different batches: (args, kwargs){where} is {a} on rank 0 and "
                    f"{b}{values} on rank {rank}: give all of them the same (a DistributedSampler's rank is that of "
                    "the dp group, ProcessGroupManager.dp_rank)"
                )


def in_pipeline():
    """Whether this is called by torch.distributed.pipelining, which first runs a stage on uninitialised inputs, to
    learn the shapes of its outputs."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(_PIPELINING):
        frame = frame.f_back
    return frame is not None


_PIPELINING = os.path.join(os.path.dirname(dist.__file__), "pipelining", "")


def _digest(x):
    """(What it is, a checksum of its values)."""
    if not isinstance(x, torch.Tensor):
        return (repr(x), 0) if isinstance(x, (bool, int, float, str, type(None))) else (type(x).__name__, 0)
    what = f"a tensor of shape {tuple(x.shape)}, {x.dtype}"
    if x.device.type == "meta" or x.layout != torch.strided or type(x) is not torch.Tensor:
        return what, 0
    return what, _checksum(x.detach().cpu().contiguous())


def _checksum(x):
    """The CRC-32 of a tensor's bytes, in memory of the CPU."""
    return zlib.crc32((ctypes.c_char * x.nbytes).from_address(x.data_ptr())) if x.numel() else 0


def _alike(number, mesh):
    """Whether all ranks have the same number."""
    numbers = all_gather(torch.tensor([number], device=mesh.device_type), 0, mesh.get_group())
    return len(set(numbers.tolist())) == 1


def random_state(cuda):
    """Torch's states, of the CPU and, if asked for, of the present CUDA device."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if cuda else [])]


def set_random_state(states):
    """Go on from states that `random_state` gave; that of a CUDA device is left out where none is in use."""
    torch.set_rng_state(states[0])
    if len(states) > 1 and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states[1])


def share_random_state(mesh):
    """Every rank of a tp group goes on with the random state of its first, so that what is drawn outside a shard is the
    same on all of them, however they were seeded, and what is drawn for a shard is a part of the whole's."""
    states = random_state(mesh.device_type == "cuda")
    packed, group = torch.cat(states), mesh.get_group()
    if _alike(_checksum(packed), mesh):
        return
    packed = packed.to(mesh.device_type)
    dist.broadcast(packed, dist.get_global_rank(group, 0), group=group)
    set_random_state(packed.cpu().split([s.numel() for s in states]))
