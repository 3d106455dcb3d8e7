"""Regions of real models: fused projections, uneven heads, parameters inside, experts, state
spaces; the planner."""

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
from torch.utils.checkpoint import checkpoint

from quintnet_dt import plan_tensor_parallel
from quintnet_dt.axes.axes import Axes
from quintnet_dt.axes.sharding import Sharding
from quintnet_dt.planning.candidates import candidates
from quintnet_dt.planning.cost import cost
from quintnet_dt.planning.hoist import hoist
from quintnet_dt.planning.lay_out import lay_out
from quintnet_dt.planning.planner import Planner
from quintnet_dt.planning.task import Task
from quintnet_dt.running.program import Program
from quintnet_dt.tracing.trace import trace

D = 24


def features(*shape):
    return lambda: (torch.randn(*shape),)


def ids(*shape, high=48):
    return lambda: (torch.randint(3, high, shape),)


class Model(nn.Module):
    """A function of (itself, x); parts: modules, parameters (shapes). `residual`: its input wants a
    gradient."""

    def __init__(self, function, residual, parts):
        super().__init__()
        self.function, self.norm = function, nn.RMSNorm(D) if residual else None
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(torch.rand(part)) if isinstance(part, tuple) else part)

    def forward(self, x):
        return (
            self.function(self, x) if self.norm is None else x + self.function(self, self.norm(x))
        )


def model(function, parts, residual=True):
    """A function that builds a Model; `parts()` makes its parts."""
    return lambda: Model(function, residual, parts())


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
    """A model against the whole one. A rank holds up to 1 / n + `share`. `local`: weights that must
    compute on shards, as {end of the name: dim, or None for any}."""
    torch.manual_seed(3)
    inputs = [double(f()) for f in (given, *calls)]
    sharded, whole = pair(build, n, example_inputs=copy.deepcopy(inputs[0]))
    plan = sharded.tensor_parallel_plan
    for x in inputs:
        compare(sharded, whole, x, tol)
    for end, dim in (local or {}).items():
        entries = [e for k, e in plan.entries.items() if k.endswith(end)]
        assert entries and all(e.units for e in entries), f"{end}: has no axis of the model\n{plan}"
        assert dim is None or {e.dim for e in entries} == {dim}, f"{end}\n{plan}"
    assert share_of(sharded) <= 1 / n + share, f"holds {share_of(sharded):.1%}\n{plan}"
    if then is not None:
        then(sharded)


# ---------------------------------------------------------------- attention


class TransposedLinear(nn.Module):
    """A weight of (in, out), as GPT-2 stores it."""

    def __init__(self, i, o):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(i, o) * 0.1), nn.Parameter(torch.randn(o))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


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
            parts = y[..., : h * d], y[..., h * d : (h + kv) * d], y[..., (h + kv) * d :]
        return m.out(attend(*(z.reshape(b, t, -1, d) for z in parts)))

    make = TransposedLinear if kind == "thirds" else nn.Linear
    return model(forward, lambda: {"inp": make(D, (h + 2 * kv) * d), "out": make(h * d, D)})


def fused_mlp(cut):
    def forward(m, x):
        y = m.inp(x)
        if cut == "chunk":
            gate, up = y.chunk(2, -1)
        else:
            gate, up = y.split(64, -1) if cut == "split" else (y[..., :64], y[..., 64:])
        return m.out(F.gelu(gate) * up)

    return model(
        forward, lambda: {"inp": nn.Linear(D, 128, bias=False), "out": nn.Linear(64, D, bias=False)}
    )


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
    cases["thirds"] = dict(build=fused("thirds"), given=x, local={"inp.weight": 1, "out.weight": 0})
    cases["one kv head"] = dict(build=fused("one kv head", 4, 1), given=x)
    for kind in ("chunk", "split", "slices"):
        cases[f"gate and up by {kind}"] = dict(build=fused_mlp(kind), given=x, local=local)
    check_all(cases, n)


