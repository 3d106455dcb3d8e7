"""What the ranks of a tp group must have in common: the model and its plan, then, as it
runs, the batch and what is random."""

import ctypes
import hashlib
import os
import sys
import uuid
import zlib
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .around import undisturbed
from .canonical import canonical
from .comm_ops import all_gather
from .processgroup import ProcessGroupManager
from .utils import leaves


def agree(
    model: nn.Module, options: dict[str, Any], programs: Any, mesh: DeviceMesh
) -> str:
    """Raise RuntimeError, on every rank, unless all ranks of a tp group are about to
    split the same model in the same way; called on every rank, before any collective
    depends on it.

    Args: `options`: {name: value} of what the user chose for all ranks; `programs`:
    data, what the plan will run.
    Returns: a text that is the same on all of them, and that no other split has.
    """
    held, group = {**_held(model), **options}, mesh.get_group()
    digest = hashlib.sha256(canonical(([*held.items()], programs)).encode()).hexdigest()
    everyone: list = [None] * mesh.size()
    dist.all_gather_object(everyone, (digest, uuid.uuid4().hex), group=group)
    if len({digest for digest, _ in everyone}) == 1:
        return everyone[0][1]
    dist.all_gather_object(everyone, held, group=group)
    for rank, other in enumerate(everyone):
        if found := _difference(everyone[0], other, rank):
            raise RuntimeError(f"{found} on every rank")
    raise RuntimeError(
        "the ranks made different plans for one model; pass the same example_inputs and"
        " plan, and register the same hooks, on every rank"
    )


def agree_on(programs: Any, mesh: DeviceMesh) -> None:
    """Raise RuntimeError, on every rank, unless all are about to run a new kind of call
    by the same programs."""
    digests: list = [None] * mesh.size()
    mine = hashlib.sha256(canonical(programs).encode()).hexdigest()
    dist.all_gather_object(digests, mine, group=mesh.get_group())
    if len(set(digests)) > 1:
        raise RuntimeError(
            "the ranks of a tp group would run this call in different ways: give all of"
            " them the same arguments (and dicts in the same order), and register the"
            " same hooks"
        )


def _held(model: nn.Module) -> dict[str, str]:
    """What a model holds, in its order: {name: a text}."""
    held = {}
    for kind, tensors in ("parameter", model.named_parameters()), (
        "buffer",
        model.named_buffers(),
    ):
        for name, t in tensors:
            meta = ", on the meta device" if t.is_meta else ""
            held[f"{kind} {name}"] = (
                f"{tuple(t.shape)} {t.dtype} requires_grad={t.requires_grad}{meta}"
            )
    return held


def _difference(first: dict, other: dict, rank: int) -> str | None:
    """The first thing that rank 0 and another have otherwise, and what to do about it;
    None where nothing is."""
    for name in {**first, **other}:
        a, b = first.get(name, "absent"), other.get(name, "absent")
        if a != b and name.partition(" ")[0] in ("parameter", "buffer"):
            return (
                f"the model differs between ranks: {name} is {a} on rank 0 and {b} on"
                f" rank {rank}; build the same model"
            )
        if a != b:
            return (
                f"{name} is {a} on rank 0 and {b} on rank {rank}; give"
                " apply_tensor_parallel the same"
            )
    for a, b in zip(first, other):
        if a != b:
            where = f"where rank 0 has {a}, rank {rank} has {b}"
            return (
                f"the model holds the same in another order: {where} (made in the order"
                " of a set?); build it alike"
            )
    return None


