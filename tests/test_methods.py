"""Models that are more than one forward."""

import pytest
import torch
import torch.nn.functional as F
from helpers import close, compare, make, pair, same_grads
from ranks import run_ranks
from torch import nn

from quintnet_dt import apply_tensor_parallel, register_forward_method


class Clip(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(61, 32), nn.Parameter(
            torch.randn(9, 32)
        )
        self.up, self.down, self.out = (
            nn.Linear(32, 64),
            nn.Linear(64, 32),
            nn.Parameter(torch.randn(32, 16)),
        )
        self.scale = nn.Parameter(torch.tensor(1.5))

    def encode(self, ids, normal=True):
        x = self.tokens(ids) + self.places[: ids.shape[1]]
        x = self.down(self.up(x).relu())[:, -1] @ self.out
        return F.normalize(x, dim=-1) if normal else x

    def logits(self, x, y):
        return self.scale.exp() * x @ y.T

    def forward(self, ids):
        return self.logits(self.encode(ids), self.encode(ids.flip(1), normal=False))


def test_methods_that_read_parameters():
    def ranks(rank):
        ids = torch.arange(14).view(2, 7)
        sharded, whole = pair(Clip, 2, example_inputs=(ids,))
        for model in sharded, whole:
            for name in "encode", "logits":
                register_forward_method(model, name)
        compare(sharded, whole, (ids,))
        for normal in True, False, True:
            sharded.zero_grad(), whole.zero_grad()
            found, expected = (
                m.logits(m.encode(ids, normal), m.encode(ids[:, :5], normal=normal))
                for m in (sharded, whole)
            )
            close(found, expected, "logits")
            found.square().sum().backward(), expected.square().sum().backward()
            same_grads(sharded, whole)
        compare(sharded, whole, (ids,))

    run_ranks(ranks, 2)


def test_a_method_that_raises_leaves_the_model_as_it_was():
    def ranks(rank):
        ids = torch.arange(14).view(2, 7)
        sharded, whole = pair(Clip, 2, example_inputs=(ids,))
        register_forward_method(sharded, "encode")
        with pytest.raises(Exception, match="size|shape|match"):
            sharded.encode(torch.zeros(2, 12, dtype=torch.int64))
        assert "forward" not in vars(sharded)
        compare(sharded, whole, (ids,))

    run_ranks(ranks, 2)


def test_a_loss_that_reads_a_weight():
    """The README's way: what computes with the parameters is a method, or a module,
    that is a forward."""

    class LM(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False)

        def forward(self, ids):
            return self.body(ids)

        def loss(self, hidden, ids):
            penalty = sum(p.square().sum() for p in self.parameters())
            return (
                F.cross_entropy(
                    F.linear(hidden, self.head.weight).flatten(0, 1), ids.flatten()
                )
                + 0.01 * penalty
            )

    def ranks(rank):
        ids = torch.arange(12).view(2, 6)
        sharded, whole = pair(LM, 2, example_inputs=(ids,))
        register_forward_method(sharded, "loss")
        losses = [m.loss(m(ids), ids) for m in (sharded, whole)]
        close(*losses, "the loss")
        for loss in losses:
            loss.backward()
        same_grads(sharded, whole)

    run_ranks(ranks, 2)


@pytest.mark.parametrize(
    "module, name, error",
    [(None, "x", TypeError), (Clip, 3, ValueError), (Clip, "x", ValueError)],
)
def test_what_is_no_method(module, name, error):
    with pytest.raises(error, match="register_forward_method: expected"):
        register_forward_method(make(module) if module else module, name)


def test_before_the_split():
    def ranks(rank):
        ids = torch.arange(14).view(2, 7)
        model, whole = make(Clip), make(Clip)
        register_forward_method(model, "encode")
        apply_tensor_parallel(model, 2, example_inputs=(ids,))
        close(model.encode(ids), whole.encode(ids), "encode")
        close(model(ids), whole(ids), "forward")

    run_ranks(ranks, 2)