def attention(mix=attend, heads=4, kv=None, dim=6, norm=None, **more):
    """Separate projections; `mix(q, k, v, [m])` of (batch, length, heads, dim). `norm`: "head", or
    over all of them."""
    kv = kv or heads

    def forward(m, x):
        q, k, v = m.q(x), m.k(x), m.v(x)
        if norm in ("rms", "layer", "spelled"):
            q, k = m.qn(q), m.kn(k)
        q, k, v = (y.view(*x.shape[:2], h, dim) for y, h in ((q, heads), (k, kv), (v, kv)))
        if norm == "head":
            q, k = m.qn(q), m.kn(k)
        return m.o(mix(q, k, v) if mix is attend else mix(q, k, v, m))

    def parts():
        projections = {p: nn.Linear(D, h * dim, bias=False) for p, h in zip("qkv", (heads, kv, kv))}
        make = {
            "head": lambda d: nn.RMSNorm(dim),
            "rms": nn.RMSNorm,
            "layer": nn.LayerNorm,
            "spelled": SpelledNorm,
        }
        norms = {"qn": make[norm](heads * dim), "kn": make[norm](kv * dim)} if norm else {}
        extra = {name: f() if callable(f) else f for name, f in more.items()}
        return {**projections, "o": nn.Linear(heads * dim, D, bias=False), **norms, **extra}

    return model(forward, parts)


HEADS = {"q.weight": 0, "k.weight": 0, "v.weight": 0, "o.weight": 1}


class SpelledNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(d))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


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
    """At the sizes of a real model; in a tiny one the model dimension may send fewer bytes."""
    with torch.device("meta"):
        model = llama(
            num_attention_heads=16,
            hidden_size=1024,
            head_dim=64,
            intermediate_size=4096,
            vocab_size=32000,
        )
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


FLOAT32 = (
    2e-5  # some of transformers' norms and softmaxes compute in it whatever the model's dtype is
)
TEXT = dict(
    vocab_size=48, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
)


def llama(**kw):
    hf = pytest.importorskip("transformers")
    config = dict(
        TEXT, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, use_cache=False
    )
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**config, **kw}))


def test_three_ranks():
    hf = pytest.importorskip("transformers")
    sizes = dict(vocab_size=48, n_positions=32, n_embd=32, n_layer=1, n_head=4, use_cache=False)
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
    """Norms of all queries and keys cost no more than a sum each, forward and backward, of a number
    for each token."""

    def then(sharded):
        plan = sharded.tensor_parallel_plan
        bare = plan_tensor_parallel(
            attention()().double(), n, example_inputs=double(features(2, 5, D)())
        )
        assert (
            0 < plan.bytes_per_step - bare.bytes_per_step <= 2 * 2 * 5 * 8 * 4 * (n - 1) / n
        ), f"{plan}\n{bare}"

    return then


def sinks(q, k, v, m):
    """A learned logit for each head, that takes attention and gives nothing."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = torch.cat(
        [scores, m.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)], dim=-1
    )
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return (scores.softmax(-1)[..., :-1] @ v).transpose(1, 2).flatten(2)


def alibi(q, k, v, m):
    at = torch.arange(q.shape[1])
    return attend(q, k, v, m.slopes[:, None, None] * (at[None, None, :] - at[None, :, None]))


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
    bias = m.table((at[None, :] - at[:, None]).clamp(-3, 4) + 3).permute(2, 0, 1).unsqueeze(0)
    for layer in (m.first, m.second):
        q, k, v = (layer[p](x).view(*x.shape[:2], 4, 6) for p in "qkv")
        x = x + layer["o"](attend(q, k, v, bias))
    return x


def layers():
    first, second = (nn.ModuleDict({p: nn.Linear(D, D) for p in "qkvo"}) for _ in range(2))
    return {"table": nn.Embedding(8, 4), "first": first, "second": second}


class Slopes(nn.Module):
    """The slopes of heads in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("values", torch.rand(4))

    def __getitem__(self, at):
        return self.values[at]


def scaled(m, x):
    """A slope for each hidden unit; a scale and a gate that are one number each, inside and
    outside."""
    h = m.a(x)
    h = torch.where(h > 0, h, m.slopes * h) * m.logit_scale.exp()
    return m.outer.tanh() * m.b(h + torch.tanh(m.gate) * h.square())


@pytest.mark.parametrize("n", [2, 4])
def test_parameters_inside_a_region(n):
    builds = {name: attention(norm=name) for name in ("head", "rms", "layer", "spelled")} | {
        "sinks": attention(sinks, sinks=(4,)),
        "slopes of heads": attention(alibi, slopes=(4,)),
        "slopes in a buffer": attention(alibi, slopes=Slopes),
        "temperatures": attention(cosine, temperature=(4, 1, 1)),
        "relative positions": model(relative, layers, residual=False),
    }
    x, numbers = features(2, 5, D), {"slopes": (48,), "logit_scale": (), "gate": (1,), "outer": ()}
    cases = {name: dict(build=build, given=x, local=HEADS) for name, build in builds.items()}
    cases["spelled"]["then"] = small_reductions(n)
    # A LayerNorm over a sharded dim is right, but there is no rule by which it could run on head
    # shards.
    cases["layer"]["local"] = None
    build = model(scaled, lambda: {"a": nn.Linear(D, 48), "b": nn.Linear(48, D), **numbers})
    cases["slopes and scales"] = dict(build=build, given=x, local={"a.weight": 0, "b.weight": 1})
    check_all(cases, n)


