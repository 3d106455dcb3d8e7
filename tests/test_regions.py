"""Regions of real models, each a few lines: fused projections, heads that do not divide, parameters inside, experts, state spaces; and the planner."""

import copy
import inspect
import re
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from helpers import compare, double, pair, share_of
from ranks import run_ranks
from torch import nn

from quintnet_dt import plan_tensor_parallel
from quintnet_dt.axes import Axes
from quintnet_dt.cost import cost, hoist
from quintnet_dt.layout import lay_out
from quintnet_dt.planner import Planner
from quintnet_dt.sharding import Sharding
from quintnet_dt.trace import trace

D = 24


def features(*shape):
    return lambda: (torch.randn(*shape),)


def ids(*shape, high=48):
    return lambda: (torch.randint(3, high, shape),)


def block(module, *args, **kw):
    return lambda: Block(module(*args, **kw))


def check_all(cases, n):
    """`cases`: name -> {build, given} and what else `check_case` takes; all in one launch."""

    def ranks(rank):
        for name, case in cases.items():
            try:
                check_case(n, **case)
            except Exception as e:
                e.add_note(f"in {name} at tp={n}")
                raise

    run_ranks(ranks, n, timeout=240)


def check_case(n, build, given, share=0.05, local=None, then=None, calls=(), tol=1e-9):
    """A model against the whole one; a rank holds up to 1 / n + `share`; `local`: {end of a weight's name: dim (None: any)} of those
    that must compute on shards."""
    torch.manual_seed(3)
    inputs = [double(f()) for f in (given, *calls)]
    sharded, whole = pair(build, n, example_inputs=copy.deepcopy(inputs[0]))
    plan = sharded.tensor_parallel_plan
    for x in inputs:
        compare(sharded, whole, x, tol)
    for end, dim in (local or {}).items():
        found = {(e.how, e.dim if dim is not None else None) for k, e in plan.entries.items() if k.endswith(end)}
        assert found and found <= {("local", dim), ("exchanged", dim)}, f"{end}: found {found}\n{plan}"
    assert share_of(sharded) <= 1 / n + share, f"holds {share_of(sharded):.1%}\n{plan}"
    if then is not None:
        then(sharded)


# ---------------------------------------------------------------- attention


class Block(nn.Module):
    """A residual, so that what enters the region wants a gradient."""

    def __init__(self, inner):
        super().__init__()
        self.norm, self.inner = nn.RMSNorm(D), inner

    def forward(self, x):
        return x + self.inner(self.norm(x))


class TransposedLinear(nn.Module):
    """A weight of (in, out), as GPT-2 stores it."""

    def __init__(self, i, o):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(i, o) * 0.1), nn.Parameter(torch.randn(o))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


