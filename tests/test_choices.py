"""What a plan costs to make, what it says, and what it chooses."""

import copy
import inspect
import re
from itertools import combinations

import pytest
import torch
from models.regions import D, ResNet, attention, fused_mlp, llama, model
from torch import nn

from quintnet_dt import plan_tensor_parallel
from quintnet_dt.axes.axes import Axes, own_axis
from quintnet_dt.axes.sharding import ShardedParam, Sharding
from quintnet_dt.planning.candidates import candidates
from quintnet_dt.planning.cost import change_by
from quintnet_dt.planning.hoist import hoist
from quintnet_dt.planning.lay_out import lay_out
from quintnet_dt.planning.planner import Planner
from quintnet_dt.planning.search import conflicts
from quintnet_dt.planning.sink import sink
from quintnet_dt.planning.task import Task
from quintnet_dt.tracing.trace import trace


def test_planning_a_hundred_gigabytes_allocates_nothing():
    big = dict(
        hidden_size=8192,
        intermediate_size=32768,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
    )
    with torch.device("meta"):
        model = llama(**big, vocab_size=128256, num_hidden_layers=3).bfloat16().eval()
    state = torch.get_rng_state()
    plan = plan_tensor_parallel(
        model, 8, example_inputs=(torch.ones(1, 16, dtype=torch.long),)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(x.is_meta for x in (*model.parameters(), *model.buffers()))
    assert not model.training and plan.share < 0.13

    decisions = {}
    for name, e in plan.entries.items():
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
        if layer:
            decisions.setdefault(layer[1], {})[layer[2]] = (
                e.dim,
                e.pieces,
                e.how,
                re.sub(r"layers\.\d+", "", e.why),
            )
    assert len(decisions) == 3 and decisions["0"] == decisions["1"] == decisions["2"]
    assert [decisions["0"][f"self_attn.{p}_proj.weight"][:3] for p in "qo"] == [
        (0, 1, "local"),
        (1, 1, "local"),
    ]


@pytest.mark.parametrize("train", [True, False])
def test_planning_changes_nothing(train):
    model = nn.Sequential(ResNet(), nn.Dropout(0.5), nn.Linear(7, 7)).train(train)
    model[1].train(not train)
    hook = model[2].register_forward_hook(lambda *a: None)

    def seen():
        hooks = [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ]
        modes = [(m.training, sorted(vars(m)), m.forward) for m in model.modules()]
        grads = [(id(p), p._version, p.grad) for p in model.parameters()]
        return (
            hooks,
            modes,
            grads,
            [id(b) for b in model.buffers()],
            torch.is_grad_enabled(),
        )

    before, values, state = (
        seen(),
        copy.deepcopy(model.state_dict()),
        torch.get_rng_state(),
    )
    plan_tensor_parallel(
        model, 2, example_inputs=(torch.randn(2, 3, 8, 8, generator=torch.Generator()),)
    )
    assert torch.equal(torch.get_rng_state(), state) and seen() == before
    assert all(torch.equal(x, values[k]) for k, x in model.state_dict().items())
    hook.remove()


def blocked(m, x):
    basis = torch.linalg.qr(m.a.weight).Q
    return m.b(x @ basis.mT)


def test_why_names_the_operator_in_the_way_and_its_line():
    line = inspect.getsourcelines(blocked)[1] + 1
    build = model(
        blocked,
        lambda: {"a": nn.Linear(D, 64, bias=False), "b": nn.Linear(64, D)},
        residual=False,
    )
    a = plan_tensor_parallel(build(), 2, example_inputs=(torch.randn(2, 5, D),))[
        "a.weight"
    ]
    assert (
        a.how == "weight gathered"
        and "linalg_qr" in a.why
        and f"test_choices.py:{line}" in a.why
    ), a


def chain(*widths):
    return nn.Sequential(
        *[nn.Linear(a, b, bias=False) for a, b in zip(widths, widths[1:])]
    )


SMALL = [
    lambda: chain(16, 64, 16, 8),
    lambda: chain(8, 8, 64, 24, 64),
    attention(),
    fused_mlp("chunk"),
]


@pytest.mark.parametrize("build", SMALL)
@pytest.mark.parametrize("n", [2, 4])
def test_the_choice_is_brute_forces(build, n):
    """Of all sets of axes that do not conflict, none takes less time than the
    planner's."""
    model = build()
    x = torch.randn(
        2, 12, next(p.shape[-1] for p in model.parameters()), requires_grad=True
    )
    graph = trace(model, (x,), {})
    axes = Axes(graph)
    task = Task(graph, axes, n)
    planner = Planner(task)
    axes_that_fit = [c for c in candidates(task) if planner.weigh(c)]

    near = conflicts(axes_that_fit)

    def seconds(sharding):
        layout = hoist(graph, lay_out(graph, axes, sharding))
        return change_by(graph, layout, task.work).seconds

    found = {}
    for k in range(len(axes_that_fit) + 1):
        for some in combinations(range(len(axes_that_fit)), k):
            if any(a in near[b] for a, b in combinations(some, 2)):
                continue
            taken = [axes_that_fit[i] for i in some]
            sharding, used_by = Sharding(through={c.axis for c in taken}), {}
            for c in taken:
                used_by.update((call.index, c.axis) for call in c.calls)
                sharding.params.update(c.params)
            planner.fill(sharding, used_by)
            found[str([c.params.keys() for c in taken])] = seconds(sharding)
    best = min(found, key=found.get)
    chosen = seconds(planner.choose())
    assert chosen <= found[best] + 1e-12, f"{best}: {found[best]} s, found {chosen}"
    assert len(found) > 1


def test_what_is_cut_for_a_weights_own_axis_stays_where_it_is_made():
    """A call that makes it of what the weight's other call reads too does not know that
    axis."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.pre, self.lin = nn.Linear(64, 64), nn.Linear(64, 5)

        def forward(self, x):
            x = self.pre(x)
            return self.lin(x) + self.lin(x * 2)

    graph = trace(Twice(), (torch.randn(2, 6, 64),), {})
    axes = Axes(graph)
    axis = own_axis(graph, "lin.weight", 1)
    layout = lay_out(graph, axes, Sharding({"lin.weight": ShardedParam(1, axis)}))
    work = Task(graph, axes, 2).work
    assert sink(graph, axes, layout, work).axis_of == dict.fromkeys((1, 3), axis)