# ------------------------------------------------------------------ experts


def experts(kind, e=4, hidden=32):
    """Experts as parameters of three dims; all compute each token, and the weights of those not
    chosen are zero."""

    def forward(m, x):
        flat = x.flatten(0, 1)
        probs = m.router(flat).softmax(-1)
        value, index = probs.topk(2, dim=-1)
        weights = torch.zeros_like(probs).scatter(1, index, value / value.sum(-1, keepdim=True))
        if kind == "bmm":
            gate, up = torch.bmm(flat.expand(e, -1, -1), m.up).chunk(2, dim=-1)
            return (torch.bmm(F.silu(gate) * up, m.down) * weights.t()[..., None]).sum(0).view_as(x)
        gate, up = torch.einsum("td,edh->teh", flat, m.up).chunk(2, dim=-1)
        return torch.einsum("teh,ehd,te->td", F.silu(gate) * up, m.down, weights).view_as(x)

    router = lambda: nn.Linear(D, e, bias=False)  # noqa: E731
    return model(
        forward, lambda: {"router": router(), "up": (e, D, 2 * hidden), "down": (e, hidden, D)}
    )


def routed(m, x):
    """Modules, each for the tokens that go to it; and one that all tokens pass."""
    flat = x.view(-1, x.shape[-1])
    weight, chosen = m.router(flat).softmax(-1).topk(1, dim=-1)
    out = torch.zeros_like(flat)
    for e, expert in enumerate(m.experts):
        token, slot = torch.where(chosen == e)
        out.index_add_(0, token, expert(flat[token]) * weight[token, slot].unsqueeze(-1))
    return out.view_as(x) + m.shared(x)


def expert_list():
    shared, *each = (nn.Sequential(nn.Linear(D, 32), nn.GELU(), nn.Linear(32, D)) for _ in range(4))
    return {"router": nn.Linear(D, 3), "shared": shared, "experts": nn.ModuleList(each)}


@pytest.mark.parametrize("n", [2, 4])
def test_experts(n):
    hf = pytest.importorskip("transformers")

    def split(*ends):
        def then(sharded):
            plan = sharded.tensor_parallel_plan
            assert all(
                e.dim is not None for name, e in plan.entries.items() if name.endswith(ends)
            ), plan

        return then

    config = dict(
        TEXT,
        num_key_value_heads=4,
        num_local_experts=4,
        experts_implementation="eager",
        use_cache=False,
    )
    mixtral = lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**config))  # noqa: E731
    x, calls, local = (
        features(2, 5, D),
        [features(1, 1, D), features(3, 7, D)],
        {"up": None, "down": None},
    )
    cases = {kind: dict(build=experts(kind), given=x, local=local) for kind in ("bmm", "einsum")}
    cases["list"] = dict(
        build=model(routed, expert_list), given=x, calls=calls, then=split("0.weight", "2.weight")
    )
    parts = split("experts.gate_up_proj", "experts.down_proj")
    cases["mixtral"] = dict(
        build=mixtral, given=ids(2, 6), calls=[ids(1, 9)], then=parts, tol=FLOAT32
    )
    check_all(cases, n)


# ------------------------------------------- state spaces, linear attention


def mamba(m, x, inner=32, state=4, rank=3):
    t = x.shape[1]
    x, gate = m.in_proj(x).chunk(2, dim=-1)
    x = F.silu(m.conv(x.transpose(1, 2))[..., :t]).transpose(1, 2)
    step, b, c = m.x_proj(x).split([rank, state, state], dim=-1)
    step = F.softplus(m.dt_proj(step))
    decay = torch.exp(step.unsqueeze(-1) * -m.A_log.exp())
    drive = (step * x).unsqueeze(-1) * b.unsqueeze(2)
    h, out = torch.zeros(x.shape[0], inner, state, dtype=x.dtype), []
    for i in range(t):
        h = decay[:, i] * h + drive[:, i]
        out.append((h * c[:, i, None]).sum(-1))
    return m.out_proj((torch.stack(out, dim=1) + x * m.D) * F.silu(gate))


