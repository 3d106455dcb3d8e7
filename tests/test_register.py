"""Rules for operators of one's own: right and gathered without one, right and sharded
through with one."""

import pytest
import torch
from helpers import compare, make, pair
from ranks import run_ranks
from torch import nn
from torch.nn import functional as F

from quintnet_dt import plan_tensor_parallel, register_axis_rule
from quintnet_dt.axes.rules import RULES


@pytest.fixture(autouse=True)
def rules_as_they_were():
    kept = dict(RULES)
    yield
    RULES.clear()
    RULES.update(kept)


def define(name, f, backward, **kw):
    """A custom operator that computes as `f` does, opaque to the trace."""
    op = torch.library.custom_op(f"mylib::{name}", f, mutates_args=(), **kw)
    op.register_fake(f)

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*(x for x in inputs if torch.is_tensor(x)))
        ctx.numbers = [x for x in inputs if not torch.is_tensor(x)]

    op.register_autograd(backward, setup_context=setup_context)
    return op


def swish(x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(slope * x)


def swish_backward(ctx, grad):
    x, slope = ctx.saved_tensors
    s = torch.sigmoid(slope * x)
    d = s * (1 - s) * grad
    return grad * s + d * slope * x, (d * x * x).sum((0, 1))


def dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight, bias).clone()


def dense_backward(ctx, grad):
    x, weight, _ = ctx.saved_tensors
    return grad @ weight, torch.einsum("bto,bti->oi", grad, x), grad.sum((0, 1))


def per_head(x: torch.Tensor) -> torch.Tensor:
    """A softmax over the features of each head."""
    return torch.softmax(x, -1)


def per_head_backward(ctx, grad):
    y = torch.softmax(ctx.saved_tensors[0], -1)
    return y * (grad - (grad * y).sum(-1, keepdim=True))


def grouped(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int
) -> torch.Tensor:
    """A linear layer for each group of features."""
    x, weight = x.unflatten(-1, (groups, -1)), weight.unflatten(0, (groups, -1))
    return torch.einsum("btgi,goi->btgo", x, weight).flatten(-2) + bias


def grouped_backward(ctx, grad):
    (x, weight, _), (groups,) = ctx.saved_tensors, ctx.numbers
    x, weight = x.unflatten(-1, (groups, -1)), weight.unflatten(0, (groups, -1))
    by_group = grad.unflatten(-1, (groups, -1))
    grad_x = torch.einsum("btgo,goi->btgi", by_group, weight).flatten(-2)
    grad_weight = torch.einsum("btgo,btgi->goi", by_group, x).flatten(0, 1)
    return grad_x, grad_weight, grad.sum((0, 1)), None


SWISH = define("swish", swish, swish_backward)
LINEAR = define("linear", dense, dense_backward)  # a name that aten has too
VIEW = define("view", per_head, per_head_backward)
GROUPED = define("grouped", grouped, grouped_backward)
LINES = {
    "swish": "b t h, h -> b t h",
    "linear": "b t i, o i, +o -> b t o",
    "view": "... d! -> ... d",
}


class Net(nn.Module):
    """Linear, swish of learned slopes, a custom linear back, then heads through a
    custom softmax. `call` is how operators are called."""

    def __init__(self, call=lambda name: getattr(torch.ops.mylib, name)):
        super().__init__()
        self.up, self.slope = nn.Linear(8, 32), nn.Parameter(torch.randn(32))
        self.weight, self.bias = nn.Parameter(torch.randn(8, 32) / 4), nn.Parameter(
            torch.randn(8)
        )
        self.q, self.out = nn.Linear(8, 64), nn.Linear(64, 8)
        self.call = call

    def forward(self, x):
        h = self.call("swish")(self.up(x), self.slope)
        h = self.call("linear")(h, self.weight, self.bias)
        y = self.call("view")(self.q(h).unflatten(-1, (4, 16)))
        return self.out(y.flatten(-2))


def given():
    return (torch.randn(2, 3, 8),)


@pytest.mark.parametrize("n", [2, 4])
def test_a_custom_operator_without_and_with_a_rule(n):
    def ranks(rank):
        for with_rules in (False, True):
            torch.manual_seed(3)
            x = given()[0].double()
            if with_rules:
                for name, line in LINES.items():
                    register_axis_rule(getattr(torch.ops.mylib, name), line)
            sharded, whole = pair(Net, n, example_inputs=(x,))
            compare(sharded, whole, (x,))
            plan = sharded.tensor_parallel_plan
            how = {
                name: plan[name].how
                for name in ("up.weight", "slope", "weight", "q.weight", "out.weight")
            }
            if with_rules:
                assert set(how.values()) == {"local"}, plan
                assert [plan[name].dim for name in how] == [0, 0, 1, 0, 1], plan
            else:
                for name, op in {"slope": "swish", "weight": "linear"}.items():
                    assert plan[name].how == "weight gathered", plan
                    why = (
                        f"mylib::{op} needs the whole dim: mylib.{op} in the root"
                        " (test_register.py:"
                    )
                    assert plan[name].why.startswith(why), plan
        return plan.bytes_per_step

    assert len(set(run_ranks(ranks, n))) == 1