def attend(q, k, v, bias=None):
    """q: (batch, heads, length, dim); k, v with fewer heads are repeated."""
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / k.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Fused(nn.Module):
    """One projection for q, k and v, cut as `kind` says."""

    def __init__(self, kind, heads=4, kv=4, dim=6, bias=True):
        super().__init__()
        self.kind, self.heads, self.kv, self.dim = kind, heads, kv, dim
        self.sizes = [heads * dim, kv * dim, kv * dim]
        make = TransposedLinear if kind == "thirds" else nn.Linear
        self.inp, self.out = make(D, sum(self.sizes)), make(heads * dim, D)

    def forward(self, x):
        b, t, _ = x.shape
        h, kv, d, y = self.heads, self.kv, self.dim, self.inp(x)
        if self.kind in ("thirds", "chunk", "sizes", "slices"):
            if self.kind == "thirds":
                parts = y.split(h * d, dim=2)
            elif self.kind == "chunk":
                parts = y.chunk(3, dim=-1)
            elif self.kind == "sizes":
                parts = y.split(self.sizes, dim=-1)
            else:
                at = h * d
                parts = y[..., :at], y[..., at : at + kv * d], y[..., at + kv * d :]
            q, k, v = (p.view(b, t, -1, d) for p in parts)
        elif self.kind == "a head's three":
            q, k, v = y.view(b, t, h, 3 * d).chunk(3, dim=-1)
        elif self.kind == "heads by three":
            y = y.view(b, t, h, 3, d)
            q, k, v = y[..., 0, :], y[..., 1, :], y[..., 2, :]
        elif self.kind == "one kv head":
            y = y.view(b, t, h + 2, d)
            q, k, v = y[..., :-2, :], y[..., [-2], :], y[..., [-1], :]
        else:  # groups of queries with their key and value
            y = y.view(b, t, kv, h // kv + 2, d)
            q, k, v = y[..., :-2, :].flatten(2, 3), y[..., -2, :], y[..., -1, :]
        return self.out(attend(*(z.transpose(1, 2) for z in (q, k, v))))


class FusedMLP(nn.Module):
    def __init__(self, cut):
        super().__init__()
        self.inp, self.out, self.cut = nn.Linear(D, 128, bias=False), nn.Linear(64, D, bias=False), cut

    def forward(self, x):
        y = self.inp(x)
        if self.cut == "chunk":
            gate, up = y.chunk(2, -1)
        else:
            gate, up = y.split(64, -1) if self.cut == "split" else (y[..., :64], y[..., 64:])
        return self.out(F.gelu(gate) * up)


@pytest.mark.parametrize("n", [2, 4])
def test_fused_projections(n):
    x, local, cases = features(2, 5, D), {"inp.weight": 0, "out.weight": 1}, {}
    equal, grouped = ["chunk", "sizes", "a head's three", "heads by three"], ["sizes", "slices", "groups"]
    for kind, kv in [*((k, 4) for k in equal), *((k, 2) for k in grouped)]:
        cases[kind, kv] = dict(build=block(Fused, kind, 4, kv), given=x, local=local if kv % n == 0 else {})
    cases["thirds"] = dict(build=block(Fused, "thirds"), given=x, local={"inp.weight": 1, "out.weight": 0})
    cases["one kv head"] = dict(build=block(Fused, "one kv head", 4, 1), given=x)
    for kind in ("chunk", "split", "slices"):
        cases[f"gate and up by {kind}"] = dict(build=block(FusedMLP, kind), given=x, local=local)
    check_all(cases, n)


class Attention(nn.Module):
    """Separate projections. `norm`: of queries and keys, per head ("head") or over all of them."""

    def __init__(self, heads=4, kv=None, dim=6, norm=None, bias=False):
        super().__init__()
        kv = kv or heads
        self.heads, self.kv, self.dim, self.norm = heads, kv, dim, norm
        self.q, self.k, self.v = (nn.Linear(D, h * dim, bias=bias) for h in (heads, kv, kv))
        self.o = nn.Linear(heads * dim, D, bias=bias)
        make = {"head": lambda h: nn.RMSNorm(dim), "rms": nn.RMSNorm, "layer": nn.LayerNorm, "spelled": SpelledNorm}
        if norm:
            self.qn, self.kn = make[norm](heads * dim), make[norm](kv * dim)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.norm in ("rms", "layer", "spelled"):
            q, k = self.qn(q), self.kn(k)
        q, k, v = q.view(b, t, self.heads, self.dim), k.view(b, t, self.kv, self.dim), v.view(b, t, self.kv, self.dim)
        if self.norm == "head":
            q, k = self.qn(q), self.kn(k)
        return self.o(attend(*(z.transpose(1, 2) for z in (q, k, v))))


HEADS = {"q.weight": 0, "k.weight": 0, "v.weight": 0, "o.weight": 1}


class SpelledNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(d))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize("n", [2, 4])
def test_heads_that_do_not_divide(n):
    shapes = {2: [(4, 1), (3, 3), (3, 1), (6, 3)], 4: [(8, 2), (14, 14), (14, 2), (6, 6), (4, 1), (6, 2)]}[n]
    check_all({(h, kv): dict(build=block(Attention, h, kv), given=features(2, 5, D)) for h, kv in shapes}, n)


def test_queries_that_divide_where_keys_do_not():
    """Between the sizes of a real model; in a tiny one the model dimension may send fewer bytes."""
    with torch.device("meta"):
        model = llama(num_attention_heads=16, hidden_size=1024, head_dim=64, intermediate_size=4096, vocab_size=32000)
    plan = plan_tensor_parallel(model, 4, example_inputs=(torch.ones(2, 128, dtype=torch.long),))
    q, o = (plan[f"model.layers.0.self_attn.{p}_proj.weight"] for p in "qo")
    assert (q.how, q.dim, o.how, o.dim) == ("local", 0, "local", 1), plan


class ResNet(nn.Module):
    def __init__(self, c=12):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.a, self.an = nn.Conv2d(c, 2 * c, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * c)
        self.b, self.bn = nn.Conv2d(2 * c, 2 * c, 3, 1, 1, bias=False), nn.BatchNorm2d(2 * c)
        self.short, self.fc = nn.Conv2d(c, 2 * c, 1, 2), nn.Linear(2 * c, 7)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        y = self.bn(self.b(F.relu(self.an(self.a(x)))))
        return self.fc(F.relu(y + self.short(x)).mean((2, 3)))


