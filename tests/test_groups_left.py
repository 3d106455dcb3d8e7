"""What is left of process groups: none where none is needed; and how long those that
are made wait."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from helpers import loss_of
from ranks import alone, run_ranks
from torch import nn
from torch.distributed.tensor import DTensor

from quintnet_dt import (
    ProcessGroupManager,
    apply_tensor_parallel,
    check_batch,
    export_safetensors,
    load_checkpoint,
    load_safetensors,
    save_checkpoint,
)
from quintnet_dt.processgroup import timeout_of


def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 4)
    ).double()


def step(model, optimizer, seed):
    torch.manual_seed(seed)
    loss_of(model(torch.randn(3, 4, dtype=torch.float64))).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step(), optimizer.zero_grad()


def test_one_rank_leaves_no_process_group_open(tmp_path):
    """And all that a split model can do works without one."""

    def run():
        x, whole = torch.ones(3, 4, dtype=torch.float64), build()
        model = apply_tensor_parallel(build(), 1, example_inputs=(x,))
        assert not dist.is_initialized() and all(
            isinstance(p, DTensor) for p in model.parameters()
        )
        optimizers = [torch.optim.AdamW(m.parameters(), 0.1) for m in (model, whole)]
        for seed in range(3):
            step(model, optimizers[0], seed), step(whole, optimizers[1], seed)
        save_checkpoint(tmp_path / "run", model, optimizers[0])
        step(model, optimizers[0], 4)
        load_checkpoint(tmp_path / "run", model, optimizers[0])
        export_safetensors(tmp_path / "weights", model)
        load_safetensors(tmp_path / "weights", model)
        check_batch((x,), model.tensor_parallel_mesh)
        assert torch.equal(model.eval()(x), whole.eval()(x))
        model.append(nn.Linear(4, 2).double())
        assert apply_tensor_parallel(model, 1, example_inputs=(x,))(x).shape == (3, 2)
        with pytest.raises(TypeError):
            apply_tensor_parallel(None, 1)
        assert not dist.is_initialized()
        # the user's own
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        assert torch.equal(model[:4](x), whole(x))
        apply_tensor_parallel(build(), 1, example_inputs=(x,))
        assert dist.is_initialized()
        dist.destroy_process_group()

    alone(run)


def test_timeouts():
    """Of the world that is opened, and of groups of it; a collective that waits longer
    fails the test's own limit."""

    def ranks(rank):
        with ProcessGroupManager(timeout=50):
            assert timeout_of(dist.group.WORLD) == timedelta(seconds=50)
            with ProcessGroupManager(tp_size=2, timeout=1.5) as pair:
                if rank == 1:
                    with pytest.raises(RuntimeError):
                        dist.all_reduce(torch.ones(2), group=pair.group)
                dist.barrier()

    run_ranks(ranks, 4, init=False, timeout=40)


def test_default_timeout():
    def ranks(rank):
        with ProcessGroupManager():
            return timeout_of(dist.group.WORLD)

    assert run_ranks(ranks, 2, init=False) == [timedelta(seconds=600)] * 2


@pytest.mark.parametrize(
    "timeout", [0, -1, True, "10", float("nan"), float("inf"), timedelta(seconds=1)]
)
def test_timeouts_that_are_none(timeout):
    with pytest.raises(
        ValueError, match="timeout: expected a number of seconds above 0"
    ):
        ProcessGroupManager(1, timeout=timeout)


def test_timeout_of_what_has_one():
    def ranks(rank):
        with pytest.raises(ValueError, match="which have theirs"):
            ProcessGroupManager(group=dist.group.WORLD, timeout=5)

    run_ranks(ranks, 1)
