"""Regions of real models: fused projections, uneven heads, convolutions, parameters
inside."""

import pytest
import torch
import torch.nn.functional as F
from helpers import double
from models.regions import (
    FLOAT32,
    HEADS,
    TEXT,
    D,
    ResNet,
    attend,
    attention,
    check_all,
    features,
    fused,
    fused_mlp,
    ids,
    layers,
    llama,
    model,
)
from torch import nn

from quintnet_dt import plan_tensor_parallel


@pytest.mark.parametrize("n", [2, 4])
def test_fused_projections(n):
    x, local, cases = features(2, 5, D), {"inp.weight": 0, "out.weight": 1}, {}
    equal, grouped = ["chunk", "sizes", "a head's three", "heads by three"], [
        "sizes",
        "slices",
        "groups",
    ]
    for kind, kv in [*((k, 4) for k in equal), *((k, 2) for k in grouped)]:
        cases[kind, kv] = dict(
            build=fused(kind, 4, kv), given=x, local=local if kv % n == 0 else {}
        )
    cases["thirds"] = dict(
        build=fused("thirds"), given=x, local={"inp.weight": 1, "out.weight": 0}
    )
    cases["one kv head"] = dict(build=fused("one kv head", 4, 1), given=x)
    for kind in ("chunk", "split", "slices"):
        cases[f"gate and up by {kind}"] = dict(
            build=fused_mlp(kind), given=x, local=local
        )
    check_all(cases, n)


@pytest.mark.parametrize("n", [2, 4])
def test_heads_that_do_not_divide(n):
    shapes = {
        2: [(4, 1), (3, 3), (3, 1), (6, 3)],
        4: [(8, 2), (14, 14), (14, 2), (6, 6), (4, 1), (6, 2)],
    }[n]
    check_all(
        {
            (h, kv): dict(build=attention(heads=h, kv=kv), given=features(2, 5, D))
            for h, kv in shapes
        },
        n,
    )


def test_queries_that_divide_where_keys_do_not():
    """At the sizes of a real model; in a tiny one the model dimension may send fewer
    bytes."""
    with torch.device("meta"):
        model = llama(
            num_attention_heads=16,
            hidden_size=1024,
            head_dim=64,
            intermediate_size=4096,
            vocab_size=32000,
        )
    plan = plan_tensor_parallel(
        model, 4, example_inputs=(torch.ones(2, 128, dtype=torch.long),)
    )
    q, o = (plan[f"model.layers.0.self_attn.{p}_proj.weight"] for p in "qo")
    assert (q.how, q.dim, o.how, o.dim) == ("local", 0, "local", 1), plan


def test_three_ranks():
    hf = pytest.importorskip("transformers")
    sizes = dict(
        vocab_size=48, n_positions=32, n_embd=32, n_layer=1, n_head=4, use_cache=False
    )
    gpt2 = lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**sizes))  # noqa: E731
    bert = lambda: hf.BertForMaskedLM(
        hf.BertConfig(**TEXT, max_position_embeddings=32)
    )  # noqa: E731
    cases = {"convolutions": dict(build=ResNet, given=features(2, 3, 8, 8), share=0.1)}
    cases["attention"] = dict(build=attention(), given=features(2, 5, D))
    for name, build in {"llama": llama, "gpt2": gpt2, "bert": bert}.items():
        cases[name] = dict(build=build, given=ids(2, 6), share=0.1, tol=FLOAT32)
    check_all(cases, 3)


# ------------------------------------------------- parameters inside a region


def small_reductions(n):
    """Norms of all queries and keys cost no more than a sum each, forward and backward,
    of a number for each token."""

    def then(sharded):
        plan = sharded.tensor_parallel_plan
        bare = plan_tensor_parallel(
            attention()().double(),
            n,
            example_inputs=double(features(2, 5, D)()),
            device="H100",  # as check_case plans the others
        )
        assert (
            0
            < plan.bytes_per_step - bare.bytes_per_step
            <= 2 * 2 * 5 * 8 * 4 * (n - 1) / n
        ), f"{plan}\n{bare}"

    return then


def sinks(q, k, v, m):
    """A learned logit for each head, that takes attention and gives nothing."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = torch.cat(
        [scores, m.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)],
        dim=-1,
    )
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return (scores.softmax(-1)[..., :-1] @ v).transpose(1, 2).flatten(2)


def alibi(q, k, v, m):
    at = torch.arange(q.shape[1])
    return attend(
        q, k, v, m.slopes[:, None, None] * (at[None, None, :] - at[None, :, None])
    )


def cosine(q, k, v, m):
    """Queries and keys of length one; a temperature for each head."""
    q, k, v = (
        F.normalize(q, dim=-1).transpose(1, 2),
        F.normalize(k, dim=-1).transpose(1, 2),
        v.transpose(1, 2),
    )
    scores = q @ k.mT * m.temperature.clamp(max=4.6).exp()
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def relative(m, x):
    """One table of relative positions serves all layers."""
    at = torch.arange(x.shape[1])
    bias = (
        m.table((at[None, :] - at[:, None]).clamp(-3, 4) + 3)
        .permute(2, 0, 1)
        .unsqueeze(0)
    )
    for layer in (m.first, m.second):
        q, k, v = (layer[p](x).view(*x.shape[:2], 4, 6) for p in "qkv")
        x = x + layer["o"](attend(q, k, v, bias))
    return x


class Slopes(nn.Module):
    """The slopes of heads in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("values", torch.rand(4))

    def __getitem__(self, at):
        return self.values[at]


def scaled(m, x):
    """A slope for each hidden unit; a scale and a gate that are one number each, inside
    and outside."""
    h = m.a(x)
    h = torch.where(h > 0, h, m.slopes * h) * m.logit_scale.exp()
    return m.outer.tanh() * m.b(h + torch.tanh(m.gate) * h.square())


@pytest.mark.parametrize("n", [2, 4])
def test_parameters_inside_a_region(n):
    builds = {
        name: attention(norm=name) for name in ("head", "rms", "layer", "spelled")
    } | {
        "sinks": attention(sinks, sinks=(4,)),
        "slopes of heads": attention(alibi, slopes=(4,)),
        "slopes in a buffer": attention(alibi, slopes=Slopes),
        "temperatures": attention(cosine, temperature=(4, 1, 1)),
        "relative positions": model(relative, layers, residual=False),
    }
    x, numbers = features(2, 5, D), {
        "slopes": (48,),
        "logit_scale": (),
        "gate": (1,),
        "outer": (),
    }
    cases = {
        name: dict(build=build, given=x, local=HEADS) for name, build in builds.items()
    }
    cases["spelled"]["then"] = small_reductions(n)
    build = model(
        scaled, lambda: {"a": nn.Linear(D, 48), "b": nn.Linear(48, D), **numbers}
    )
    cases["slopes and scales"] = dict(
        build=build, given=x, local={"a.weight": 0, "b.weight": 1}
    )
    check_all(cases, n)
