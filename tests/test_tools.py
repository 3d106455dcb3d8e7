"""Tools around a split model see what the model computes, not how it was planned, and
the model is none the worse."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import close, loss_of, make, pair, same_grads
from ranks import run_ranks
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from quintnet_dt import apply_tensor_parallel, plan_tensor_parallel


class Block(nn.Module):
    """Watched: it reshapes shards in its own code."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        return x + self.out(
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x):
        return self.blocks(x)


def inputs():
    return torch.randn(
        2, 5, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


class Watched(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


COUNTERS = {
    "flops": (
        lambda: FlopCounterMode(display=False),
        lambda mode: mode.get_total_flops(),
    ),
    "collectives": (
        CommDebugMode,
        lambda mode: {str(op): n for op, n in mode.get_comm_counts().items()},
    ),
    "operators": (Counted, lambda mode: mode.count),
    "modules": (ModuleTracker, lambda mode: 0),
    "functions": (Watched, lambda mode: 0),
    "anomalies": (torch.autograd.detect_anomaly, lambda mode: 0),
    "on meta": (lambda: torch.device("meta"), lambda mode: 0),
}


@pytest.mark.filterwarnings("ignore")
def test_the_first_calls_under_a_tool_count_what_later_ones_do():
    def ranks(rank):
        x, whole = inputs(), make(Model)
        loss_of(whole(x)).backward()
        counts = {}
        for name, (tool, value) in COUNTERS.items():
            model = apply_tensor_parallel(make(Model), 2, example_inputs=(x,))
            counts[name] = []
            for _ in range(4):
                model.zero_grad()
                with tool() as mode:
                    y = model(x)
                    (y * torch.ones_like(y)).sum().backward()
                counts[name].append(value(mode))
            model.zero_grad()
            loss_of(model(x)).backward()
            same_grads(model, whole)
        return counts

    plain = FlopCounterMode(display=False)
    for counts in run_ranks(ranks, 2):
        for name, found in counts.items():
            assert found == found[:1] * len(found), (name, found)
        with plain, torch.no_grad():
            make(Model)(inputs())
        assert 0 < counts["flops"][0] <= 3 * plain.get_total_flops() / 2
        # of two blocks, forward; and backward, of the second
        assert counts["collectives"][0]["c10d.allreduce_"] == 3


def test_a_model_is_split_under_a_tool():
    def ranks(rank):
        x, whole = inputs(), make(Model)
        for tool in (
            FlopCounterMode(display=False),
            CommDebugMode(),
            Counted(),
            torch.device("meta"),
        ):
            model = make(Model)
            with tool as mode:
                apply_tensor_parallel(model, 2, example_inputs=(x,))
            close(model(x), whole(x), type(tool).__name__)
            assert model.tensor_parallel_plan["blocks.0.qkv.weight"].how == "local"
        return mode is None

    run_ranks(ranks, 2)


@pytest.mark.filterwarnings("ignore")
def test_an_anomaly_is_found_on_all_ranks():
    def ranks(rank):
        x = inputs()
        model, _ = pair(Model, 2, example_inputs=(x,))
        with torch.autograd.detect_anomaly():
            (model(x) * 0).sqrt().sum().backward()

    for error in run_ranks(ranks, 2, expect_failure=True):
        assert "returned nan values" in error


class Odd(nn.Module):
    """A parameter of size 0, one of no dim, and sparse buffers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 64), nn.Linear(64, 16)
        self.none, self.scale = nn.Parameter(torch.zeros(0, 16)), nn.Parameter(
            torch.tensor(2.0)
        )
        self.register_buffer("mix", torch.randn(5, 5).relu().to_sparse())
        self.register_buffer("mask", torch.eye(5).bool().to_sparse(), persistent=False)

    def forward(self, x):
        y = self.b(self.a(torch.cat([x[0], self.none])).relu()) * self.scale
        return torch.sparse.mm(self.mix, y)


def test_parameters_of_size_0_and_of_no_dim_and_sparse_buffers():
    def ranks(rank):
        x, whole = inputs(), make(Odd)
        model = make(Odd)
        if rank:  # values come from rank 0
            model.mix.copy_(torch.eye(5).to_sparse())
        apply_tensor_parallel(model, 2, example_inputs=(x,))
        y, expected = model(x), whole(x)
        close(y, expected, "output")
        loss_of(y).backward(), loss_of(expected).backward()
        same_grads(model, whole)
        plan = model.tensor_parallel_plan
        assert (
            plan["a.weight"].how == "local"
            and plan["none"].how == plan["scale"].how == "replicated"
        )

    run_ranks(ranks, 2)


def test_planning_leaves_what_it_is_given_as_it_is():
    class Writes(Model):
        def forward(self, x):
            return super().forward(x.mul_(2))

    x = inputs()
    kept = copy.deepcopy(x)
    plan_tensor_parallel(make(Writes), 2, example_inputs=(x,))
    assert torch.equal(x, kept)
