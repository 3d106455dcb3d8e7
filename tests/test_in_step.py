"""All ranks of a tp group make the same calls in the same order, or are told; while
they do, nothing is exchanged."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import compare, double, pair
from ranks import run_ranks
from torch import nn

from quintnet_dt import ProcessGroupManager, apply_tensor_parallel
from quintnet_dt.in_step import InStep
from quintnet_dt.running.structure import hooks_on


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.drop = (
            nn.Linear(8, 32),
            nn.Linear(32, 8),
            nn.Dropout(0.1),
        )

    def forward(self, x, mask=None, extra=None):
        y = self.drop(self.down(F.gelu(self.up(x))))
        return y if mask is None else y * mask


def split():
    torch.manual_seed(0)
    return apply_tensor_parallel(Net(), 2, example_inputs=(torch.ones(3, 8),))


def in_step_of(model):
    return hooks_on(model).context.paths.in_step


def count_told(model, monkeypatch):
    """A list that grows by one with each call that this rank tells of."""
    told, tell = [], InStep.tell
    monkeypatch.setattr(
        InStep,
        "tell",
        lambda self, mine, usual: (told.append(mine.text), tell(self, mine, usual))[1],
    )
    return told


def test_calls_as_expected_are_told_to_nobody(monkeypatch):
    def ranks(rank):
        model, x = split(), torch.ones(3, 8)
        told = count_told(model, monkeypatch)

        def new(*calls):
            told.clear()
            for call in calls:
                call()
            return len(told)

        def grows(length):
            return lambda: model(x, torch.ones(length, 1, 1))

        def decode(length):
            model(torch.ones(2, 1, 8), torch.ones(2, 1, 1), torch.ones(2, length))

        def evaluate():
            model.eval()
            with torch.no_grad():
                model(x)
            model.train()

        train = lambda: model(x)  # noqa: E731
        assert new(train) == new(train) == 1  # the first two of a kind
        assert new(*[train] * 20) == 0
        # other sizes
        assert new(lambda: model(torch.ones(5, 8))) == 1 and new(train) == 1
        new(*[train, evaluate] * 4)
        assert new(*[train, evaluate] * 10) == 0  # one after the other, again and again
        new(*[lambda n=n: decode(n) for n in range(4, 9)])
        # a mask that grows by one
        assert new(*[lambda n=n: decode(n) for n in range(9, 40)]) == 0
        assert new(lambda: decode(41)) == 1

    run_ranks(ranks, 2)


CALLS = {
    "mode": lambda model, x, rank: model.train(rank == 0)(x),
    "gradients": lambda model, x, rank: no_grad(model, x) if rank else model(x),
    "shape": lambda model, x, rank: model(x[: 2 + rank]),
    "argument": lambda model, x, rank: model(x, *[torch.ones(3, 1)] * rank),
    "number": lambda model, x, rank: model(x, extra=rank),
    "part": lambda model, x, rank: model.up(x) if rank else model(x),
    "order": lambda model, x, rank: model(
        x, extra={k: x for k in ("ab" if rank else "ba")}
    ),
}


def no_grad(model, x):
    with torch.no_grad():
        return model(x)


def test_calls_that_differ_are_told_on_every_rank():
    """Where none of them is as expected; after the error all go on."""
    shown = {
        "mode": (
            "rank 0 called the model in train mode",
            "rank 1 called the model in eval mode",
        ),
        "gradients": ("in train mode with", "in train mode without gradients"),
        "shape": ("(2, 8)", "(3, 8)"),
        "argument": ("[0][1] is nothing on rank 0", "(3, 1)"),
        "number": ("['extra'] is 0 on rank 0 and 1 on rank 1",),
        "part": ("rank 0 called the model", "rank 1 called up"),
        "order": ("made different calls", "extra"),
    }

    def ranks(rank):
        x = torch.ones(3, 8)
        for how, call in CALLS.items():
            model = split()
            model(x)
            with pytest.raises(ValueError) as error:
                call(model, x, rank)
            assert all(text in str(error.value) for text in shown[how]), (
                how,
                str(error.value),
            )
            model.train()
            for _ in range(3):
                model(x)

    run_ranks(ranks, 2)


def test_a_call_that_another_rank_does_not_expect():
    """Rank 1 goes on as before, into a collective, where it cannot be reached; it is
    told why that failed."""

    def ranks(rank):
        ranks = ProcessGroupManager(tp_size=2, timeout=3)
        torch.manual_seed(0)
        model, x = apply_tensor_parallel(
            Net(), mesh=ranks, example_inputs=(torch.ones(3, 8),)
        ), torch.ones(3, 8)
        for _ in range(4):
            model(x)
        if rank == 0:
            model.eval()
        model(x)

    first, second = run_ranks(ranks, 2, expect_failure=True, init=False)
    assert (
        "rank 0 called the model in eval mode with argument 0 of shape (3, 8)" in first
    )
    assert (
        "rank 1 told of none within 3 s" in first
        and "the model in train mode with argument 0" in first
    )
    assert "rank 0 called the model in eval mode" in second and "in its place" in second


def test_another_length_after_many_calls():
    def ranks(rank):
        model = split()
        for length in 3, 3, 3, 4, 6, 5, 5, 2:
            model(torch.ones(length, 8))
        with pytest.raises(
            ValueError, match=r"\(3, 8\).* on rank 0 and a tensor of shape \(4, 8\)"
        ):
            model(torch.ones(3 + rank, 8))

    run_ranks(ranks, 2)


def test_copies_and_groups_call_apart():
    """A copy's calls are its own; those of another tp group too."""

    def ranks(rank):
        groups = ProcessGroupManager(tp_size=2)
        torch.manual_seed(0)
        model = apply_tensor_parallel(
            Net(), mesh=groups, example_inputs=(torch.ones(3, 8),)
        )
        other, x = copy.deepcopy(model).eval(), torch.ones(3 + groups.dp_rank, 8)
        assert in_step_of(other).name != in_step_of(model).name
        for step in range(3 + groups.dp_rank):
            model(x), other(x[:2])
        if groups.dp_rank:
            model.eval()(x)

    run_ranks(ranks, 4)


def learns_apart(rank):
    """Keyword arguments in another order are the same call, which both must learn."""
    sharded, whole = pair(Net, 2, example_inputs=double((torch.ones(3, 8),)))
    given = {"x": torch.rand(3, 8), "mask": torch.rand(3, 8), "extra": torch.zeros(1)}
    for _ in range(3):
        compare(
            sharded,
            whole,
            double({k: given[k] for k in (sorted(given) if rank else [*given])}),
        )


def test_keyword_arguments_in_another_order():
    run_ranks(learns_apart, 2)


def test_a_new_call_that_one_rank_cannot_learn():
    class Fails(Net):
        def forward(self, x, mask=None, extra=None):
            if extra is not None and self.rank:
                raise ArithmeticError("no such thing")
            return super().forward(x, mask)

    def ranks(rank):
        torch.manual_seed(0)
        model = Fails()
        model.rank = rank
        x = torch.ones(3, 8)
        apply_tensor_parallel(model, 2, example_inputs=(x,))
        with pytest.raises(
            ArithmeticError if rank else RuntimeError, match="no such thing"
        ):
            model(x, extra=1)
        model(x)

    run_ranks(ranks, 2)


def test_a_store_is_kept_small():
    def ranks(rank):
        model = split()
        for length in range(3, 30):
            model(torch.ones(length * length, 8))
        store = in_step_of(model).store
        return [store.check([f"{n}/{rank}"]) for n in range(27)]

    for kept in run_ranks(ranks, 2):
        assert kept == [False] * 26 + [True]
