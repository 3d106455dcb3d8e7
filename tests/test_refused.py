"""What is refused before anything is changed, models that are split again, and what is
left of a step."""

import copy
import gc
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers import compare, pair
from models.attention import Attention, both, given, near
from ranks import run_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
)

from quintnet_dt import apply_tensor_parallel
from quintnet_dt import contiguous as blocks
from quintnet_dt import plan_tensor_parallel


class Holds(nn.Module):
    """Reads its weight through something that keeps the parameter itself."""

    def __init__(self, how):
        super().__init__()
        self.w = w = nn.Parameter(torch.randn(16, 16))
        if how == "list":
            self.read = [w]
        elif how == "partial":
            self.read = partial(torch.matmul, other=w)
        elif how == "lambda":
            self.read = lambda x: x @ w
        else:
            self.optimizer = torch.optim.SGD([w], 0.1)

    def forward(self, x):
        read = getattr(self, "read", None)
        return (
            x @ self.w
            if read is None
            else x @ read[0] if isinstance(read, list) else read(x)
        )


@pytest.mark.parametrize("how", ["list", "partial", "lambda", "optimizer"])
def test_parameters_that_something_else_holds(how):
    """It would go on with the whole, old parameter."""
    with pytest.raises(
        ValueError, match="w: expected every parameter .* attribute of its module"
    ):
        plan_tensor_parallel(Holds(how), 2, example_inputs=(torch.ones(2, 16),))


def test_parameters_that_were_replaced():
    def ranks(sharded, whole):
        state = copy.deepcopy(sharded.state_dict())
        for assigned in whole.state_dict(), state:  # whole tensors, and DTensors
            sharded.load_state_dict(assigned, assign=True)
            compare(sharded, whole, given())
        sharded.f[2].weight = nn.Parameter(torch.randn(16, 32, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="f.2.weight: expected the DTensor"):
            sharded(*given())
        apply_tensor_parallel(sharded, 2, example_inputs=given())  # splits what is new
        whole.f[2].weight.data.copy_(sharded.f[2].weight.full_tensor())
        compare(sharded, whole, given())
        with pytest.raises(ValueError, match="split already"):
            apply_tensor_parallel(sharded, 2)

    both(ranks)


@pytest.mark.parametrize("contiguous", [True, False])
def test_a_whole_state_that_one_rank_has(contiguous):
    """torch fills fused pieces wrongly from a broadcast; it is told, or with
    `contiguous` it is right."""

    def ranks(sharded, whole):
        fused = sharded.tensor_parallel_plan["qkv.weight"]
        assert fused.pieces == (1 if contiguous else 3)
        state = (
            {k: v + 1 for k, v in whole.state_dict().items()}
            if dist.get_rank() == 0
            else {}
        )
        state.update({"mask": whole.mask} if state else {})
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        if not contiguous:
            with pytest.raises(RuntimeError, match="filled qkv.weight, .* wrongly"):
                set_model_state_dict(sharded, state, options=options)
            state, options = {
                k: v + 1 for k, v in whole.state_dict().items()
            }, StateDictOptions(full_state_dict=True)
            state["mask"] = whole.mask
        set_model_state_dict(sharded, state, options=options)
        whole.load_state_dict(
            {
                k: v + 1 if v.is_floating_point() else v
                for k, v in whole.state_dict().items()
            }
        )
        compare(sharded, whole, given())

    both(ranks, contiguous=contiguous)


def test_fused_weights_are_blocks_before_torch_2_13(monkeypatch):
    """There DTensor cannot gather the other kind."""
    monkeypatch.setattr(blocks, "SINCE_2_13", False)

    def ranks(sharded, whole):
        assert sharded.tensor_parallel_plan["qkv.weight"].pieces == 1
        compare(sharded, whole, given())

    both(ranks)


class Scaled(Attention):
    def forward(self, x, scale):
        return super().forward(x) * scale["by"]


@pytest.mark.parametrize("blind", [True, False])
def test_a_model_that_is_split_again(blind):
    """Placements stay, fused pieces among them, also where no inputs are known that
    fit; what was asked for besides holds, or is refused."""

    def ranks(rank):
        inputs = (*given(), {"by": torch.tensor(2.0, dtype=torch.float64)})
        sharded, whole = pair(Scaled, 2, example_inputs=inputs)
        before = {name: p.placements for name, p in sharded.named_parameters()}
        assert sharded.tensor_parallel_plan["qkv.weight"].pieces == 3
        sharded.o, whole.o = (nn.Linear(16, 16, dtype=torch.float64) for _ in range(2))
        with pytest.raises(
            ValueError,
            match="plan: expected none for a model that was split before, found a dict",
        ):
            apply_tensor_parallel(sharded, 2, example_inputs=inputs, plan={})
        with (
            pytest.warns(UserWarning, match="planned without a forward")
            if blind
            else nullcontext()
        ):
            apply_tensor_parallel(
                sharded,
                2,
                example_inputs=None if blind else inputs,
                contiguous=True,
                loss_parallel=not blind,
            )
        for name, p in sharded.named_parameters():
            assert p.placements == before[name] or name.startswith("o.")
        whole.o.load_state_dict(
            {k: p.full_tensor() for k, p in sharded.o.state_dict().items()}
        )
        assert sharded.tensor_parallel_plan.loss_parallel != blind
        if blind:
            compare(sharded, whole, inputs)
        else:
            found = sharded(*inputs)
            near(found, whole(*inputs), 1e-9)

    run_ranks(ranks, 2)


def test_a_plan_keeps_its_loss_parallel():
    def ranks(rank):
        model = nn.Sequential(
            nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 32, bias=False)
        ).double()
        plan = plan_tensor_parallel(
            model, 2, example_inputs=given(), loss_parallel=True
        )
        apply_tensor_parallel(model, 2, example_inputs=given(), plan=plan)
        assert model.tensor_parallel_plan.loss_parallel
        # a path that was traced, and one that was not
        outputs = [
            type(model(*given())),
            type(model.eval()(*given())),
        ]
        assert outputs[0] is outputs[1]

    run_ranks(ranks, 2)


def test_nothing_is_kept_of_a_step():
    """The autograd graph of a forward is freed with its output, also where one tensor
    enters several regions."""

    def ranks(sharded, whole):
        def alive():
            gc.collect()
            return sum(
                type(x) is torch.Tensor and x.grad_fn is not None
                for x in gc.get_objects()
            )

        (x,) = given()
        x.requires_grad_()
        for step in range(6):
            loss = sharded(x).square().sum()
            if step % 2:
                loss.backward()
            with torch.no_grad():
                sharded(x)
            del loss
            if step == 1:
                before = alive()
        assert alive() == before and not hasattr(x, "_tp_kept")

    both(ranks)