class Grouped(nn.Module):
    """A linear layer in 4 groups between two others. `groups` is how their number is
    written."""

    def __init__(self, groups):
        super().__init__()
        self.up, self.out = nn.Linear(8, 128), nn.Linear(64, 8)
        self.weight, self.bias = nn.Parameter(torch.randn(64, 32)), nn.Parameter(
            torch.randn(64)
        )
        self.groups = groups

    def forward(self, x):
        h = self.up(x)
        y = torch.ops.mylib.grouped(h, self.weight, self.bias, self.groups(h))
        return self.out(torch.tanh(y))


IN_GROUPS = "b t (g i), (g o) i, +(g o) -> b t (g o); g=groups"
# How the groups are written: [(parameter, the dim that is sharded, of how many
# blocks)].
SHARDED = {
    # features within groups are summed over: each rank has some of every group's
    "a number": [("up.weight", 0, 4), ("weight", 1, 1)],
    # this number would change with the shard that is summed over; those that are made
    # do not
    "by the input's size": [("weight", 0, 4), ("bias", 0, 4), ("out.weight", 1, 4)],
}


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("written", SHARDED)
def test_a_rule_with_brackets(written, n):
    def groups(h):
        return 4 if written == "a number" else h.shape[-1] // 32

    def ranks(rank):
        for with_rule in (False, True):
            if with_rule:
                register_axis_rule("mylib::grouped", IN_GROUPS)
            torch.manual_seed(3)
            x = given()[0].double()
            sharded, whole = pair(lambda: Grouped(groups), n, example_inputs=(x,))
            compare(sharded, whole, (x,))
            plan = sharded.tensor_parallel_plan
            for name, dim, blocks in SHARDED[written]:
                found = plan[name].how, plan[name].dim, plan[name].pieces
                assert (found == ("local", dim, blocks)) == with_rule, plan
        return plan.bytes_per_step

    assert len(set(run_ranks(ranks, n))) == 1


def test_a_length_is_a_number_or_told_by_a_dim():
    """Each says the same of this model."""
    plans = []
    for line in (
        IN_GROUPS,
        IN_GROUPS.replace("g=groups", "g=4"),
        IN_GROUPS.replace("g=groups", "i=32"),
    ):
        register_axis_rule("mylib::grouped", line)
        plans.append(
            plan_tensor_parallel(
                make(lambda: Grouped(lambda h: 4)), 2, example_inputs=given()
            )
        )
    assert plans[0]["weight"].how == "local"
    assert all(plan.placements == plans[0].placements for plan in plans)


CALLS = {
    "packet": lambda name: getattr(torch.ops.mylib, name),
    "overload": lambda name: getattr(torch.ops.mylib, name).default,
    "definition": lambda name: {"swish": SWISH, "linear": LINEAR, "view": VIEW}[name],
}


@pytest.mark.parametrize("by", [*CALLS, "name"])
def test_an_operator_by_any_of_its_handles(by):
    """However it is called, and however it is named to register_axis_rule: the same
    plan, in which it is sharded through."""
    for name, line in LINES.items():
        register_axis_rule(f"mylib::{name}" if by == "name" else CALLS[by](name), line)
    plans = [
        plan_tensor_parallel(make(lambda: Net(call)), 2, example_inputs=given())
        for call in CALLS.values()
    ]
    for plan in plans:
        assert {
            plan[name].how for name in ("up.weight", "slope", "weight", "q.weight")
        } == {"local"}, plan
        assert plan.placements == plans[0].placements


def test_a_rule_is_a_function_too():
    def heads(node, axes):
        x, y = node.inputs[0], node.outputs[0]
        axes.unsharded(node, x, axes.dims(x)[-1])
        axes.set(y, [*axes.dims(x)[:-1], axes.dims(y)[-1]])

    for name in ("swish", "linear"):
        register_axis_rule(f"mylib::{name}", LINES[name])
    register_axis_rule("mylib::view", heads)
    plan = plan_tensor_parallel(make(Net), 2, example_inputs=given())
    assert plan["q.weight"].how == "local" and plan["out.weight"].how == "local", plan


def test_rules_of_the_same_name_do_not_meet():
    """mylib::linear has no rule from aten's linear, and gives it none."""
    before = RULES.get("linear"), RULES["view"]
    plan = plan_tensor_parallel(make(Net), 2, example_inputs=given())
    assert "mylib::linear" not in RULES and plan["weight"].how != "local"
    register_axis_rule("mylib::linear", LINES["linear"])
    assert (RULES.get("linear"), RULES["view"]) == before and "mylib::linear" in RULES