FLOAT32 = 2e-5  # some of transformers' norms and softmaxes compute in it whatever the model's dtype is
TEXT = dict(vocab_size=48, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)


def llama(**kw):
    hf = pytest.importorskip("transformers")
    config = dict(TEXT, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, use_cache=False)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**config, **kw}))


def test_three_ranks():
    hf = pytest.importorskip("transformers")
    sizes = dict(vocab_size=48, n_positions=32, n_embd=32, n_layer=1, n_head=4, use_cache=False)
    gpt2 = lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**sizes))  # noqa: E731
    bert = lambda: hf.BertForMaskedLM(hf.BertConfig(**TEXT, max_position_embeddings=32))  # noqa: E731
    cases = {"convolutions": dict(build=ResNet, given=features(2, 3, 8, 8), share=0.1)}
    cases["attention"] = dict(build=Attention, given=features(2, 5, D))
    for name, build in {"llama": llama, "gpt2": gpt2, "bert": bert}.items():
        cases[name] = dict(build=build, given=ids(2, 6), share=0.1, tol=FLOAT32)
    check_all(cases, 3)


# ------------------------------------------------- parameters inside a region


def small_reductions(n):
    """The norms of all queries and keys cost no more than one sum, forward and backward, of a number for each token."""

    def then(model):
        plan = model.tensor_parallel_plan
        bare = plan_tensor_parallel(Block(Attention()).double(), n, example_inputs=(torch.randn(2, 5, D).double(),))
        token = 2 * 5 * 8 * 4 * (n - 1) / n
        assert 0 < plan.bytes_per_step - bare.bytes_per_step <= 2 * token, f"{plan}\n{bare}"

    return then


class Sinks(Attention):
    """A learned logit for each head, that takes attention and gives nothing."""

    def __init__(self):
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(self.heads))

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, -1, self.dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.mT * self.dim**-0.5
        scores = torch.cat([scores, self.sinks.reshape(1, -1, 1, 1).expand(b, -1, t, -1)], dim=-1)
        scores = scores - scores.max(dim=-1, keepdim=True).values
        return self.o((scores.softmax(-1)[..., :-1] @ v).transpose(1, 2).reshape(b, t, -1))