def mamba_parts():
    ends = {
        "in_proj": nn.Linear(D, 64, bias=False),
        "out_proj": nn.Linear(32, D, bias=False),
        "A_log": (32, 4),
        "D": (32,),
    }
    conv = nn.Conv1d(32, 32, 3, groups=32, padding=2)
    return {
        **ends,
        "conv": conv,
        "x_proj": nn.Linear(32, 11, bias=False),
        "dt_proj": nn.Linear(3, 32),
    }


def linear_attention(q, k, v, m):
    """A recurrence: a matrix of state for each head, which decays."""
    b, t, h, d = q.shape
    state, out = q.new_zeros(b, h, d, d), []
    for i in range(t):
        new = k[:, i].unsqueeze(-1) * v[:, i].unsqueeze(-2)
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, i], state + m.bonus.unsqueeze(-1) * new))
        state = state * torch.sigmoid(m.decay) + new
    return m.after(torch.stack(out, 1).reshape(b * t, -1)).view(b, t, -1)


def rwkv(m, x):
    """Each token is mixed with the one before it; keys weigh values, with a decay for each
    channel."""
    mixed = x * m.mix + F.pad(x, (0, 0, 1, -1)) * (1 - m.mix)
    k, v, r = m.key(mixed), m.value(mixed), torch.sigmoid(m.gate(mixed))
    num, den, out = torch.zeros_like(v[:, 0]), torch.zeros_like(v[:, 0]), []
    for i in range(x.shape[1]):
        here = torch.exp(m.first + k[:, i])
        out.append((num + here * v[:, i]) / (den + here))
        fade = torch.exp(-torch.exp(m.decay))
        num, den = fade * num + k[:, i].exp() * v[:, i], fade * den + k[:, i].exp()
    return m.out(r * torch.stack(out, dim=1))


def rwkv_parts():
    linears = {p: nn.Linear(D, D, bias=False) for p in ("key", "value", "gate", "out")}
    return {**linears, "mix": (D,), "decay": (D,), "first": (D,)}


@pytest.mark.parametrize("n", [2, 4])
def test_state_spaces_and_linear_attention(n):
    hf = pytest.importorskip("transformers")
    config = dict(
        vocab_size=48,
        hidden_size=16,
        num_hidden_layers=1,
        state_size=4,
        time_step_rank=4,
        use_cache=False,
    )
    real = lambda: hf.MambaForCausalLM(hf.MambaConfig(**config))  # noqa: E731
    inner = {
        "in_proj.weight": 0,
        "conv.weight": 0,
        "x_proj.weight": 1,
        "dt_proj.weight": 0,
        "A_log": 0,
    }
    x, mix = features(2, 5, D), {
        "key.weight": 0,
        "value.weight": 0,
        "gate.weight": 0,
        "out.weight": 1,
    }
    linear = attention(
        linear_attention, decay=(4, 1, 1), bonus=(4, 6), after=lambda: nn.GroupNorm(4, D)
    )
    cases = {
        "mamba": dict(
            build=model(mamba, mamba_parts), given=x, local={**inner, "out_proj.weight": 1}
        ),
        # A length equal to the number of heads (4) would be taken for it in new_zeros: right, but
        # not local then.
        "linear attention": dict(build=linear, given=x, local=HEADS),
        "rwkv": dict(build=model(rwkv, rwkv_parts), given=x, local=mix),
        "transformers' mamba": dict(build=real, given=ids(2, 4), share=0.1, tol=FLOAT32),
    }
    check_all(cases, n)


# ----------------------------------------------------------------- planning


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
    plan = plan_tensor_parallel(model, 8, example_inputs=(torch.ones(1, 16, dtype=torch.long),))
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
        return hooks, modes, grads, [id(b) for b in model.buffers()], torch.is_grad_enabled()

    before, values, state = seen(), copy.deepcopy(model.state_dict()), torch.get_rng_state()
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
        blocked, lambda: {"a": nn.Linear(D, 64, bias=False), "b": nn.Linear(64, D)}, residual=False
    )
    a = plan_tensor_parallel(build(), 2, example_inputs=(torch.randn(2, 5, D),))["a.weight"]
    assert (
        a.how == "weight gathered" and "linalg_qr" in a.why and f"test_regions.py:{line}" in a.why
    ), a


def chain(*widths):
    return nn.Sequential(*[nn.Linear(a, b, bias=False) for a, b in zip(widths, widths[1:])])


SMALL = [
    lambda: chain(16, 64, 16, 8),
    lambda: chain(8, 8, 64, 24, 64),
    attention(),
    fused_mlp("chunk"),
]


