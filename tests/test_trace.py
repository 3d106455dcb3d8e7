"""The record of a forward: what is in it, and that making it changes nothing."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quintnet_dt import plan_tensor_parallel
from quintnet_dt.tracing.trace import trace

CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)
        self.bn, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.counts = {"forward": 0}

    def forward(self, x):
        self.counts["forward"] += 1
        self.bn.running_mean.add_(1)
        return self.b(self.drop(self.bn(self.a(x).relu_())))


class Plain(nn.Module):
    """A module with one weight, and a function for its forward."""

    def __init__(self, f, *shape):
        super().__init__()
        self.f, self.w = f, nn.Parameter(torch.randn(*(shape or (4, 4))))

    def forward(self, *args, **kwargs):
        return self.f(self.w, *args, **kwargs)


def names(graph):
    return [c.name for c in graph.calls]


def ops(graph):
    return [
        n.op._schema.name.removeprefix("aten::") for c in graph.calls for n in c.nodes
    ]


@pytest.mark.parametrize("training", [True, False])
def test_a_trace_changes_nothing(training):
    model = Net().train(training)
    model.drop.eval()
    model.a.register_forward_hook(lambda *a: None)
    x = torch.randn(3, 4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    versions = [t._version for t in model.state_dict(keep_vars=True).values()]
    identities = [id(t) for t in model.state_dict(keep_vars=True).values()]
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    rng, was = torch.get_rng_state(), x.clone()
    trace(model, (x,))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert versions == [t._version for t in model.state_dict(keep_vars=True).values()]
    assert identities == [id(t) for t in model.state_dict(keep_vars=True).values()]
    assert modes == [m.training for m in model.modules()]
    assert hooks == [
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()
    ]
    assert torch.equal(rng, torch.get_rng_state()) and torch.equal(x, was)
    assert model.counts == {"forward": 0} and all(
        p.grad is None for p in model.parameters()
    )


def test_a_forward_that_fails_changes_nothing():
    model, x = Net(), torch.randn(3, 5)
    rng, before = torch.get_rng_state(), {
        k: v.clone() for k, v in model.state_dict().items()
    }
    with pytest.raises(Exception):
        trace(model, (x,))
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert torch.randn(2).sum().item() is not None  # no mode is left on


def test_a_module_whose_hook_raised_ends_no_other():
    class Second(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            try:
                return self.a(x)
            except RuntimeError:
                return self.b(x) + 1

    model, x = Second(), torch.randn(3, 4)

    def refused(module, args):  # of all modules: runs before the recorder's own
        if module.__dict__.get("refused"):
            raise RuntimeError("no a")

    model.a.refused = True
    handle = nn.modules.module.register_module_forward_pre_hook(refused)
    try:
        graph = trace(model, (x,))
    finally:
        handle.remove()
    assert [(c.name, c.module.path) for c in graph.calls] == [
        ("linear", "b"),
        ("add", ""),
    ]
    assert [m.path for m in graph.modules] == ["", "b"]


def test_calls_and_their_operators():
    graph = trace(Net().eval(), (torch.randn(3, 4),))
    assert names(graph) == [
        "add_",
        "linear",
        "relu_",
        "batch_norm",
        "dropout",
        "linear",
    ]
    assert [m.path for m in graph.modules] == ["", "a", "bn", "drop", "b"]
    assert [c.module.path for c in graph.calls] == ["", "a", "", "bn", "drop", "b"]
    assert [n.op._schema.name for n in graph.calls[1].nodes] == [
        "aten::t",
        "aten::addmm",
    ]
    assert set(graph.params) == {n for n, _ in Net().named_parameters()}
    assert all(
        graph.params[n].param == n and graph.params[n].shape == tuple(p.shape)
        for n, p in Net().named_parameters()
    )
    assert graph.calls[1].source.startswith("test_trace.py:")
    (out,) = graph.outputs.values()
    assert out.producer == 5 and out.shape == (3, 4)


def test_an_in_place_operator_makes_a_new_value():
    def f(w, x):
        y = x @ w
        y.add_(1)
        return y * 2

    graph = trace(Plain(f), (torch.randn(2, 4),))
    product, add, times = graph.calls
    (made,) = product.outputs.values()
    (node,) = add.nodes
    (new,) = add.outputs.values()
    assert node.mutated == {made.id} and new.id != made.id
    assert times.inputs[(0, 0)] is new


def test_in_place_operators_are_run_once():
    """On real tensors too: a forward that reads what depends on parameters is traced on
    them."""

    def f(w, x):
        y = x.clone()
        y.add_(1)
        y.unsqueeze_(0)
        seen.append((y.sum().item(), tuple(y.shape)))
        assert (x @ w).sum().item() is not None  # needs the parameters
        return y @ w

    seen = []
    graph = trace(Plain(f), (torch.zeros(2, 4),))
    assert seen[-1] == (8.0, (1, 2, 4))
    assert [v.shape for v in graph.outputs.values()] == [(1, 2, 4)]


def test_what_follows_from_the_inputs_is_known_without_parameters():
    def f(w, x, mask):
        return x @ w if mask.all() else x @ w * mask[..., None]

    model = Plain(f).to("meta")
    x, ones = torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    assert "mul" not in ops(trace(model, (x, ones), device=CPU))
    padded = ones.clone()
    padded[0, 0] = False
    assert "mul" in ops(trace(model, (x, padded), device=CPU))
    assert all(r.from_inputs for r in trace(model, (x, padded), device=CPU).readings)


def test_what_follows_from_the_inputs_is_read_through_operators():
    def f(w, x):
        lengths = (x != 0).sum(-1)
        return F.embedding(x, w)[:, : int(lengths.max())]

    graph = trace(
        Plain(f, 8, 4).to("meta"),
        (torch.tensor([[1, 2, 0, 0], [3, 0, 0, 0]]),),
        device=CPU,
    )
    assert [v.shape for v in graph.outputs.values()] == [(2, 2, 4)]


def test_what_was_written_to_is_not_known_wrongly():
    def f(w, x):
        y = torch.zeros_like(x)
        y.copy_(x)
        y[0] += 1
        return (x @ w) * 2 if y.sum() > 4 else x @ w

    assert "mul" in ops(trace(Plain(f), (torch.ones(1, 4),)))
    assert "mul" not in ops(trace(Plain(f), (torch.zeros(1, 4),)))


def test_a_forward_that_reads_what_depends_on_parameters_runs_on_them():
    def f(w, x):
        return (x @ w) * 2 if w.sum() > 0 else x @ w

    model = Plain(f)
    for sign in (1.0, -1.0):
        nn.init.constant_(model.w, sign)
        graph = trace(model, (torch.ones(2, 4),))
        assert ("mul" in ops(graph)) == (sign > 0)
        assert [r.from_inputs for r in graph.readings] == [False]
        assert graph.unsteady == {id(graph.modules[0])}
        assert torch.equal(model.w, torch.full((4, 4), sign))


def test_on_the_meta_device_what_depends_on_parameters_cannot_be_read():
    model = Plain(lambda w, x: x @ w if w.sum() > 0 else x).to("meta")
    with pytest.raises(Exception):
        trace(model, (torch.ones(2, 4),))


@dataclass
class Batch:
    x: torch.Tensor
    rest: dict


def test_nested_inputs_and_outputs():
    def f(w, batch, *, scale=None, extra=()):
        y = batch.x @ w + batch.rest["y"][0]
        return {"a": (y, [y * scale]), "b": Batch(y + extra[1], {})}

    batch = Batch(torch.randn(2, 4), {"y": [torch.randn(4)]})
    graph = trace(
        Plain(f),
        (batch,),
        {"scale": torch.tensor(2.0), "extra": (None, torch.randn(4))},
    )
    assert set(graph.modules[0].inputs) == {
        (0, 0, "x"),
        (0, 0, "rest", "y", 0),
        (1, "scale"),
        (1, "extra", 1),
    }
    assert set(graph.outputs) == {("a", 0), ("a", 1, 0), ("b", "x")}
    assert ops(graph) == ["mm", "add", "mul", "add"]


def test_tied_parameters_are_one_value():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.h = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
            self.h.weight = self.e.weight

        def forward(self, x):
            return self.h(self.e(x))

    graph = trace(Tied(), (torch.arange(4),))
    assert list(graph.params) == ["e.weight"]
    assert (
        graph.calls[0].inputs[(0, 1)]
        is graph.calls[1].inputs[(0, 1)]
        is graph.params["e.weight"]
    )


def test_a_module_that_runs_twice_has_two_runs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(self.a(x))

    graph = trace(Twice(), (torch.randn(2, 4),))
    assert [m.path for m in graph.modules] == ["", "a", "a"]
    assert graph.calls[0].module is not graph.calls[1].module
    assert graph.use_count[graph.params["a.weight"].id] == 2


def test_frozen_parameters_are_not_differentiable():
    model = Net().eval()
    model.a.weight.requires_grad_(False)
    graph = trace(model, (torch.randn(3, 4),))
    assert (
        not graph.params["a.weight"].differentiable
        and graph.params["b.weight"].differentiable
    )


def test_it_records_in_the_mode_of_the_call():
    """A forward may ask for it; and what needs no gradient sends none."""
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            graph = trace(Net().eval(), (torch.randn(3, 4),))
        assert all(v.differentiable is grad for v in graph.outputs.values())


def test_a_plan_counts_the_backward_under_no_grad_too():
    with torch.no_grad():
        without = plan_tensor_parallel(
            Net().eval(), 2, example_inputs=(torch.randn(3, 4),)
        )
    assert without == plan_tensor_parallel(
        Net().eval(), 2, example_inputs=(torch.randn(3, 4),)
    )


def test_a_large_model_is_traced_without_memory():
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(1 << 16, 1 << 16) for _ in range(4)])  # 69 GB
    graph = trace(model, (torch.empty(1, 1 << 16),), device=CPU)
    assert names(graph) == ["linear"] * 4