class Biased(Attention):
    """ALiBi's slopes, learned or not, or a table of relative positions that is handed in."""

    def __init__(self, slopes=None):
        super().__init__()
        values = 2.0 ** -torch.arange(1, 5)
        if slopes == "parameter":
            self.slopes = nn.Parameter(values)
        elif slopes == "buffer":
            self.register_buffer("slopes", values)

    def forward(self, x, bias=None):
        b, t, _ = x.shape
        if bias is None:
            at = torch.arange(t)
            bias = self.slopes[:, None, None] * (at[None, None, :] - at[None, :, None])
        q, k, v = (f(x).view(b, t, self.heads, self.dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(attend(q, k, v, bias))


class Relative(nn.Module):
    """The first layer's table of relative positions serves all layers."""

    def __init__(self):
        super().__init__()
        self.table, self.layers = nn.Embedding(8, 4), nn.ModuleList(Biased() for _ in range(2))

    def forward(self, x):
        at = torch.arange(x.shape[1])
        bias = self.table((at[None, :] - at[:, None]).clamp(-3, 4) + 3).permute(2, 0, 1).unsqueeze(0)
        for layer in self.layers:
            x = x + layer(x, bias)
        return x


class Cosine(Attention):
    """Queries and keys of length one; a temperature for each head, kept below 100."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.rand(self.heads, 1, 1))

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, -1, self.dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.temperature.clamp(max=4.6).exp()
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Slopes(nn.Module):
    """A slope for each hidden unit; a scale and a gate that are one number each, inside and outside."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, 48), nn.Linear(48, D)
        self.slopes, self.logit_scale = nn.Parameter(torch.rand(48)), nn.Parameter(torch.tensor(0.3))
        self.gate, self.outer = nn.Parameter(torch.tensor([0.2])), nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        h = self.a(x)
        h = torch.where(h > 0, h, self.slopes * h) * self.logit_scale.exp()
        return x + self.outer.tanh() * self.b(h + torch.tanh(self.gate) * h.square())


@pytest.mark.parametrize("n", [2, 4])
def test_parameters_inside_a_region(n):
    builds = {
        "norm of a head": block(Attention, norm="head"),
        "rms": block(Attention, norm="rms"),
        "layer": block(Attention, norm="layer"),
        "spelled": block(Attention, norm="spelled"),
        "sinks": block(Sinks),
        "slopes of heads": block(Biased, "parameter"),
        "slopes in a buffer": block(Biased, "buffer"),
        "relative positions": Relative,
        "temperatures": block(Cosine),
    }
    cases = {name: dict(build=build, given=features(2, 5, D), local=HEADS) for name, build in builds.items()}
    cases["spelled"]["then"] = small_reductions(n)
    # A LayerNorm over a sharded dim is right, but there is no rule by which it could run on head shards.
    cases["layer"]["local"] = None
    cases["slopes and scales"] = dict(build=Slopes, given=features(2, 5, D), local={"a.weight": 0, "b.weight": 1})
    check_all(cases, n)


# ------------------------------------------------------------------ experts


class Experts(nn.Module):
    """Experts as parameters of three dims; each token goes to all ("bmm", "einsum"), or a buffer of slots holds the chosen ("slots")."""

    def __init__(self, kind, experts=4, hidden=32):
        super().__init__()
        self.kind, self.router = kind, nn.Linear(D, experts, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(experts, D, 2 * hidden) * 0.2), nn.Parameter(
            torch.randn(experts, hidden, D) * 0.2
        )

    def forward(self, x):
        flat = x.flatten(0, 1)
        probs = self.router(flat).softmax(-1)
        value, index = probs.topk(2, dim=-1)
        weights = torch.zeros_like(probs).scatter(1, index, value / value.sum(-1, keepdim=True))
        if self.kind == "bmm":
            gate, up = torch.bmm(flat.expand(self.up.shape[0], -1, -1), self.up).chunk(2, dim=-1)
            out = (torch.bmm(F.silu(gate) * up, self.down) * weights.t()[..., None]).sum(0)
        else:
            gate, up = torch.einsum("td,edh->teh", flat, self.up).chunk(2, dim=-1)
            out = torch.einsum("teh,ehd,te->td", F.silu(gate) * up, self.down, weights)
        return out.view_as(x)


class ExpertList(nn.Module):
    def __init__(self, experts=3):
        super().__init__()
        self.router = nn.Linear(D, experts)
        self.shared = nn.Sequential(nn.Linear(D, 32), nn.SiLU(), nn.Linear(32, D))
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, 32), nn.GELU(), nn.Linear(32, D)) for _ in range(experts)
        )

    def forward(self, x):
        flat = x.view(-1, x.shape[-1])
        weight, chosen = self.router(flat).softmax(-1).topk(1, dim=-1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            out.index_add_(0, token, expert(flat[token]) * weight[token, slot].unsqueeze(-1))
        return out.view_as(x) + self.shared(x)


@pytest.mark.parametrize("n", [2, 4])
def test_experts(n):
    hf = pytest.importorskip("transformers")

    def split(*ends):
        def then(model):
            plan = model.tensor_parallel_plan
            assert all(e.dim is not None for name, e in plan.entries.items() if name.endswith(ends)), plan

        return then

    config = dict(TEXT, num_key_value_heads=4, num_local_experts=4, experts_implementation="eager", use_cache=False)
    mixtral = lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**config))  # noqa: E731
    x, calls, local = features(2, 5, D), [features(1, 1, D), features(3, 7, D)], {"up": None, "down": None}
    cases = {kind: dict(build=block(Experts, kind), given=x, local=local) for kind in ("bmm", "einsum")}
    cases["list"] = dict(build=block(ExpertList), given=x, calls=calls, then=split("0.weight", "2.weight"))
    parts = split("experts.gate_up_proj", "experts.down_proj")
    cases["mixtral"] = dict(build=mixtral, given=ids(2, 6), calls=[ids(1, 9)], then=parts, tol=FLOAT32)
    check_all(cases, n)


# ------------------------------------------- state spaces, linear attention


