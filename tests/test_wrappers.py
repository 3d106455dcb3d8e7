"""What is put around a model, or its blocks, after the split: right as on a plain model."""

import copy

import torch
from helpers import compare, pair
from ranks import run_ranks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)


class Block(nn.Module):
    def __init__(self, d=16):
        super().__init__()
        self.norm, self.up, self.act, self.down = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d)

    def forward(self, x):
        return x + self.down(self.act(self.up(self.norm(x))))


def blocks():
    return nn.Sequential(nn.Linear(8, 16), Block(), Block(), nn.Linear(16, 8))


def given():
    return (torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64),)


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
            apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, Block))
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
