"""What holds of a plan when calls differ: partial results, modes, gradients within a
forward, attributes, sizes."""

import pytest
import torch
import torch.nn.functional as F
from helpers import compare, pair
from ranks import run_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

from quintnet_dt.running.program import Program

AFTER_A_SUM = {
    "flags are added": lambda y, flags, counts: y + flags,
    "to flags": lambda y, flags, counts: flags + y,
    "integers are subtracted": lambda y, flags, counts: y - counts,
    "from integers": lambda y, flags, counts: counts - y,
    "flags are a factor": lambda y, flags, counts: y * flags,
    "integers divide": lambda y, flags, counts: y / (counts + 1),
    "flags select": lambda y, flags, counts: y[:, :, flags],
    "divided and rounded": lambda y, flags, counts: torch.div(
        y, 0.1, rounding_mode="floor"
    )
    + 0 * y.detach(),
    "rounded": lambda y, flags, counts: (10 * y).to(torch.int64).double(),
    "floored": lambda y, flags, counts: (y // 0.1).detach(),
}


class AfterASum(nn.Module):
    def __init__(self, then):
        super().__init__()
        self.up, self.down, self.then = (
            nn.Linear(16, 64),
            nn.Linear(64, 16, bias=False),
            then,
        )
        self.register_buffer("flags", torch.arange(16) > 7)
        self.register_buffer("counts", torch.arange(16))

    def forward(self, x):
        return self.then(self.down(self.up(x).relu()), self.flags, self.counts)


def test_what_follows_a_partial_result():
    """What is no float adds to a sum as floats do; what is rounded is no sum any
    more."""

    def ranks(rank):
        for name, then in AFTER_A_SUM.items():
            torch.manual_seed(3)
            x = torch.randn(4, 8, 16, dtype=torch.float64)
            sharded, whole = pair(lambda: AfterASum(then), 2, example_inputs=(x,))
            assert (
                sharded.tensor_parallel_plan["down.weight"].dim == 1
            ), sharded.tensor_parallel_plan
            found, expected = sharded(x), whole(x)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=name)
            if expected.grad_fn is not None:
                compare(sharded, whole, (x,), 1e-9)

    run_ranks(ranks, 2)


class Moded(nn.Module):
    """A sum over ranks that is taken later where dropout is off; statistics that may be
    frozen."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.up, self.down, self.out = (
            nn.Linear(16, 64),
            nn.Linear(64, 16, bias=False),
            nn.Linear(16, 16),
        )

    def forward(self, x):
        return self.out(self.drop(self.down(self.up(self.norm(x)).relu())).mean(1))


def test_modules_that_are_in_another_mode_than_the_model():
    """Dropout on in evaluation (Monte Carlo), off in training; frozen norms: each is
    shown right before it runs."""

    def ranks(rank):
        x = torch.randn(
            4, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )
        models = pair(Moded, 2, example_inputs=(x,))
        for modes in (
            "nothing",
            "",
            "all",
            "drop",
            "",
            "norm",
            "drop norm",
            "all",
            "nothing",
        ):
            for m in models:
                m.drop.p = 0.0 if modes == "nothing" else 0.5
                m.train()
                for name, module in m.named_modules():
                    if name in modes.split() or modes == "all":
                        module.eval()
                if modes == "all":
                    m.drop.train()
            compare(*models, (x,))

    run_ranks(ranks, 2)


class Forces(nn.Module):
    """A gradient that the forward takes itself; a fused weight, whose pieces are calls
    of their own."""

    def __init__(self):
        super().__init__()
        self.inp, self.mix, self.out = (
            nn.Linear(12, 24),
            nn.Parameter(torch.randn(12, 35)),
            nn.Linear(7, 6),
        )

    def forward(self, x):
        a, b = self.inp(x).chunk(2, -1)
        y = ((a * b.sigmoid()) @ self.mix).unflatten(-1, (5, 7)).softmax(-1).sum(-2)
        z = y.detach().requires_grad_()
        (force,) = torch.autograd.grad(self.out(z).tanh().sum(), z, create_graph=True)
        (slope,) = torch.autograd.grad(y.square().sum(), a, create_graph=True)
        return self.out(y), force, slope


@pytest.mark.parametrize("within", [False, True])
def test_a_gradient_within_a_checkpoint(within):
    """The forward's own backward runs its checkpoint again, while the forward is
    running."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = Forces(), nn.Linear(6, 4)

        def forward(self, x):
            again = (
                (lambda: self.inner(x))
                if not within
                else lambda: checkpoint(self.inner, x, use_reentrant=False)
            )
            y, force, slope = again()
            return self.last(y), force, slope

    def ranks(rank):
        x = torch.randn(
            3, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )
        models = pair(Checkpointed, 2, example_inputs=(x,))
        for length in 5, 4:
            found = []
            for m in models:
                m.zero_grad()
                given = x[:, :length].clone().requires_grad_()
                out = checkpoint(m, given, use_reentrant=False)
                sum((o * o).sum() for o in out).backward()
                found.append(
                    [*out, given.grad, *(full(p.grad) for p in m.parameters())]
                )
            for a, b in zip(*found):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)

    run_ranks(ranks, 2)