class Mamba(nn.Module):
    def __init__(self, inner=32, state=4, rank=3):
        super().__init__()
        self.inner, self.state, self.rank = inner, state, rank
        self.in_proj, self.out_proj = nn.Linear(D, 2 * inner, bias=False), nn.Linear(inner, D, bias=False)
        self.conv = nn.Conv1d(inner, inner, 3, groups=inner, padding=2)
        self.x_proj, self.dt_proj = nn.Linear(inner, rank + 2 * state, bias=False), nn.Linear(rank, inner)
        self.A_log, self.D = nn.Parameter(torch.rand(inner, state)), nn.Parameter(torch.rand(inner))

    def forward(self, x):
        t = x.shape[1]
        x, gate = self.in_proj(x).chunk(2, dim=-1)
        x = F.silu(self.conv(x.transpose(1, 2))[..., :t]).transpose(1, 2)
        step, b, c = self.x_proj(x).split([self.rank, self.state, self.state], dim=-1)
        step = F.softplus(self.dt_proj(step))
        decay = torch.exp(step.unsqueeze(-1) * -self.A_log.exp())
        drive = (step * x).unsqueeze(-1) * b.unsqueeze(2)
        state, out = torch.zeros(x.shape[0], self.inner, self.state, dtype=x.dtype), []
        for i in range(t):
            state = decay[:, i] * state + drive[:, i]
            out.append((state * c[:, i, None]).sum(-1))
        return self.out_proj((torch.stack(out, dim=1) + x * self.D) * F.silu(gate))


class Linear(Attention):
    """Linear attention as a recurrence: a matrix of state for each head, which decays."""

    def __init__(self):
        super().__init__()
        self.decay, self.bonus, self.after = (
            nn.Parameter(torch.rand(4, 1, 1)),
            nn.Parameter(torch.rand(4, 6)),
            nn.GroupNorm(4, D),
        )

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, self.heads, self.dim) for f in (self.q, self.k, self.v))
        state, out = (
            x.new_zeros(b, self.heads, self.dim, self.dim),
            [],
        )  # as long as there are heads, t would be taken for them
        for i in range(t):
            new = k[:, i].unsqueeze(-1) * v[:, i].unsqueeze(-2)
            out.append(torch.einsum("bhk,bhkv->bhv", q[:, i], state + self.bonus.unsqueeze(-1) * new))
            state = state * torch.sigmoid(self.decay) + new
        y = self.after(torch.stack(out, 1).reshape(b * t, -1)).view(b, t, -1)
        return self.o(y)


class Rwkv(nn.Module):
    """Time mixing: each token is mixed with the one before it, and keys weigh values with a decay for each channel."""

    def __init__(self):
        super().__init__()
        self.key, self.value, self.gate, self.out = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.mix, self.decay, self.first = (nn.Parameter(torch.rand(D)) for _ in range(3))

    def forward(self, x):
        last = F.pad(x, (0, 0, 1, -1))
        mixed = x * self.mix + last * (1 - self.mix)
        k, v, r = self.key(mixed), self.value(mixed), torch.sigmoid(self.gate(mixed))
        num, den, out = torch.zeros_like(v[:, 0]), torch.zeros_like(v[:, 0]), []
        for i in range(x.shape[1]):
            here = torch.exp(self.first + k[:, i])
            out.append((num + here * v[:, i]) / (den + here))
            fade = torch.exp(-torch.exp(self.decay))
            num, den = fade * num + k[:, i].exp() * v[:, i], fade * den + k[:, i].exp()
        return self.out(r * torch.stack(out, dim=1))


@pytest.mark.parametrize("n", [2, 4])
def test_state_spaces_and_linear_attention(n):
    hf = pytest.importorskip("transformers")
    config = dict(vocab_size=48, hidden_size=16, num_hidden_layers=1, state_size=4, time_step_rank=4, use_cache=False)
    mamba = lambda: hf.MambaForCausalLM(hf.MambaConfig(**config))  # noqa: E731
    inner = {"in_proj.weight": 0, "conv.weight": 0, "x_proj.weight": 1, "dt_proj.weight": 0, "A_log": 0}
    x, mix = features(2, 5, D), {"key.weight": 0, "value.weight": 0, "gate.weight": 0, "out.weight": 1}
    check_all(
        {
            "mamba": dict(build=block(Mamba), given=x, local={**inner, "out_proj.weight": 1}),
            "linear attention": dict(build=block(Linear), given=x, local=HEADS),
            "rwkv": dict(build=block(Rwkv), given=x, local=mix),
            "transformers' mamba": dict(build=mamba, given=ids(2, 4), share=0.1, tol=FLOAT32),
        },
        n,
    )


# ----------------------------------------------------------------- planning