@pytest.mark.parametrize("build", SMALL)
@pytest.mark.parametrize("n", [2, 4])
def test_the_choice_is_brute_forces(build, n):
    """Of all sets of axes that do not conflict, none sends fewer bytes than the planner's."""
    model = build()
    x = torch.randn(2, 12, next(p.shape[-1] for p in model.parameters()), requires_grad=True)
    graph = trace(model, (x,), {})
    axes = Axes(graph)
    task = Task(graph, axes, n)
    planner = Planner(task)
    axes_that_fit = [c for c in candidates(task) if planner.weigh(c)]

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
                sharding.params.update(c.params)
            planner.fill(sharding, used_by)
            found[tuple(sorted(map(str, (c.params for c in some))))] = sent(sharding)
    best = min(found, key=found.get)
    assert (
        sent(planner.choose()) <= found[best]
    ), f"{best} would send {found[best]} bytes, found {sent(planner.choose())}"
    assert len(found) > 2


AFTER_A_SUM = {
    "flags are added": lambda y, flags, counts: y + flags,
    "to flags": lambda y, flags, counts: flags + y,
    "integers are subtracted": lambda y, flags, counts: y - counts,
    "from integers": lambda y, flags, counts: counts - y,
    "flags are a factor": lambda y, flags, counts: y * flags,
    "integers divide": lambda y, flags, counts: y / (counts + 1),
    "flags select": lambda y, flags, counts: y[:, :, flags],
    "divided and rounded": lambda y, flags, counts: torch.div(y, 0.1, rounding_mode="floor")
    + 0 * y.detach(),
    "rounded": lambda y, flags, counts: (10 * y).to(torch.int64).double(),
    "floored": lambda y, flags, counts: (y // 0.1).detach(),
}


class AfterASum(nn.Module):
    def __init__(self, then):
        super().__init__()
        self.up, self.down, self.then = nn.Linear(16, 64), nn.Linear(64, 16, bias=False), then
        self.register_buffer("flags", torch.arange(16) > 7)
        self.register_buffer("counts", torch.arange(16))

    def forward(self, x):
        return self.then(self.down(self.up(x).relu()), self.flags, self.counts)


def test_what_follows_a_partial_result():
    """What is no float adds to a sum as floats do; what is rounded is no sum any more."""

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
    """A sum over ranks that is taken later where dropout is off; statistics that may be frozen."""

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
    """Dropout on in evaluation (Monte Carlo), off in training; frozen norms: each is shown right
    before it runs."""

    def ranks(rank):
        x = torch.randn(4, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        models = pair(Moded, 2, example_inputs=(x,))
        for modes in "nothing", "", "all", "drop", "", "norm", "drop norm", "all", "nothing":
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
    """A gradient that the forward takes itself; a fused weight, whose pieces are calls of their
    own."""

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
    """The forward's own backward runs its checkpoint again, while the forward is running."""

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
        x = torch.randn(3, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        models = pair(Checkpointed, 2, example_inputs=(x,))
        for length in 5, 4:
            found = []
            for m in models:
                m.zero_grad()
                given = x[:, :length].clone().requires_grad_()
                out = checkpoint(m, given, use_reentrant=False)
                sum((o * o).sum() for o in out).backward()
                found.append([*out, given.grad, *(full(p.grad) for p in m.parameters())])
            for a, b in zip(*found):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)

    run_ranks(ranks, 2)


def full(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


class WritesAndReturns(nn.Module):
    """What it returns is the tensor that it wrote to, and not what the call that wrote gave
    back."""

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(10, 10)), nn.Parameter(torch.randn(10))

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
        x = torch.randn(3, 7, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        models = pair(Twice, 2, example_inputs=(x,))
        assert (
            models[0].tensor_parallel_plan["block.b"].dim == 0
        )  # or there is no shard to complete
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
            return F.cross_entropy(logits, logits.detach().argmax(-1), weight=self.weights)

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
        x = torch.randn(2, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        models = pair(Outer, 2, example_inputs=(x,))
        for weights in None, torch.linspace(0.1, 3, 24, dtype=torch.float64), None:
            for m in models:
                m.block.weights = weights
            compare(*models, (x,))

    run_ranks(ranks, 2)


def test_what_a_module_is_set_to_is_compared_without_a_call():
    """Of a setting that was None and is a tensor now, `==` would be a call of the model's own to a
    mode."""
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
    """A product that is dearer on shards where the input is short, then a loop over the length."""

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
    """The loop makes another path of another length, on which what ran before it must be the
    same."""

    def ranks(rank):
        models = pair(ChosenBySize, 2, example_inputs=(torch.randn(2, 3, 8).double(),))
        for length in 3, 40, 5:
            compare(*models, (torch.randn(2, length, 8),))

    run_ranks(ranks, 2)