@undisturbed
def check_batch(
    batch: Any, mesh: DeviceMesh | ProcessGroupManager, values: bool = True
) -> None:
    """Raise ValueError, on every rank, unless all ranks of a tp mesh were given the
    same batch; called on every rank.

    A sharded model does so by itself in its first calls of each kind; call this where a
    batch may come to differ later, say after each epoch. Costs one small exchange, and
    a checksum of the batch.

    Args:
        batch: tensors, numbers and strings, in tuples, lists, dicts and dataclasses.
        mesh: the 1-D DeviceMesh of the tp group (`model.tensor_parallel_mesh`), or a
            ProcessGroupManager.
        values: False compares what the tensors are, but not their values.

    Raises: TypeError where `mesh` is neither.
    """
    mesh = mesh.mesh if isinstance(mesh, ProcessGroupManager) else mesh
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            "mesh: expected a 1-D DeviceMesh or a ProcessGroupManager, found"
            f" {type(mesh).__name__}"
        )
    mine = {
        path: _digest(x) if values else (_digest(x)[0], 0) for path, x in leaves(batch)
    }
    if mesh.size() == 1 or _alike(zlib.crc32(repr(mine).encode()), mesh):
        return
    everyone: list = [None] * mesh.size()
    dist.all_gather_object(everyone, mine, group=mesh.get_group())
    first, nothing = everyone[0], ("nothing", 0)
    for rank, other in enumerate(everyone):
        for path in {**first, **other}:
            here, there = first.get(path, nothing), other.get(path, nothing)
            if here == there:
                continue
            where = "".join(f"[{key!r}]" for key in path)
            differing = ", with other values" if here[0] == there[0] else ""
            raise ValueError(
                "the ranks of a tp group were given different batches: (args,"
                f" kwargs){where} is {here[0]} on rank 0 and {there[0]}{differing} on"
                f" rank {rank}: give all of them the same (a DistributedSampler's rank"
                " is that of the dp group, ProcessGroupManager.dp_rank)"
            )


def in_pipeline() -> bool:
    """Whether this is called by torch.distributed.pipelining, which first runs a stage
    on uninitialised inputs, to learn the shapes of its outputs."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(_PIPELINING):
        frame = frame.f_back
    return frame is not None


_PIPELINING = os.path.join(os.path.dirname(dist.__file__), "pipelining", "")


def _digest(x: Any) -> tuple[str, int]:
    """(What it is, a checksum of its values)."""
    if not isinstance(x, torch.Tensor):
        plain = isinstance(x, (bool, int, float, str, type(None)))
        return repr(x) if plain else type(x).__name__, 0
    what = f"a tensor of shape {tuple(x.shape)}, {x.dtype}"
    if (
        x.device.type == "meta"
        or x.layout != torch.strided
        or type(x) is not torch.Tensor
    ):
        return what, 0
    return what, _checksum(x.detach().cpu().contiguous())


def _checksum(x: torch.Tensor) -> int:
    """The CRC-32 of a tensor's bytes, in memory of the CPU."""
    return (
        zlib.crc32((ctypes.c_char * x.nbytes).from_address(x.data_ptr()))
        if x.numel()
        else 0
    )


def _alike(number: int, mesh: DeviceMesh) -> bool:
    """Whether all ranks have the same number."""
    numbers = all_gather(
        torch.tensor([number], device=mesh.device_type), 0, mesh.get_group()
    )
    return len(set(numbers.tolist())) == 1


def random_state(cuda: bool) -> list[torch.Tensor]:
    """Torch's states, of the CPU and, if asked for, of the present CUDA device."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if cuda else [])]


def set_random_state(states: list[torch.Tensor]) -> None:
    """Go on from states that `random_state` gave; that of a CUDA device is left out
    where none is in use."""
    torch.set_rng_state(states[0])
    if len(states) > 1 and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states[1])


@undisturbed
def share_random_state(mesh: DeviceMesh) -> None:
    """Every rank of a tp group goes on with the random state of its first, so that what
    is drawn outside a shard is the same on all of them, however they were seeded, and
    what is drawn for a shard is a part of the whole's."""
    states = random_state(mesh.device_type == "cuda")
    packed, group = torch.cat(states), mesh.get_group()
    if _alike(_checksum(packed), mesh):
        return
    packed = packed.to(mesh.device_type)
    dist.broadcast(packed, dist.get_global_rank(group, 0), group=group)
    set_random_state(packed.cpu().split([s.numel() for s in states]))