def test_planning_a_hundred_gigabytes_allocates_nothing():
    big = dict(hidden_size=8192, intermediate_size=32768, num_attention_heads=64, num_key_value_heads=8, head_dim=128)
    with torch.device("meta"):
        model = llama(**big, vocab_size=128256, num_hidden_layers=3).bfloat16().eval()
    state = torch.get_rng_state()
    plan = plan_tensor_parallel(model, 8, example_inputs=(torch.ones(1, 16, dtype=torch.long),))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(x.is_meta for x in (*model.parameters(), *model.buffers()))
    assert not model.training and plan.share < 0.13

    decisions = {}
    for name, e in plan.entries.items():
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
        if layer:
            decisions.setdefault(layer[1], {})[layer[2]] = (e.dim, e.pieces, e.how, re.sub(r"layers\.\d+", "", e.why))
    assert len(decisions) == 3 and decisions["0"] == decisions["1"] == decisions["2"]
    assert [decisions["0"][f"self_attn.{p}_proj.weight"][:3] for p in "qo"] == [(0, 1, "local"), (1, 1, "local")]


@pytest.mark.parametrize("train", [True, False])
def test_planning_changes_nothing(train):
    model = nn.Sequential(ResNet(), nn.Dropout(0.5), nn.Linear(7, 7)).train(train)
    model[1].train(not train)
    hook = model[2].register_forward_hook(lambda *a: None)

    def seen():
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
        modes = [(m.training, sorted(vars(m)), m.forward) for m in model.modules()]
        grads = [(id(p), p._version, p.grad) for p in model.parameters()]
        return hooks, modes, grads, [id(b) for b in model.buffers()], torch.is_grad_enabled()

    before, values, state = seen(), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    plan_tensor_parallel(model, 2, example_inputs=(torch.randn(2, 3, 8, 8, generator=torch.Generator()),))
    assert torch.equal(torch.get_rng_state(), state) and seen() == before
    assert all(torch.equal(x, values[k]) for k, x in model.state_dict().items())
    hook.remove()


class Blocked(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, 64, bias=False), nn.Linear(64, D)

    def forward(self, x):
        basis = torch.linalg.qr(self.a.weight).Q
        return self.b(x @ basis.mT)


def test_why_names_the_operator_in_the_way_and_its_line():
    lines, first = inspect.getsourcelines(Blocked.forward)
    line = first + next(i for i, text in enumerate(lines) if "qr(" in text)
    plan = plan_tensor_parallel(Blocked(), 2, example_inputs=(torch.randn(2, 5, D),))
    assert plan["a.weight"].how == "weight gathered" and "linalg_qr" in plan["a.weight"].why, plan
    assert f"test_regions.py:{line}" in plan["a.weight"].why, plan


def chain(*widths):
    return nn.Sequential(*[nn.Linear(a, b, bias=False) for a, b in zip(widths, widths[1:])])


SMALL = [lambda: chain(16, 64, 16, 8), lambda: chain(8, 8, 64, 24, 64), block(Attention), block(FusedMLP, "chunk")]


@pytest.mark.parametrize("build", SMALL)
@pytest.mark.parametrize("n", [2, 4])
def test_the_choice_is_brute_forces(build, n):
    """Of all sets of axes that do not conflict, none sends fewer bytes than the planner's."""
    model = build()
    x = torch.randn(2, 12, next(p.shape[-1] for p in model.parameters()), requires_grad=True)
    graph = trace(model, (x,), {})
    axes = Axes(graph)
    planner = Planner(graph, axes, n)
    axes_that_fit = [c for c in planner.candidates() if planner.weigh(c)]

    def sent(sharding):
        return cost(graph, hoist(graph, lay_out(graph, axes, sharding)), n)

    found = {}
    for k in range(len(axes_that_fit) + 1):
        for some in combinations(axes_that_fit, k):
            if any(a.conflicts(b) for a, b in combinations(some, 2)):
                continue
            sharding, used_by = Sharding(through={c.axis for c in some}), {}
            for c in some:
                used_by.update((call.index, c.axis) for call in c.calls)
                sharding.params.update({p: (dim, c.axis) for p, (dim, _) in c.params.items()})
                sharding.outer.update({p: outer for p, (_, outer) in c.params.items() if outer != 1})
            planner.fill(sharding, used_by)
            found[tuple(sorted(map(str, (c.params for c in some))))] = sent(sharding)
    best = min(found, key=found.get)
    assert (
        sent(planner.choose()) <= found[best]
    ), f"{best} would send {found[best]} bytes, found {sent(planner.choose())}"
    assert len(found) > 2