def full(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


class WritesAndReturns(nn.Module):
    """What it returns is the tensor that it wrote to, and not what the call that wrote
    gave back."""

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(10, 10)), nn.Parameter(
            torch.randn(10)
        )

    def forward(self, x):
        y = x @ self.w.t() + self.b
        y.add_(x)
        return y


def test_a_result_that_is_written_in_place_and_returned_by_name():
    """By a module that runs twice, so that nothing can be done at its border."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = WritesAndReturns()

        def forward(self, x):
            return self.block(self.block(x))

    def ranks(rank):
        x = torch.randn(
            3, 7, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )
        models = pair(Twice, 2, example_inputs=(x,))
        # or there is no shard to complete
        assert models[0].tensor_parallel_plan["block.b"].dim == 0
        compare(*models, (x,))

    run_ranks(ranks, 2)


def test_an_attribute_that_was_none_and_is_a_tensor():
    """Class weights that come later: to look at them is no call of the model's."""

    class Weighed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp, self.head, self.weights = nn.Linear(10, 3), nn.Linear(3, 24), None

        def forward(self, x):
            logits = self.head(self.inp(x).relu()).flatten(0, 1)
            return F.cross_entropy(
                logits, logits.detach().argmax(-1), weight=self.weights
            )

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.block = nn.Embedding(12, 9), Weighed()

        def forward(self, x):
            logits = (x @ self.emb.weight.t())[..., :10]
            return F.cross_entropy(
                logits.flatten(0, 1), logits.detach().flatten(0, 1).argmax(-1)
            ) + self.block(logits)

    def ranks(rank):
        x = torch.randn(
            2, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )
        models = pair(Outer, 2, example_inputs=(x,))
        for weights in None, torch.linspace(0.1, 3, 24, dtype=torch.float64), None:
            for m in models:
                m.block.weights = weights
            compare(*models, (x,))

    run_ranks(ranks, 2)


def test_what_a_module_is_set_to_is_compared_without_a_call():
    """Of a setting that was None and is a tensor now, `==` would be a call of the
    model's own to a mode."""
    module, seen = nn.Linear(2, 2), []
    module.weights = torch.ones(2)

    class Sees(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **kwargs or {})

    with Sees():
        assert not Program(training=True, settings={"weights": None}).fits(module)
        assert Program(training=True, settings={"in_features": 2}).fits(module)
        assert not Program(training=True, settings={"in_features": 3}).fits(module)
    assert not seen


class ChosenBySize(nn.Module):
    """A product that is dearer on shards where the input is short, then a loop over the
    length."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.made, self.cell = (
            nn.Linear(*sizes) for sizes in ((8, 64), (64, 8), (8, 64), (8, 8))
        )
        self.register_buffer("given", torch.randn(16, 1, 8))

    def forward(self, x):
        gates = self.made(self.given).softmax(-1)  # whole
        y = self.down((self.up(x).relu().unsqueeze(0) * gates.unsqueeze(1)).sum(0))
        state = y.new_zeros(len(x), 8)
        for t in range(x.shape[1]):
            state = torch.tanh(self.cell(y[:, t]) + state)
        return state


def test_what_was_chosen_by_size_holds_on_a_longer_path():
    """The loop makes another path of another length, on which what ran before it must
    be the same."""

    def ranks(rank):
        models = pair(ChosenBySize, 2, example_inputs=(torch.randn(2, 3, 8).double(),))
        for length in 3, 40, 5:
            compare(*models, (torch.randn(2, length, 8),))

    run_ranks(ranks, 2)
