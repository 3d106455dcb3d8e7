"""Ranks are processes of their own: each has another hash seed, and its own order of
all that has no order."""

import pytest
import torch
import torch.nn.functional as F
from helpers import compare, double, pair
from ranks import run_ranks
from torch import nn

from quintnet_dt import apply_tensor_parallel
from quintnet_dt.axes.axes import Axes
from quintnet_dt.canonical import canonical
from quintnet_dt.planning.cost import change_by
from quintnet_dt.planning.lay_out import lay_out
from quintnet_dt.planning.planner import Planner
from quintnet_dt.planning.task import Task
from quintnet_dt.tracing.trace import trace


class Cross(nn.Module):
    """Cross attention with weights of its own, called by keyword."""

    def __init__(self, d=36):
        super().__init__()
        self.q, self.k, self.v, self.o = (
            nn.Parameter(torch.randn(d, d) / 6) for _ in range(4)
        )

    def forward(self, query=None, memory=None, other=None):
        pairs = (self.q, query), (self.k, memory), (self.v, other)
        q, k, v = (
            F.linear(x, w).unflatten(-1, (3, -1)).transpose(1, 2) for w, x in pairs
        )
        return F.linear(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2), self.o)


class Model(nn.Module):
    """It is called by keyword, and calls by keyword."""

    def __init__(self, d=36):
        super().__init__()
        self.parts = nn.ModuleDict(
            {name: nn.Linear(8, d) for name in ("alpha", "beta", "gamma")}
        )
        self.cross, self.norm = Cross(d), nn.LayerNorm(d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, alpha, beta, gamma):
        inputs = {"alpha": alpha, "beta": beta, "gamma": gamma}
        parts = {name: self.norm(self.parts[name](x)) for name, x in inputs.items()}
        x = parts["alpha"] + self.cross(
            query=parts["alpha"], memory=parts["beta"], other=parts["gamma"].tanh()
        )
        return {"x": x + self.down(F.gelu(self.up(x))), "parts": parts}


def keywords(size):
    """Keyword arguments in the order of a set of strings, which is another in every
    process."""
    gen = torch.Generator().manual_seed(size)
    inputs = {
        name: torch.randn(2, size, 8, generator=gen)
        for name in ("alpha", "beta", "gamma")
    }
    return double({name: inputs[name] for name in set(inputs)})


def seconds_weighed(n):
    """Of many weights, in the order of a set of their names."""
    sizes = 7, 36, 11, 48, 13, 57, 17, 60, 19, 69, 23
    model = nn.Sequential(
        *(m for i, o in zip(sizes, sizes[1:]) for m in (nn.Linear(i, o), nn.ReLU()))
    )
    graph = trace(model, (torch.ones(5, 7),))
    planner = Planner(Task(graph, Axes(graph), n))
    layout = lay_out(graph, planner.task.axes, planner.choose())
    seconds = change_by(graph, layout, planner.task.work).seconds
    return seconds, planner.seconds_apart(set(graph.params))


def split_and_called(rank, n):
    sharded, whole = pair(Model, n, example_inputs=keywords(5))
    for size in 5, 7:
        compare(sharded, whole, keywords(size))
    sharded.eval(), whole.eval()
    compare(sharded, whole, keywords(4), grad=False)
    split = sum(
        e.dim is not None for e in sharded.tensor_parallel_plan.entries.values()
    )
    return hash("alpha"), seconds_weighed(n), split


def test_ranks_with_other_hash_seeds():
    """On 3 ranks seconds are no whole numbers, whose sum depends on the order in which
    they are added."""
    hashes, weighed, split = zip(*run_ranks(split_and_called, 3, 3, fresh=True))
    assert (
        len(set(hashes)) == 3
        and weighed == (weighed[0],) * 3
        and weighed[0][0]
        and split == (split[0],) * 3
    )


def test_modules_in_another_order():
    def ranks(rank):
        # as a set of names would have it
        names = ["a", "b"] if rank == 0 else ["b", "a"]
        model = nn.ModuleDict({name: nn.Linear(8, 8) for name in names})
        model.forward = lambda x: model["a"](x) + model["b"](x)
        apply_tensor_parallel(model, 2, example_inputs=(torch.ones(2, 8),))

    for message in run_ranks(ranks, 2, expect_failure=True):
        assert (
            "another order" in message
            and "parameter a.weight" in message
            and "parameter b.weight" in message
        )


@pytest.mark.parametrize(
    "what",
    ["src_data_rank", "contiguous", "loss_parallel", "shape", "dtype", "more", "meta"],
)
def test_told_before_anything_depends_on_it(what):
    def ranks(rank):
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        model.register_buffer("kept", torch.ones(3))
        options = {what: rank == 1} if what in ("contiguous", "loss_parallel") else {}
        if what == "src_data_rank":
            options[what] = rank
        elif rank == 1 and what == "more":
            model.register_buffer("extra", torch.ones(3))
        elif rank == 1:
            changed = {
                "shape": torch.ones(4),
                "dtype": torch.ones(3).half(),
                "meta": torch.ones(3, device="meta"),
            }
            model.kept = changed.get(what, model.kept)
        apply_tensor_parallel(model, 2, example_inputs=(torch.ones(2, 8),), **options)

    for message in run_ranks(ranks, 2, expect_failure=True):
        wanted = {
            "more": "buffer extra",
            "shape": "buffer kept",
            "dtype": "buffer kept",
            "meta": "buffer kept",
        }
        assert (
            wanted.get(what, what) in message
            and "on rank 0" in message
            and "on rank 1" in message
        )


def test_a_source_that_is_no_rank():
    def ranks(rank):
        apply_tensor_parallel(nn.Linear(8, 8), 2, src_data_rank=2 if rank else 0)

    messages = run_ranks(ranks, 2, expect_failure=True)
    assert all("src_data_rank" in m and "found 2" in m for m in messages)


def test_canonical_data():
    a = {
        "x": {"q", "memory", "other"},
        "y": [torch.float32, slice(1, None), {1.5, (1, "a")}],
    }
    b = {
        "y": [torch.float32, slice(1, None), {(1, "a"), 1.5}],
        "x": {"other", "memory", "q"},
    }
    assert canonical(a) == canonical(b) != canonical({**a, "x": {"q"}})
    assert "0x" not in canonical([object(), nn.Linear(1, 1), lambda: 0])
    assert canonical({"a": 1}) != canonical({"a": "1"}) != canonical({"a": True})
