"""ProcessGroupManager: from a launcher, a mesh or a group; and its errors."""

import copy
import os
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed import DeviceMesh, init_device_mesh

from quintnet_dt.processgroup import ProcessGroupManager

LAUNCHER = "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"


def place(pgm):
    return pgm.tp_rank, pgm.tp_size, pgm.dp_rank, pgm.dp_size


def summed(pgm, value):
    """The sum of the value over the tp group: shows who is in it."""
    x = torch.tensor(float(value))
    dist.all_reduce(x, group=pgm.group)
    return x.item()


def forget_launcher():
    for name in LAUNCHER:
        os.environ.pop(name, None)


# ------------------------------------------------------------- from a launcher


@pytest.mark.parametrize("tp_size", [2, None])
def test_initialises_the_world_and_closes_it(tp_size):
    def ranks(rank):
        with ProcessGroupManager(tp_size) as pgm:
            assert pgm.world_mesh is pgm.mesh
            assert pgm.mesh.mesh_dim_names == ("tp",)
            assert dist.get_backend() == "gloo"
            result = *place(pgm), summed(pgm, rank), repr(pgm)
        assert not dist.is_initialized()
        pgm.close()
        return result

    text = "ProcessGroupManager(tp_rank={}, tp_size=2, dp_rank=0, dp_size=1, cpu)"
    assert run_ranks(ranks, 2, init=False) == [
        (0, 2, 0, 1, 1.0, text.format(0)),
        (1, 2, 0, 1, 1.0, text.format(1)),
    ]


@pytest.mark.parametrize("init", [True, False])
def test_larger_world_is_dp_times_tp(init):
    def ranks(rank):
        if init:  # groups of this world, made and closed once before
            ProcessGroupManager(tp_size=2).close()
        pgm = ProcessGroupManager(tp_size=2)
        assert pgm.world_mesh.mesh_dim_names == ("dp", "tp")
        assert pgm.mesh == pgm.world_mesh["tp"] and pgm.mesh.ndim == 1
        result = *place(pgm), summed(pgm, rank)
        pgm.close()
        pgm.close()
        assert dist.is_initialized() == init  # the given world stays open
        return result

    assert run_ranks(ranks, 4, init=init) == [
        (0, 2, 0, 2, 1.0),
        (1, 2, 0, 2, 1.0),
        (0, 2, 1, 2, 5.0),
        (1, 2, 1, 2, 5.0),
    ]


def test_closing_leaves_a_given_world_usable():
    def ranks(rank):
        for _ in range(2):
            with ProcessGroupManager(2) as pgm:
                summed(pgm, rank)
        with ProcessGroupManager(1) as pgm:  # groups of its own
            assert place(pgm) == (0, 1, rank, 2)
        return summed(SimpleNamespace(group=None), rank)

    assert run_ranks(ranks, 2) == [1.0, 1.0]


@pytest.mark.parametrize("tp_size", [1, None])
def test_one_process_needs_no_launcher(tp_size):
    def ranks(rank):
        forget_launcher()
        with ProcessGroupManager(tp_size) as pgm:
            assert place(pgm) == (0, 1, 0, 1)
            assert summed(pgm, 3) == 3.0
        assert not dist.is_initialized()

    run_ranks(ranks, 1, init=False)


