"""Who computes together: a 1-D DeviceMesh named "tp", from whatever there is."""

import math
import os
from contextlib import AbstractContextManager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import DeviceMesh, ProcessGroup, init_device_mesh

# Seconds that a collective waits for other ranks: torch's own are 1800 for gloo, long
# after one has died.
TIMEOUT = 600

# What a launcher tells each process.
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_RUN = "run: torchrun --standalone --nproc-per-node %s your_script.py"


class ProcessGroupManager(AbstractContextManager):
    """The ranks that hold one model together, and this process's place among them.

    Made from one of ``tp_size``, ``mesh`` and ``group`` (none of them: the whole world
    is one tp group). Every rank of the world must make the same call (with ``mesh`` or
    ``group``, every rank of it). As a context manager it closes itself. A copy
    (``copy.deepcopy``, pickle) shares the groups and closes nothing.

    Args:
        tp_size: an int, ranks in a tp group; with ``mesh`` or ``group``, must be
            theirs. Alone, of the processes that torchrun started: initialises the
            default process group if there is none, with nccl (and
            ``torch.cuda.set_device(LOCAL_RANK)``) where CUDA is available, else gloo. A
            size of 1 needs no launcher. In a larger world, ranks ``k * tp_size ... (k +
            1) * tp_size - 1`` are one tp group.
        mesh: a 1-D DeviceMesh of any name, such as ``mesh["tp"]`` of a larger one.
        group: a ProcessGroup that this process is in.
        device_type: "cpu", "cuda", ...; None for that of the mesh or the group's
            backend.
        timeout: seconds, above 0, after which a collective raises in the groups that
            this makes; None for those of the default process group where there is one,
            else 600.

    Attributes: ``mesh``, the 1-D mesh of the tp group; ``world_mesh``, of all ranks,
    ("dp", "tp"), or ``mesh`` if tp_size is the world's or a mesh or group was given.

    Raises ValueError: more than one source; a mesh not 1-D; a tp_size that is no
    positive int, does not divide the world or is not the mesh's; a mesh or group
    without this rank; a timeout that is no number above 0, or of a mesh or group, which
    have theirs. RuntimeError: nothing tells where the others are.

    Example::

        with ProcessGroupManager(tp_size=2) as pgm:  # on 4 processes
            print(pgm.tp_rank, pgm.dp_rank)  # 0 0, 1 0, 0 1, 1 1
    """

    def __init__(
        self,
        tp_size: int | None = None,
        *,
        mesh: DeviceMesh | None = None,
        group: ProcessGroup | None = None,
        device_type: str | None = None,
        timeout: float | None = None,
    ):
        # No ProcessGroup is stored: it cannot be copied, and a mesh can.
        self._opened: str | None = None  # "world", "groups" of a given world, or None
        # whether it opened a world of one process, which no launcher started
        self.alone = False
        if tp_size is not None and (type(tp_size) is not int or tp_size < 1):
            raise ValueError(
                f"expected tp_size to be an int from 1 on, found {tp_size!r}"
            )
        if mesh is not None and group is not None:
            raise ValueError("expected a mesh or a group, found a mesh and a group")
        wait = _checked_timeout(timeout, made=mesh is None and group is None)
        if mesh is not None:
            self.mesh = self.world_mesh = _checked_mesh(mesh, device_type)
        elif group is not None:
            self.mesh = self.world_mesh = _mesh_of_group(group, device_type)
        else:
            self._open(tp_size, device_type, wait)
        if tp_size not in (None, self.tp_size):
            raise ValueError(
                f"expected tp_size={tp_size} ranks, found {self.tp_size}; leave"
                " tp_size out"
            )

    def _open(
        self, tp_size: int | None, device_type: str | None, timeout: timedelta | None
    ) -> None:
        """Lay out the world, which is initialised first if there is none."""
        fresh = not dist.is_initialized()
        unset = [name for name in LAUNCHED if fresh and name not in os.environ]
        world = _world_size(fresh, unset, tp_size)
        tp_size = tp_size or world
        if world % tp_size:
            relation = "is larger than" if tp_size > world else "does not divide"
            what = f"tp_size={tp_size} {relation} the world size {world}"
            raise ValueError(f"{what}; {_RUN % tp_size} (or a multiple of it)")
        if fresh:  # after all that can be checked is
            device_type = _initialise(device_type, timeout, alone=bool(unset))
            self._opened, self.alone = "world", bool(unset)
        device_type = device_type or _device_type(dist.group.WORLD)
        if tp_size == world:
            self.mesh = init_device_mesh(device_type, (world,), mesh_dim_names=("tp",))
            self.world_mesh = self.mesh
            return
        self._opened = self._opened or "groups"
        shape = (world // tp_size, tp_size)
        self.world_mesh = init_device_mesh(
            device_type, shape, mesh_dim_names=("dp", "tp")
        )
        self.mesh = self.world_mesh["tp"]
        # A mesh makes its groups with the backend's own timeout.
        for group in self.world_mesh.get_all_groups():
            if group is not dist.group.WORLD and hasattr(group, "set_timeout"):
                group.set_timeout(timeout or timeout_of(dist.group.WORLD))

    @property
    def group(self) -> ProcessGroup:
        """The tp group."""
        return self.mesh.get_group()

    @property
    def tp_rank(self) -> int:
        """This process's rank in the tp group."""
        return self.mesh.get_local_rank()

    @property
    def tp_size(self) -> int:
        """The number of ranks in the tp group."""
        return self.mesh.size()

    @property
    def dp_rank(self) -> int:
        """Which of the tp groups this is. 0 if made from a mesh or a group."""
        return self.world_mesh.get_local_rank("dp") if self.world_mesh.ndim == 2 else 0

    @property
    def dp_size(self) -> int:
        """The number of tp groups. 1 if made from a mesh or a group: not knowable."""
        return self.world_mesh.size() // self.tp_size

    def close(self) -> None:
        """Destroys the process groups that this object made, no others. Idempotent."""
        opened, self._opened = self._opened, None
        if opened and dist.is_initialized():
            for group in (
                self.world_mesh.get_all_groups() if opened == "groups" else [None]
            ):
                if group is not dist.group.WORLD:  # a dim of the whole world borrows it
                    dist.destroy_process_group(group)  # of None: all

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_opened": None, "alone": False}

    def __repr__(self) -> str:
        values = ", ".join(
            f"{name}={getattr(self, name)}"
            for name in ("tp_rank", "tp_size", "dp_rank", "dp_size")
        )
        return f"ProcessGroupManager({values}, {self.mesh.device_type})"


def _checked_timeout(timeout: float | None, made: bool) -> timedelta | None:
    """The timeout as torch takes it. `made`: whether there will be groups that it is
    for."""
    if timeout is None:
        return None
    number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if not number or not math.isfinite(timeout) or timeout <= 0:
        raise ValueError(
            f"timeout: expected a number of seconds above 0, found {timeout!r}"
        )
    if not made:
        raise ValueError(
            "timeout: expected None with a mesh or a group, which have theirs, found"
            f" {timeout!r}"
        )
    return timedelta(seconds=timeout)


def _checked_mesh(mesh: DeviceMesh, device_type: str | None) -> DeviceMesh:
    if mesh.ndim != 1:
        raise ValueError(f"expected a 1-D mesh, found {mesh}; pass mesh['tp'], say")
    if mesh.get_coordinate() is None:
        raise ValueError(f"rank {dist.get_rank()} is not in the mesh {mesh}")
    if device_type not in (None, mesh.device_type):
        raise ValueError(
            f"expected a mesh of device_type {device_type!r}, found"
            f" {mesh.device_type!r}"
        )
    return mesh


def _mesh_of_group(group: ProcessGroup, device_type: str | None) -> DeviceMesh:
    if not isinstance(group, ProcessGroup):  # new_group gives outsiders an int
        raise ValueError(
            f"expected a ProcessGroup that this rank is in, found {group!r}; call this"
            " on the ranks of the group only"
        )
    device_type = device_type or _device_type(group)
    return DeviceMesh.from_group(group, device_type, mesh_dim_names=("tp",))


def _world_size(fresh: bool, unset: list[str], tp_size: int | None) -> int:
    """How many processes there are. `fresh`: they have no process group yet; `unset`:
    what no launcher has set."""
    if not fresh:
        return dist.get_world_size()
    if not unset:
        return int(os.environ["WORLD_SIZE"])
    if tp_size not in (None, 1) or os.environ.get("WORLD_SIZE", "1") != "1":
        raise RuntimeError(
            f"tp_size={tp_size} needs a launcher and there is no default process group:"
            f" {', '.join(unset)} not set; {_RUN % (tp_size or 'N')}"
        )
    return 1


def _initialise(device_type: str | None, timeout: timedelta | None, alone: bool) -> str:
    """Initialise the default process group; returns the type of its devices."""
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group(
        dist.get_default_backend_for_device(device_type),
        timeout=timeout or timedelta(seconds=TIMEOUT),
        **(dict(store=dist.HashStore(), rank=0, world_size=1) if alone else {}),
    )
    return device_type


def timeout_of(group: ProcessGroup) -> timedelta:
    """How long a group's store waits for its ranks: as long as collectives of the
    default group do."""
    store = group.get_group_store() if hasattr(group, "get_group_store") else None
    return store.timeout if store is not None else timedelta(seconds=TIMEOUT)


def _device_type(group: ProcessGroup) -> str:
    nccl = "nccl" in str(dist.get_backend_config(group))
    return "cuda" if nccl and torch.cuda.is_available() else "cpu"
