"""What cannot be done is refused on every rank, with a message that says what to do;
planning leaves no trace."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from helpers import compare, pair
from ranks import own_process, run_ranks
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from quintnet_dt import (
    ProcessGroupManager,
    TensorParallelPlan,
    apply_tensor_parallel,
    plan_tensor_parallel,
)


def mlp(h=32):
    return nn.Sequential(nn.Linear(16, h), nn.GELU(), nn.Linear(h, 16))


class Raises(nn.Module):
    """A forward that fails, on the ranks in `where`."""

    def __init__(self, where):
        super().__init__()
        self.net, self.where = mlp(), where

    def forward(self, x):
        if dist.get_rank() in self.where:
            raise KeyError("no such thing")
        return self.net(x)


def untouched(model):
    """No parameter became a DTensor and no hook was left."""
    return not any(isinstance(p, DTensor) for p in model.parameters()) and not any(
        m._forward_pre_hooks or m._forward_hooks for m in model.modules()
    )


# ---- on every rank


def test_models_that_differ_in_a_shape():
    def ranks(rank):
        model = mlp(32 if rank != 1 else 48)
        try:
            apply_tensor_parallel(model, 2)
        finally:
            assert untouched(model)

    for message in run_ranks(ranks, 2, expect_failure=True):
        assert (
            "0.weight" in message
            and "(32, 16)" in message
            and "(48, 16)" in message
            and "rank 1" in message
        )
        assert "same model on every rank" in message


@pytest.mark.parametrize("how", ["dtype", "frozen", "name", "more"])
def test_models_that_differ_otherwise(how):
    def ranks(rank):
        model = mlp()
        if rank == 1:
            if how == "dtype":
                model[2].bfloat16()
            elif how == "frozen":
                model[2].weight.requires_grad_(False)
            elif how == "name":
                model = nn.Sequential(model[0], nn.GELU(), nn.Identity(), model[2])
            else:
                model[2].register_parameter("extra", nn.Parameter(torch.zeros(3)))
        apply_tensor_parallel(model, 2, example_inputs=(torch.randn(2, 16),))

    for message in run_ranks(ranks, 2, expect_failure=True):
        assert {
            "dtype": "2.weight",
            "frozen": "2.weight",
            "name": "2.weight",
            "more": "2.extra",
        }[how] in message or (
            how == "dtype"
            and "rank 1" in message  # its forward fails with mixed dtypes
        )


def test_plans_that_differ_between_ranks():
    def ranks(rank):
        plan = {"0.weight": Shard(rank), "2.weight": Shard(1 - rank)}
        apply_tensor_parallel(mlp(), 2, plan=plan)

    for message in run_ranks(ranks, 2, expect_failure=True):
        assert "different plans" in message and "every rank" in message


@pytest.mark.parametrize("where", [(0,), (1,), (0, 1)])
def test_forward_that_raises_in_planning(where):
    """On the ranks that fail, the error itself; on the others one that tells of it;
    nobody waits."""

    def ranks(rank):
        model = Raises(where)
        try:
            apply_tensor_parallel(model, 2, example_inputs=(torch.randn(2, 16),))
        finally:
            assert untouched(model)

    for rank, message in enumerate(
        run_ranks(ranks, 2, expect_failure=True, timeout=30)
    ):
        assert "no such thing" in message
        if rank not in where:
            assert "another rank" in message and f"rank {where[0]}" in message


def test_wrong_entries_of_a_plan_on_one_rank():
    def ranks(rank):
        plan = {"nope.weight": Shard(0)} if rank == 0 else None
        apply_tensor_parallel(mlp(), 2, plan=plan)

    for message in run_ranks(ranks, 2, expect_failure=True, timeout=30):
        assert "nope.weight" in message


def test_inputs_of_the_wrong_type_on_one_rank():
    def ranks(rank):
        apply_tensor_parallel(
            mlp(), 2, example_inputs=(torch.ones(2, 16),) if rank else torch.ones(2, 16)
        )

    for message in run_ranks(ranks, 2, expect_failure=True, timeout=30):
        assert "example_inputs" in message


def test_applied_already():
    def ranks(rank):
        model = apply_tensor_parallel(mlp(), 2)
        apply_tensor_parallel(model, 2)

    for message in run_ranks(ranks, 2, expect_failure=True):
        assert (
            "ValueError" in message and "split already" in message and "once" in message
        )


def test_not_a_module():
    def ranks(rank):
        apply_tensor_parallel(mlp() if rank else mlp().forward, 2)

    for message in run_ranks(ranks, 2, expect_failure=True, timeout=30):
        assert "nn.Module" in message and "method" in message


def test_size_that_does_not_divide_the_world():
    def ranks(rank):
        apply_tensor_parallel(mlp(), 3)

    for message in run_ranks(ranks, 2, expect_failure=True):
        assert "tp_size=3" in message and "torchrun" in message


# ---- in one process


def test_wrong_arguments():
    with pytest.raises(TypeError, match="nn.Module"):
        plan_tensor_parallel(lambda x: x, 2)
    for size in (0, -1, 2.0, True, "2"):
        with pytest.raises((ValueError, TypeError), match="tp_size"):
            apply_tensor_parallel(mlp(), size)
        with pytest.raises((ValueError, TypeError), match="tp_size"):
            plan_tensor_parallel(mlp(), size)
    with pytest.raises(TypeError, match=r"tuple.*dict.*Tensor.*\(x,\)"):
        plan_tensor_parallel(mlp(), 2, example_inputs=torch.ones(2, 16))
    with pytest.raises(TypeError, match="mesh"):
        apply_tensor_parallel(mlp(), mesh="cpu")
    with pytest.raises(TypeError, match="plan"):
        plan_tensor_parallel(mlp(), 2, plan=[("0.weight", Shard(0))])
    with pytest.raises(ValueError, match="tp_size 2.*4"):
        plan_tensor_parallel(mlp(), 2, plan=plan_tensor_parallel(mlp(), 4))
    with pytest.raises(RuntimeError, match="torchrun"):
        apply_tensor_parallel(mlp(), 2)


def test_all_wrong_entries_at_once():
    plan = {
        "0.weigth": Shard(0),
        "layers.2.weight": Shard(0),
        "0.weight": Shard(2),
        "0.bias": Shard(-1),
        "2.weight": 1,
        "2.bias": Partial(),
    }
    with pytest.raises(ValueError) as caught:
        plan_tensor_parallel(mlp(), 2, plan={**plan})
    message = str(caught.value)
    assert all(f"{name}:" in message for name in plan) and "6 of its entries" in message
    assert "is it 2.weight?" in message and "0 to 1" in message
    with pytest.raises(ValueError, match="no such parameter"):
        TensorParallelPlan(2)["x"] = Shard(0)


def test_example_inputs_that_do_not_fit():
    with pytest.raises(Exception, match="16"):
        plan_tensor_parallel(mlp(), 2, example_inputs=(torch.ones(2, 17),))
    with pytest.raises(TypeError, match="nope"):
        plan_tensor_parallel(mlp(), 2, example_inputs={"nope": torch.ones(2, 16)})


def test_model_that_cannot_be_copied():
    model = mlp()
    model.lock = (i for i in range(3))
    with pytest.raises(RuntimeError, match="deep-copied"):
        plan_tensor_parallel(model, 2, example_inputs=(torch.ones(2, 16),))


def test_made_up_inputs_that_fit_nothing():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, a):
            return self.net(a["x"])

    with pytest.warns(UserWarning, match="give example_inputs"):
        plan = plan_tensor_parallel(Net(), 2)
    assert "example_inputs" in plan.note and plan.note in str(plan) and plan.share < 0.6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            plan_tensor_parallel(
                Net(), 2, example_inputs=({"x": torch.ones(2, 16)},)
            ).note
            == ""
        )


class Stateful(nn.Module):
    """Draws random numbers and changes buffers, plain tensors, numbers and lists as it
    runs."""

    def __init__(self, reads=False):
        super().__init__()
        self.fc, self.norm, self.drop = (
            nn.Linear(8, 16),
            nn.BatchNorm1d(16),
            nn.Dropout(0.5),
        )
        self.out, self.reads = nn.Linear(16, 8), reads
        self.register_buffer("seen", torch.zeros(16))
        self.plain, self.count, self.log = torch.zeros(3), 0, []

    def forward(self, x):
        h = self.drop(self.norm(self.fc(x)))
        self.seen += h.detach().sum(0)
        self.plain.add_(1)
        self.count += 1
        self.log.append(h)
        if self.reads and h.sum() > 0:
            h = h * torch.rand(())
        return self.out(h)


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_planning_leaves_no_trace(reads, given):
    assert not dist.is_initialized()
    torch.manual_seed(0)
    model = Stateful(reads)
    model.out.weight.grad = torch.ones(8, 16)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    ids = {n: id(p) for n, p in model.named_parameters()}
    x = torch.ones(4, 8)
    plan = plan_tensor_parallel(model, 2, example_inputs=(x,) if given else None)
    assert isinstance(plan, TensorParallelPlan) and plan.entries.keys() == ids.keys()
    assert not dist.is_initialized()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert (
        model.norm.num_batches_tracked == 0
        and not model.plain.any()
        and model.count == 0
        and model.log == []
    )
    assert (
        {n: id(p) for n, p in model.named_parameters()} == ids
        and model.training
        and torch.equal(x, torch.ones(4, 8))
    )
    assert (
        torch.equal(model.out.weight.grad, torch.ones(8, 16))
        and model.fc.weight.grad is None
    )
    assert untouched(model) and not hasattr(model, "tensor_parallel_plan")


def test_a_new_path_leaves_no_trace_either():
    """Learning a call that was not traced draws no random numbers and counts no
    batch."""

    def ranks(rank):
        sharded, whole = pair(Stateful, 2, example_inputs=(torch.ones(4, 8).double(),))
        compare(
            sharded,
            whole,
            (torch.randn(5, 8, generator=torch.Generator().manual_seed(0)),),
        )
        sharded.eval(), whole.eval()
        compare(sharded, whole, (torch.ones(1, 8),))
        assert sharded.count == whole.count and len(sharded.log) == len(whole.log)
        assert torch.equal(sharded.plain, whole.plain)

    run_ranks(ranks, 2)


def test_planning_takes_no_memory_for_a_meta_model():
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Linear(16, 1 << 20),
            nn.GELU(),
            nn.Linear(1 << 20, 1 << 20),
            nn.Linear(1 << 20, 16),
        )
    plan = plan_tensor_parallel(model, 8)
    assert plan.share < 0.13


def test_plan_as_text_and_json():
    plan = plan_tensor_parallel(mlp(), 2)
    assert plan.placements["0.weight"] == Shard(0) and plan.placements[
        "2.weight"
    ] == Shard(1)
    again = TensorParallelPlan.from_json(plan.to_json())
    assert again == plan and str(again) == str(plan)
    assert "Shard(0)" in str(plan) and "0.weight"[2:] in str(plan)
    for text in ("", "{}", "[1]", '{"tp_size": 2, "entries": {"a": 1}}', "null"):
        with pytest.raises(ValueError, match="to_json"):
            TensorParallelPlan.from_json(text)
    plan["0.weight"] = Replicate()
    assert plan.placements["0.weight"] == Replicate()


def test_plan_edited_then_applied():
    def ranks(rank):
        plan = plan_tensor_parallel(mlp(), 2)
        plan["0.weight"] = Replicate()
        plan["2.weight"] = Shard(0)
        sharded, whole = pair(mlp, 2, plan=TensorParallelPlan.from_json(plan.to_json()))
        assert sharded[0].weight.placements[0].is_replicate() and sharded[
            2
        ].weight.placements[0] == Shard(0)
        compare(sharded, whole, (torch.ones(3, 16),))
        compare(sharded, whole, (torch.ones(2, 3, 16),))

    run_ranks(ranks, 2)


@own_process
def test_one_rank_needs_no_launcher():
    with ProcessGroupManager(1) as pgm:
        sharded, whole = pair(mlp, pgm)
        compare(sharded, whole, (torch.ones(3, 16),))
    assert not dist.is_initialized()
