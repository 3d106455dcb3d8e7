"""What a user reads when an input does not fit, or when nothing could be traced."""

import pytest
import torch
from helpers import pair
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from quintnet_dt import (
    TensorParallelPlan,
    apply_tensor_parallel,
    check_batch,
    plan_tensor_parallel,
)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.b(self.a(x).relu())


class Reads(MLP):
    """Which rows are large? That depends on the parameters."""

    def forward(self, x):
        h = self.a(x)
        return self.b(h[h.sum(-1) > 0])


def test_a_wrong_shape_shows_the_models_own_error():
    wrong = r"mat1 and mat2 shapes cannot be multiplied \(2x7 and 8x32\)"
    with pytest.raises(RuntimeError, match=wrong) as error:
        plan_tensor_parallel(MLP(), 2, example_inputs=(torch.ones(2, 7),))
    assert error.value.__cause__ is error.value.__context__ is None

    def ranks(rank):
        model, _ = pair(MLP, 2, example_inputs=(torch.ones(1, 8).double(),))
        with pytest.raises(RuntimeError, match=wrong):
            model(torch.ones(2, 7).double())

    run_ranks(ranks, 2)


def test_foreign_objects():
    def ranks(rank):
        for mesh in None, "tp", 3:
            with pytest.raises(
                TypeError,
                match="mesh: expected a 1-D DeviceMesh or a ProcessGroupManager, found",
            ):
                check_batch((torch.ones(2),), mesh)
        for source in 2, -1, "0":
            with pytest.raises(
                ValueError,
                match="src_data_rank: expected None or a rank of the tp group, found",
            ):
                apply_tensor_parallel(MLP(), 2, src_data_rank=source)
        wrapped = nn.Sequential(
            FullyShardedDataParallel(MLP(), device_id=torch.device("cpu"))
        )
        with pytest.raises(
            TypeError,
            match=(
                "0: expected a model that is split before any data parallelism, found"
                " Fully"
            ),
        ):
            apply_tensor_parallel(wrapped, 2, example_inputs=(torch.ones(1, 8),))

    run_ranks(ranks, 2)


@pytest.mark.filterwarnings("ignore")
def test_a_script_module_is_no_model():
    with pytest.raises(
        TypeError,
        match="the model: expected modules written in Python, found a ScriptModule",
    ):
        plan_tensor_parallel(
            torch.jit.script(MLP()), 2, example_inputs=(torch.ones(1, 8),)
        )


def test_a_plan_made_without_a_forward_says_that_nothing_was_counted():
    with torch.device("meta"):
        model = Reads()
    with pytest.warns(
        UserWarning,
        match=(
            r"reads no values of its parameters.*__getitem__ in the root"
            r" \(test_messages.py"
        ),
    ):
        plan = plan_tensor_parallel(model, 2, example_inputs=(torch.ones(2, 8),))
    head = "\n".join(str(plan).splitlines()[:2])
    assert "not counted" in head and "MB" not in head
    again = TensorParallelPlan.from_json(plan.to_json())
    assert str(again) == str(plan) and again.bytes_per_step is None
    assert (
        plan_tensor_parallel(
            Reads(), 2, example_inputs=(torch.ones(2, 8),)
        ).bytes_per_step
        is not None
    )


class Masked(MLP):
    """Reads a mask of length x length that follows from the inputs, as transformers'
    do."""

    def forward(self, x, mask):
        allowed = mask[:, :, None] & mask[:, None, :]
        scores = x @ x.mT
        if not allowed.all():
            scores = scores.masked_fill(~allowed, -1e9)
        if torch.rand([]) < 0.5:  # a layer that is dropped by chance
            x = x + 1
        return super().forward(scores.softmax(-1) @ x)


def test_large_masks_are_known_on_the_meta_device():
    with torch.device("meta"):
        model = Masked()
    mask = torch.ones(1, 300, dtype=torch.bool)
    mask[0, -1] = False
    plan = plan_tensor_parallel(model, 2, example_inputs=(torch.ones(1, 300, 8), mask))
    assert plan.note == "" and plan["a.weight"].dim is not None


def test_one_call_that_reads_many_parameters():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ParameterList(
                nn.Parameter(torch.empty(4, 8)) for _ in range(1000)
            )

        def forward(self, x):
            return x @ torch.cat(list(self.parts)).T

    with torch.device("meta"):
        model = Many()
    plan = plan_tensor_parallel(model, 2, example_inputs=(torch.ones(2, 8),))
    assert {e.dim for e in plan.entries.values()} == {1} and plan.share == 0.5


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("stop", [TimeoutError, MemoryError])
def test_what_ends_the_work_from_outside_is_no_fault_of_the_model(stop, after):
    """A signal's handler that raises while a long forward is traced, or shown right."""
    calls = []

    class Slow(MLP):
        def forward(self, x):
            calls.append(self)
            if len(calls) == after:
                raise stop("enough")
            return super().forward(x)

    with pytest.raises(stop, match="enough"):
        plan_tensor_parallel(Slow(), 2, example_inputs=(torch.ones(2, 8),))
    assert len(calls) == after