@pytest.mark.parametrize(
    "line, message",
    [
        ("b t h, h", "one '->'"),
        ("b t h -> h -> b t h", "one '->'"),
        ("... b ..., h -> ... b", "at most one '...'"),
        ("... h, h -> h", "'...' after '->' too"),
        ("b t h, h -> b t k", "after '->', found 'k'"),
        ("b t h, h -> b t h!", "after '->', found 'h!'"),
        ("b t h, h -> b t ...", "after '->', found '...'"),
        ("b t h?, h -> b t h", "found 'h?'"),
        ("b t +h, h -> b t h", "found '+h'"),
        (
            "b t h -> b t h",
            "2 tensor arguments (x, slope) and 1 results, found 1 and 1",
        ),
        ("b t h, h, h -> b t h", "found 3 and 1"),
        ("b t h, h -> b t h, h", "found 2 and 2"),
    ],
)
def test_lines_that_do_not_fit(line, message):
    with pytest.raises(ValueError) as e:
        register_axis_rule(torch.ops.mylib.swish, line)
    assert (
        message in str(e.value)
        and "mylib::swish" in str(e.value)
        and line in str(e.value)
    ), e.value
    assert "mylib::swish" not in RULES


@pytest.mark.parametrize(
    "line, message",
    [
        ("b t (g i, (g o) i, (g o) -> b t (g o); g=groups", "found '('"),
        ("b t (g (i j)), (g o) i, (g o) -> b t (g o); g=groups", "found '('"),
        ("b t (... i), (g o) i, (g o) -> b t (g o); g=groups", "found '...'"),
        ("b t (g i)!, (g o) i, (g o) -> b t (g o); g=groups", "found '!'"),
        ("b t (g i), (g o) i, (g o) -> b t (g p); g=groups", "after '->', found 'p'"),
        (
            "b t (g i), (g o) i, (g o) -> b t (g o)",
            "in (g i) that nothing before it tells: add '; g=",
        ),
        (
            "b t (g i), (g o) i, (g o) -> b t (g o); groups",
            "'g=groups' after ';', found ' groups'",
        ),
        (
            "b t (g i), (g o) i, (g o) -> b t (g o); g=group",
            "is one (groups) after '=', found 'group'",
        ),
        (
            "b t (g i), (g o) i, (g o) -> b t (g o); g=weight",
            "(groups) after '=', found 'weight'",
        ),
        (
            "b _... ..., (g o) i, (g o) -> b ... (g o); g=groups",
            "at most one '...' a tensor",
        ),
    ],
)
def test_brackets_that_do_not_fit(line, message):
    with pytest.raises(ValueError) as e:
        register_axis_rule(torch.ops.mylib.grouped, line)
    assert message in str(e.value) and line in str(e.value), e.value
    assert "mylib::grouped" not in RULES


def test_lengths_that_brackets_do_not_fit():
    register_axis_rule("mylib::grouped", IN_GROUPS.replace("g=groups", "g=3"))
    message = (
        r"'b t \(g i\), .* g=3' of mylib::grouped: expected a dim \(g i\) of length 3 x"
        r" 42, found 128"
    )
    with pytest.raises(ValueError, match=message):
        plan_tensor_parallel(
            make(lambda: Grouped(lambda h: 4)), 2, example_inputs=given()
        )


def test_a_name_that_is_needed_whole_is_the_same_axis_elsewhere():
    """The slopes are needed whole: so the features that they are of are not sharded,
    either."""
    register_axis_rule("mylib::swish", "b t h, h! -> b t h")
    plan = plan_tensor_parallel(make(Net), 2, example_inputs=given())
    assert plan["slope"].how == "weight gathered", plan
    assert plan["up.weight"].how != "local", plan


def test_shapes_that_a_line_does_not_fit():
    register_axis_rule("mylib::swish", "t h, h -> t h")
    with pytest.raises(
        ValueError,
        match=(
            r"'t h, h -> t h' of mylib::swish: expected a tensor of dims 't h', .* \(2,"
            r" 3, 32\)"
        ),
    ):
        plan_tensor_parallel(make(Net), 2, example_inputs=given())
    register_axis_rule("mylib::swish", "b t h, h -> b h")
    with pytest.raises(
        ValueError,
        match=(
            r"mylib::swish: expected a result of dims 'b h', found shape \(2, 3, 32\)"
        ),
    ):
        plan_tensor_parallel(make(Net), 2, example_inputs=given())


def test_what_is_no_operator_or_no_rule():
    for op in (F.relu, torch.Tensor.add, None, 3, torch.ops.mylib):
        with pytest.raises(TypeError, match="torch.ops.mylib.op"):
            register_axis_rule(op, "a -> a")
    with pytest.raises(ValueError, match="'mylib::op', found 'swish'"):
        register_axis_rule("swish", "a -> a")
    for name in ("mylib::nothing", "nowhere::nothing"):
        with pytest.raises(ValueError, match=f"no {name}; define it"):
            register_axis_rule(name, "a -> a")
    for rule in (None, 3, ["a -> a"]):
        with pytest.raises(
            TypeError, match="a line or a function .* of mylib::swish, found"
        ):
            register_axis_rule("mylib::swish", rule)
    # takes a list of tensors
    with pytest.raises(ValueError, match="aten::cat.*give a function"):
        register_axis_rule("aten::cat", "a -> a")
