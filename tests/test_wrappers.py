"""What is put around a model, or its blocks, after the split: right as on a plain
model."""

import copy

import pytest
import torch
from helpers import compare, pair
from ranks import run_ranks
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from quintnet_dt import apply_tensor_parallel


class Block(nn.Module):
    def __init__(self, d=16):
        super().__init__()
        self.norm, self.up, self.act, self.down = (
            nn.LayerNorm(d),
            nn.Linear(d, 4 * d),
            nn.GELU(),
            nn.Linear(4 * d, d),
        )

    def forward(self, x):
        return x + self.down(self.act(self.up(self.norm(x))))


def blocks():
    return nn.Sequential(nn.Linear(8, 16), Block(), Block(), nn.Linear(16, 8))


def given():
    return (
        torch.randn(
            2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        ),
    )


class Doubled(nn.Module):
    """A wrapper that changes what is computed."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.softmax(self.inner(x), -1)


def test_activation_checkpoint_wrappers_after_the_split():
    def ranks(rank):
        for first in (False, True):  # with and without a call before
            model, whole = pair(blocks, 2, example_inputs=given())
            if first:
                compare(model, whole, given())
            apply_activation_checkpointing(
                model, check_fn=lambda m: isinstance(m, Block)
            )
            assert isinstance(model[1], CheckpointWrapper)
            for _ in range(2):
                outputs = [m(*copy.deepcopy(given())) for m in (model, whole)]
                model.zero_grad(), whole.zero_grad()
                for out in outputs:
                    out.square().sum().backward()
                torch.testing.assert_close(*outputs)
                for p, q in zip(model.parameters(), whole.parameters()):
                    torch.testing.assert_close(p.grad.full_tensor(), q.grad)

    run_ranks(ranks, 2)


def test_a_wrapper_in_a_sharded_region_is_shown_right_with_what_it_computes():
    def ranks(rank):
        model, whole = pair(blocks, 2, example_inputs=given())
        for _ in range(3):
            compare(model, whole, given())
        for m in (model, whole):
            m[1].act = Doubled(m[1].act)
            m[2].up = checkpoint_wrapper(m[2].up)
        for _ in range(2):
            outputs = [m(*copy.deepcopy(given())) for m in (model, whole)]
            model.zero_grad(), whole.zero_grad()
            for out in outputs:
                out.square().sum().backward()
            torch.testing.assert_close(*outputs)
            for p, q in zip(model.parameters(), whole.parameters()):
                torch.testing.assert_close(p.grad.full_tensor(), q.grad)

    run_ranks(ranks, 2)


@pytest.mark.parametrize("kind", ["ddp", "replicate"])
def test_copies_over_dp(kind):
    """Each copy has a batch of its own; also in a kind of call that is new, and after
    the optimizer's steps."""

    def ranks(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        model, whole = pair(blocks, mesh["tp"], example_inputs=given())
        dp = mesh["dp"]
        outer = (
            DistributedDataParallel(model, device_mesh=dp)
            if kind == "ddp"
            else replicate(model, mesh=dp)
        )
        optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (outer, whole)]
        batch = torch.randn(
            2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )
        mine = batch[dp.get_local_rank()]
        for x in (mine, mine, mine[None]):
            found, expected = outer(x), whole(x)
            torch.testing.assert_close(found, expected)
            found.square().mean().backward()
            whole.zero_grad()
            whole(batch).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step(), optimizer.zero_grad()

    run_ranks(ranks, 4)


def test_stages_of_a_pipeline():
    """Their shapes are learned on uninitialised inputs, which differ between the ranks
    of a stage."""

    def ranks(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
        torch.manual_seed(0)
        parts = [Block(8), Block(8)]
        whole, me = nn.Sequential(*copy.deepcopy(parts)), mesh["pp"].get_local_rank()
        part = apply_tensor_parallel(parts[me], mesh=mesh["tp"])
        stage = PipelineStage(
            part, me, 2, torch.device("cpu"), group=mesh["pp"].get_group()
        )
        schedule = ScheduleGPipe(stage, 2, loss_fn=torch.nn.functional.mse_loss)
        x, y = torch.randn(2, 4, 8)
        heap = [torch.full((2, 8), float(rank)) for _ in range(8)]
        del heap  # what is uninitialised is likely to hold these
        schedule.step(*([x] if me == 0 else []), **({"target": y} if me else {}))
        for a, b in zip(x.chunk(2), y.chunk(2)):
            (torch.nn.functional.mse_loss(whole(a), b) / 2).backward()
        for p, q in zip(part.parameters(), whole[me].parameters()):
            torch.testing.assert_close(p.grad.full_tensor(), q.grad)

    run_ranks(ranks, 4)


@pytest.mark.parametrize(
    "act", [weight_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)]
)
def test_pruned_or_parametrized(act):
    """Before the split right; after it one error, on every rank, at that call or the
    next."""

    def ranks(rank):
        def build():
            model = blocks()
            act(model[1].up)
            return model.double()

        compare(*pair(build, 2, example_inputs=given()), given())
        model = apply_tensor_parallel(blocks().double(), 2, example_inputs=given())
        with pytest.raises(
            RuntimeError, match="expected the parameters that were split|DTensor|aten"
        ):
            act(model[1].up)
            model(*given())

    run_ranks(ranks, 2)
