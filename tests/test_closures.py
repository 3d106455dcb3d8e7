"""Models that keep functions which reach their modules by a closure, a default, a
global or a partial."""

import functools
import types

import pytest
import torch
import torch.nn.functional as F
from helpers import compare, double, make, pair
from ranks import run_ranks
from torch import nn

from quintnet_dt import apply_tensor_parallel
from quintnet_dt.plan import LOCAL

LIVE = {}


class Kept(nn.Module):
    """minGPT's MLP: a function over its layers, kept in one of many ways."""

    def __init__(self, how):
        super().__init__()
        self.emb, self.norm = nn.Embedding(61, 16), nn.LayerNorm(16)
        self.mlp = nn.ModuleDict({"a": nn.Linear(16, 64), "b": nn.Linear(64, 16)})
        self.keep(how, self.mlp)

    def keep(self, how, m):
        def named(x):
            return again(x)

        def again(x, deep=True):
            return named(x) if deep is None else m.b(F.gelu(m.a(x)))

        if how == "closure":
            self.run = lambda x: m.b(F.gelu(m.a(x)))
        elif how == "self":
            self.run = lambda x: self.mlp.b(F.gelu(self.mlp.a(x)))
        elif how == "default":
            self.run = lambda x, m=m, *, act=F.gelu: m.b(act(m.a(x)))
        elif how == "functions":
            self.run = named
        elif how == "dict":
            self.runs = {"first": [lambda x: m.b(F.gelu(m.a(x)))]}
            self.run = lambda x: self.runs["first"][0](x)
        elif how == "object":
            self.holder = types.SimpleNamespace(run=lambda x: m.b(F.gelu(m.a(x))))
        elif how == "list":
            layers = [m.a, F.gelu, m.b]
            self.run = lambda x: functools.reduce(lambda x, f: f(x), layers, x)
        elif how == "partial":
            self.run = functools.partial(lambda f, x: m.b(f(m.a(x))), F.gelu)
        elif how == "method":
            was = m.a.forward
            m.a.forward = types.MethodType(lambda layer, x: F.gelu(was(x)), m.a)
            self.run = lambda x: m.b(m.a(x))
        elif how == "hook":
            m.a.register_forward_hook(
                lambda module, args, out: F.gelu(out) + 0 * m.b.weight.sum()
            )
            self.run = lambda x: m.b(m.a(x))
        elif how == "global":
            scope = {"model": self, "F": F}
            exec(
                "run = lambda x: (lambda y: model.mlp.b(F.gelu(y)))(model.mlp.a(x))",
                scope,
            )
            self.run = scope["run"]

    def forward(self, ids, scale=None):
        run = self.holder.run if hasattr(self, "holder") else self.run
        x = self.norm(self.emb(ids))
        return x + run(x) if scale is None else x + scale * run(x)


def ids(*more):
    return lambda: (torch.randint(0, 61, (2, 7)), *more)


WAYS = (
    "closure self default functions dict object list partial method hook global".split()
)


def test_functions_that_reach_the_model():
    """They compute on shards, in calls of another kind too."""

    def ranks(rank):
        for how in WAYS:
            try:
                check_one(how)
            except BaseException as e:
                e.add_note(how)
                raise

    run_ranks(ranks, 2)


def check_one(how):
    sharded, whole = pair(lambda: Kept(how), 2)
    torch.manual_seed(1)
    for given in ids()(), ids(torch.rand(2, 7, 1))():
        compare(sharded, whole, double(given))
    entries = sharded.tensor_parallel_plan.entries
    if how != "hook":
        assert entries["mlp.a.weight"].how == entries["mlp.b.weight"].how == LOCAL, how


class Held:
    pass


def test_what_cannot_be_followed_is_told():
    def ranks(rank):
        a_parameter, an_object, a_global = (
            make(lambda: Kept("closure")) for _ in range(3)
        )
        a, b = a_parameter.mlp.a.weight, a_parameter.mlp.b.weight
        a_parameter.run = lambda x: F.linear(F.gelu(F.linear(x, a)), b)
        held = Held()
        held.layers = an_object.mlp
        an_object.run = lambda x: held.layers.b(F.gelu(held.layers.a(x)))
        LIVE["model"] = a_global
        a_global.run = lambda x: LIVE["model"].mlp.b(F.gelu(LIVE["model"].mlp.a(x)))
        for model in a_parameter, an_object, a_global:
            with pytest.raises(
                ValueError, match=r"mlp\.a\.weight.* that holds its module"
            ):
                apply_tensor_parallel(model, 2, example_inputs=ids()())

    run_ranks(ranks, 2)