def test_initialises_nccl_on_cuda(monkeypatch):
    """What is asked of torch where CUDA is: seen on a machine without."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda i: asked.append(i))

    def init(backend, **_):
        asked.append(backend)
        raise InterruptedError

    monkeypatch.setattr(dist, "init_process_group", init)
    for name, value in zip(LAUNCHER, ["3", "1", "4", "localhost", "0"]):
        monkeypatch.setenv(name, value)
    with pytest.raises(InterruptedError):
        ProcessGroupManager(tp_size=2)
    assert asked == [1, "nccl"]


# ------------------------------------------------------------- from a mesh or a group


def test_from_a_mesh():
    def ranks(rank):
        whole = init_device_mesh("cpu", (2,), mesh_dim_names=("model",))
        pgm = ProcessGroupManager(mesh=whole, tp_size=2)
        assert pgm.mesh is whole and pgm.world_mesh is whole
        result = *place(pgm), summed(pgm, rank)
        pgm.close()
        assert whole.get_group().size() == 2 and dist.is_initialized()
        return result

    assert run_ranks(ranks, 2) == [(0, 2, 0, 1, 1.0), (1, 2, 0, 1, 1.0)]


def test_from_a_sub_mesh():
    def ranks(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "other"))
        with ProcessGroupManager(mesh=mesh["tp"]) as pgm:
            return *place(pgm), summed(pgm, rank)

    assert run_ranks(ranks, 4) == [
        (0, 2, 0, 1, 2.0),
        (0, 2, 0, 1, 4.0),
        (1, 2, 0, 1, 2.0),
        (1, 2, 0, 1, 4.0),
    ]


def test_from_a_group():
    def ranks(rank):
        groups = [dist.new_group([0, 2]), dist.new_group([1])]
        pgm = ProcessGroupManager(group=groups[rank % 2])
        assert pgm.group is groups[rank % 2]
        assert pgm.mesh.mesh_dim_names == ("tp",)
        result = *place(pgm), summed(pgm, rank)
        pgm.close()
        return result, summed(SimpleNamespace(group=groups[rank % 2]), rank)

    assert run_ranks(ranks, 3) == [
        ((0, 2, 0, 1, 2.0), 2.0),
        ((0, 1, 0, 1, 1.0), 1.0),
        ((1, 2, 0, 1, 2.0), 2.0),
    ]


@pytest.mark.parametrize("source", ["tp_size", "mesh", "group"])
def test_copies_share_the_groups_and_close_nothing(source):
    def ranks(rank):
        pgm = {
            "tp_size": lambda: ProcessGroupManager(2),
            "mesh": lambda: ProcessGroupManager(
                mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))["b"]
            ),
            "group": lambda: ProcessGroupManager(group=dist.new_group([0, 1])),
        }[source]()
        module = torch.nn.Linear(2, 2)
        module.pgm = pgm
        for twin in (copy.deepcopy(module).pgm, pickle.loads(pickle.dumps(pgm))):
            assert place(twin) == place(pgm) and twin.mesh == pgm.mesh
            assert summed(twin, rank) == 1.0
            twin.close()
            assert dist.is_initialized()
        assert not any(isinstance(v, dist.ProcessGroup) for v in vars(pgm).values())
        pgm.close()
        return dist.is_initialized()

    init = source != "tp_size"
    assert run_ranks(ranks, 2, init=init) == [init] * 2


# ------------------------------------------------------------- errors


@pytest.mark.parametrize("tp_size", [0, -2, True, 2.0, "2"])
def test_tp_size_is_a_positive_int(tp_size):
    with pytest.raises(ValueError, match=f"int from 1 on, found {tp_size!r}"):
        ProcessGroupManager(tp_size)


@pytest.mark.parametrize(
    "given, missing", [({}, "RANK, WORLD"), ({"RANK": "0"}, "WORLD_SIZE, MASTER")]
)
def test_no_launcher(monkeypatch, given, missing):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    command = "torchrun --standalone --nproc-per-node 4 your_script.py"
    with pytest.raises(RuntimeError, match=f"{missing}.*{command}"):
        ProcessGroupManager(tp_size=4)
    assert not dist.is_initialized()


def test_a_launcher_that_says_too_little(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")  # so not a world of one
    for tp_size in (1, None):
        with pytest.raises(RuntimeError, match="RANK, MASTER_ADDR, MASTER_PORT not"):
            ProcessGroupManager(tp_size)


@pytest.mark.parametrize("init", [True, False])
@pytest.mark.parametrize("tp_size, what", [(2, "does not divide"), (4, "is larger")])
def test_world_is_a_multiple_of_tp_size(init, tp_size, what):
    def ranks(rank):
        try:
            ProcessGroupManager(tp_size)
        finally:
            assert dist.is_initialized() == init

    for error in run_ranks(ranks, 3, init=init, expect_failure=True):
        assert error.startswith(f"ValueError: tp_size={tp_size} {what}")
        assert "the world size 3" in error
        assert f"torchrun --standalone --nproc-per-node {tp_size} " in error


def test_meshes_and_groups_that_do_not_serve():
    def ranks(rank):
        mesh = init_device_mesh("cpu", (1, 3), mesh_dim_names=("dp", "tp"))
        pair = dist.new_group([0, 1])
        some = init_device_mesh("cpu", (3,))
        cases = [
            (dict(mesh=mesh), "1-D mesh.*mesh\\['tp'\\]"),
            (dict(mesh=mesh["tp"], tp_size=2), "tp_size=2 ranks, found 3"),
            (dict(mesh=some, group=dist.group.WORLD), "a mesh and a group"),
            (dict(mesh=some, device_type="cuda"), "device_type 'cuda', found 'cpu'"),
            (dict(group=dist.group.WORLD, tp_size=4), "tp_size=4 ranks, found 3"),
            (dict(mesh=some, tp_size=0), "found 0"),
            (dict(group=some), "expected a ProcessGroup"),
        ]
        if rank == 2:  # an outsider
            cases.append((dict(group=pair), "ProcessGroup that this rank is in"))
        for arguments, message in cases:
            with pytest.raises(ValueError, match=message):
                ProcessGroupManager(**arguments)

    run_ranks(ranks, 3)


def test_rank_outside_the_mesh():
    def ranks(rank):
        mesh = DeviceMesh("cpu", [0, 1])  # every rank makes it, rank 2 is not in it
        if rank < 2:
            return place(ProcessGroupManager(mesh=mesh))
        with pytest.raises(ValueError, match="rank 2 is not in the mesh"):
            ProcessGroupManager(mesh=mesh)

    assert run_ranks(ranks, 3) == [(0, 2, 0, 1), (1, 2, 0, 1), None]
