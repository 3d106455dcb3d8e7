"""Small models of one idea, written as functions, and the check of many in one
launch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import compare, double, pair, share_of
from ranks import run_ranks
from torch import nn

D = 24


def features(*shape):
    return lambda: (torch.randn(*shape),)


def ids(*shape, high=48):
    return lambda: (torch.randint(3, high, shape),)


class Model(nn.Module):
    """A function of (itself, x); parts: modules, parameters (shapes). `residual`: its
    input wants a gradient."""

    def __init__(self, function, residual, parts):
        super().__init__()
        self.function, self.norm = function, nn.RMSNorm(D) if residual else None
        for name, part in parts.items():
            setattr(
                self,
                name,
                nn.Parameter(torch.rand(part)) if isinstance(part, tuple) else part,
            )

    def forward(self, x):
        return (
            self.function(self, x)
            if self.norm is None
            else x + self.function(self, self.norm(x))
        )


def model(function, parts, residual=True):
    """A function that builds a Model; `parts()` makes its parts."""
    return lambda: Model(function, residual, parts())


def check_all(cases, n):
    """`cases`: name -> {build, given} and what else `check_case` takes; all in one
    launch."""

    def ranks(rank):
        for name, case in cases.items():
            try:
                check_case(n, **case)
            except Exception as e:
                e.add_note(f"in {name} at tp={n}")
                raise

    run_ranks(ranks, n, timeout=240)


def check_case(n, build, given, share=0.05, local=None, then=None, calls=(), tol=1e-9):
    """A model against the whole one. A rank holds up to 1 / n + `share`. `local`:
    weights that must compute on shards, as {end of the name: dim, or None for any}."""
    torch.manual_seed(3)
    inputs = [double(f()) for f in (given, *calls)]
    # as on GPUs, whose links are fast: more of it is sharded
    example = copy.deepcopy(inputs[0])
    sharded, whole = pair(build, n, example_inputs=example, device="H100")
    plan = sharded.tensor_parallel_plan
    for x in inputs:
        compare(sharded, whole, x, tol)
    for end, dim in (local or {}).items():
        entries = [e for k, e in plan.entries.items() if k.endswith(end)]
        assert entries and all(
            e.units for e in entries
        ), f"{end}: has no axis of the model\n{plan}"
        assert dim is None or {e.dim for e in entries} == {dim}, f"{end}\n{plan}"
    assert share_of(sharded) <= 1 / n + share, f"holds {share_of(sharded):.1%}\n{plan}"
    if then is not None:
        then(sharded)


class TransposedLinear(nn.Module):
    """A weight of (in, out), as GPT-2 stores it."""

    def __init__(self, i, o):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(i, o) * 0.1), nn.Parameter(
            torch.randn(o)
        )

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(
            *x.shape[:-1], -1
        )


def attend(q, k, v, bias=0.0):
    """q: (batch, length, heads, dim); k, v with fewer heads are repeated."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / k.shape[-1] ** 0.5 + bias
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def fused(kind, h=4, kv=4, d=6):
    """One projection for q, k and v, cut as `kind` says."""

    def forward(m, x):
        (b, t, _), y = x.shape, m.inp(x)
        if kind == "a head's three":
            parts = y.view(b, t, h, 3 * d).chunk(3, dim=-1)
        elif kind == "heads by three":
            y = y.view(b, t, h, 3, d)
            parts = y[..., 0, :], y[..., 1, :], y[..., 2, :]
        elif kind == "one kv head":
            y = y.view(b, t, h + 2, d)
            parts = y[..., :-2, :], y[..., [-2], :], y[..., [-1], :]
        elif kind == "groups":  # of queries with their key and value
            y = y.view(b, t, kv, h // kv + 2, d)
            parts = y[..., :-2, :].flatten(2, 3), y[..., -2, :], y[..., -1, :]
        elif kind == "thirds":
            parts = y.split(h * d, dim=2)
        elif kind == "chunk":
            parts = y.chunk(3, dim=-1)
        elif kind == "sizes":
            parts = y.split([h * d, kv * d, kv * d], dim=-1)
        else:
            parts = (
                y[..., : h * d],
                y[..., h * d : (h + kv) * d],
                y[..., (h + kv) * d :],
            )
        return m.out(attend(*(z.reshape(b, t, -1, d) for z in parts)))

    make = TransposedLinear if kind == "thirds" else nn.Linear
    return model(
        forward, lambda: {"inp": make(D, (h + 2 * kv) * d), "out": make(h * d, D)}
    )


def fused_mlp(cut):
    def forward(m, x):
        y = m.inp(x)
        if cut == "chunk":
            gate, up = y.chunk(2, -1)
        else:
            gate, up = y.split(64, -1) if cut == "split" else (y[..., :64], y[..., 64:])
        return m.out(F.gelu(gate) * up)

    return model(
        forward,
        lambda: {
            "inp": nn.Linear(D, 128, bias=False),
            "out": nn.Linear(64, D, bias=False),
        },
    )


def attention(mix=attend, heads=4, kv=None, dim=6, norm=None, **more):
    """Separate projections; `mix(q, k, v, [m])` of (batch, length, heads, dim). `norm`:
    "head", or over all of them."""
    kv = kv or heads

    def forward(m, x):
        q, k, v = m.q(x), m.k(x), m.v(x)
        if norm in ("rms", "layer", "spelled"):
            q, k = m.qn(q), m.kn(k)
        q, k, v = (
            y.view(*x.shape[:2], h, dim) for y, h in ((q, heads), (k, kv), (v, kv))
        )
        if norm == "head":
            q, k = m.qn(q), m.kn(k)
        return m.o(mix(q, k, v) if mix is attend else mix(q, k, v, m))

    def parts():
        projections = {
            p: nn.Linear(D, h * dim, bias=False) for p, h in zip("qkv", (heads, kv, kv))
        }
        make = {
            "head": lambda d: nn.RMSNorm(dim),
            "rms": nn.RMSNorm,
            "layer": nn.LayerNorm,
            "spelled": SpelledNorm,
        }
        norms = (
            {"qn": make[norm](heads * dim), "kn": make[norm](kv * dim)} if norm else {}
        )
        extra = {name: f() if callable(f) else f for name, f in more.items()}
        return {
            **projections,
            "o": nn.Linear(heads * dim, D, bias=False),
            **norms,
            **extra,
        }

    return model(forward, parts)


HEADS = {"q.weight": 0, "k.weight": 0, "v.weight": 0, "o.weight": 1}


class SpelledNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(d))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class ResNet(nn.Module):
    def __init__(self, c=12):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(
            3, c, 3, padding=1, bias=False
        ), nn.BatchNorm2d(c)
        self.a, self.an = nn.Conv2d(c, 2 * c, 3, 2, 1, bias=False), nn.BatchNorm2d(
            2 * c
        )
        self.b, self.bn = nn.Conv2d(2 * c, 2 * c, 3, 1, 1, bias=False), nn.BatchNorm2d(
            2 * c
        )
        self.short, self.fc = nn.Conv2d(c, 2 * c, 1, 2), nn.Linear(2 * c, 7)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        y = self.bn(self.b(F.relu(self.an(self.a(x)))))
        return self.fc(F.relu(y + self.short(x)).mean((2, 3)))


FLOAT32 = 2e-5  # some of transformers' norms and softmaxes compute in it whatever the model's dtype is
TEXT = dict(
    vocab_size=48,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    intermediate_size=64,
)


def llama(**kw):
    hf = pytest.importorskip("transformers")
    config = dict(
        TEXT,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        use_cache=False,
    )
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**config, **kw}))


def layers():
    first, second = (
        nn.ModuleDict({p: nn.Linear(D, D) for p in "qkvo"}) for _ in range(2)
    )
    return {"table": nn.Embedding(8, 4), "first": first, "second": second}
