"""Groups of one and simulated ones, in which nothing is sent, against real ones; how a
length is shared, and what a collective refuses."""

import copy

import pytest
import torch
import torch.distributed as dist
from models.collectives import cases
from ranks import alone, run_ranks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from quintnet_dt.comm_ops import all_gather, all_reduce, copy_in, reduce_scatter, split
from quintnet_dt.groups import SimulatedGroup, chunk_sizes, group_rank, group_size


def test_a_group_of_one_gives_its_input_back():
    def ranks(rank):
        for group in (dist.group.WORLD, SimulatedGroup(0, 1)):
            x = torch.randn(3, 2, requires_grad=True)
            assert all_reduce(x, group) is x
            assert copy_in(x, group) is x
            for f in (all_gather, split, reduce_scatter):
                assert f(x, -1, group) is x
                assert f(x, -1, group, [2]) is x
                with pytest.raises(ValueError, match="out of range"):
                    f(x, 2, group)
                with pytest.raises(ValueError, match="not 2"):
                    f(x, 1, group, [3])

    run_ranks(ranks, 1)


def results_of(case, rank, group, fake=False):
    """What is known of y and of dx before their values."""
    x = case.input(rank)
    if fake:
        x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    x.requires_grad_()
    y = case.call(x, group)
    (g,) = torch.autograd.grad(y.sin().sum(), x)
    return [(t.shape, t.dtype, t.is_contiguous(), strides(t)) for t in (y, g)]


def strides(t):
    """Those that say something."""
    return [s for n, s in zip(t.shape, t.stride()) if n > 1] if t.numel() else []


@pytest.mark.parametrize("n", [2, 4])
def test_simulated_groups_give_the_shapes_of_real_ones(n):
    def ranks(rank):
        return [results_of(case, rank, dist.group.WORLD) for case in cases(n)]

    results = run_ranks(ranks, n)

    def simulated():
        for rank, real in enumerate(results):
            group = copy.deepcopy(SimulatedGroup(rank, n))
            assert group == SimulatedGroup(rank, n)
            assert (group_rank(group), group_size(group)) == (rank, n)
            fake_mode = FakeTensorMode()
            for case, right in zip(cases(n), real):
                assert results_of(case, rank, group) == right, case
                with fake_mode:
                    assert results_of(case, rank, group, fake=True) == right, case

    alone(simulated)


def test_simulated_groups_imagine_the_others_to_hold_the_same():
    group = SimulatedGroup(1, 2)
    x = torch.tensor([1, 2, 3])
    assert all_reduce(x, group).tolist() == [2, 4, 6]
    assert all_gather(x, 0, group).tolist() == [1, 2, 3, 1, 2, 3]
    assert all_gather(x, 0, group, [4, 3]).tolist() == [1, 2, 3, 0, 1, 2, 3]
    assert all_gather(x, 0, group, [1, 3]).tolist() == [1, 1, 2, 3]
    assert split(x, 0, group).tolist() == [3]
    assert reduce_scatter(x, 0, group).tolist() == [6]
    assert copy_in(x, group) is x
    for rank, size in ((-1, 2), (2, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"rank={rank}, size={size}"):
            SimulatedGroup(rank, size)


# ------------------------------------------------------------- sizes and errors


@pytest.mark.parametrize("n", [1, 2, 4])
def test_chunk_sizes_are_those_of_dtensor(n):
    lengths = (1, 2, 3, 4, 5, 7, 8, 10, 13)
    assert chunk_sizes(0, n) == [0] * n

    def ranks(rank):
        mesh = init_device_mesh("cpu", (n,))
        return [
            len(distribute_tensor(torch.zeros(length), mesh, [Shard(0)]).to_local())
            for length in lengths
        ]

    assert list(zip(*run_ranks(ranks, n))) == [
        tuple(chunk_sizes(k, n)) for k in lengths
    ]


def test_bad_input_is_an_error_on_every_rank_before_anything_is_sent():
    def ranks(rank):
        group = dist.group.WORLD
        x = torch.zeros(3, 4)
        for f in (all_gather, split, reduce_scatter):
            for dim in (2, -3):
                with pytest.raises(ValueError, match=rf"dim {dim} .*shape \(3, 4\)"):
                    f(x, dim, group)
            with pytest.raises(ValueError, match="dim 0 is out of range for shape"):
                f(torch.zeros(()), 0, group)
            for sizes in ([4], [2, 1, 1], [5, -1], []):
                with pytest.raises(ValueError, match="expected sizes of 2 ranks"):
                    f(x, 1, group, sizes)
        for f in (split, reduce_scatter):
            with pytest.raises(ValueError, match=r"\(2, 3\) .* sum is 5, not 4"):
                f(x, 1, group, [2, 3])
        with pytest.raises(ValueError, match=rf"rank {rank}'s is {2 + rank}, not 4"):
            all_gather(x, 1, group, [2, 3])
        for bad in (None, init_device_mesh("cpu", (2,)), -100):
            with pytest.raises(ValueError, match="a ProcessGroup that this rank is in"):
                all_reduce(x, bad)
        return all_reduce(torch.ones(()), group).item()  # and nothing was sent

    assert run_ranks(ranks, 2) == [2.0, 2.0]
    for length, n in ((-1, 2), (3, 0)):
        with pytest.raises(ValueError, match=f"found {length} and {n}"):
            chunk_sizes(length, n)
