"""Regions of real models, each a few lines: fused projections, heads that do not divide, parameters inside, experts, state spaces; and the planner."""

import copy
import time
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from helpers import compare, pair, share_of
from ranks import run_ranks
from torch import nn

from quintnet_dt import plan_tensor_parallel

D = 24


def features(*shape):
    return lambda: (torch.randn(*shape),)


def ids(*shape, high=48):
    return lambda: (torch.randint(3, high, shape),)


def check_all(cases, n, tol=1e-9):
    """`cases`: name -> (build, given, more), each against the whole model, all in one launch.

    more: `share`, a bound on what the fullest rank holds; `local`, {end of the name: dim} of
    weights that must compute on shards; `then(sharded)`; `calls`, further inputs; `tol`.
    """

    def ranks(rank):
        for name, (build, given, more) in cases.items():
            began = time.monotonic()
            try:
                torch.manual_seed(3)
                given = [tuple(x.double() if x.is_floating_point() else x for x in f()) for f in (given, *more.get("calls", ()))]
                sharded, whole = pair(build, n, True, example_inputs=copy.deepcopy(given[0]))
                plan = sharded.tensor_parallel_plan
                for x in given:
                    compare(sharded, whole, x, more.get("tol", tol))
                for end, dim in more.get("local", {}).items():
                    found = {(e.how, e.dim) for k, e in plan.entries.items() if k.endswith(end)}
                    assert found == {("local", dim)}, f"expected {end} local, split on dim {dim}, found {found}"
                assert share_of(sharded) <= more.get("share", 1), f"holds {share_of(sharded):.1%}"
                more.get("then", lambda model: None)(sharded)
            except BaseException as e:
                if hasattr(e, "add_note"):
                    e.add_note(f"in {name} at tp={n}")
                raise AssertionError(f"{name} at tp={n}: {e}\n{getattr(locals().get('sharded'), 'tensor_parallel_plan', '')}") from e
            if rank == 0:
                print(name, n, f"{time.monotonic() - began:.1f}", flush=True)

    run_ranks(ranks, n, timeout=240)


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
        gate, up = {"chunk": lambda: y.chunk(2, -1), "split": lambda: y.split(64, -1), "slices": lambda: (y[..., :64], y[..., 64:])}[self.cut]()
        return self.out(F.gelu(gate) * up)


def fused_cases(n):
    x, local = features(2, 5, D), {"inp.weight": 0, "out.weight": 1}
    cases = {
        (kind, kv): (lambda kind=kind, kv=kv: Block(Fused(kind, 4, kv)), x, {"share": 1 / n + 0.05, "local": local if kv % n == 0 else {}})
        for kind, kv in [
            ("thirds", 4),
            ("chunk", 4),
            ("sizes", 4),
            ("sizes", 2),
            ("slices", 2),
            ("a head's three", 4),
            ("heads by three", 4),
            ("one kv head", 1),
            ("groups", 2),
        ]
    }
    cases["thirds", 4][2]["local"] = {"inp.weight": 1, "out.weight": 0}
    for cut in ("chunk", "split", "slices"):
        cases[f"gate and up by {cut}"] = (lambda cut=cut: FusedMLP(cut), x, {"share": 1 / n, "local": local})
    return cases


@pytest.mark.parametrize("n", [2, 4])
def test_fused_projections(n):
    check_all(fused_cases(n), n)


class Attention(nn.Module):
    """Separate projections. `norm`: of queries and keys, per head ("head"), over all of them ("all"), or so but spelled out ("spelled")."""

    def __init__(self, heads=4, kv=None, dim=6, norm=None, bias=False, repeat="interleave"):
        super().__init__()
        kv = kv or heads
        self.heads, self.kv, self.dim, self.norm = heads, kv, dim, norm
        self.q, self.k, self.v = (nn.Linear(D, h * dim, bias=bias) for h in (heads, kv, kv))
        self.o = nn.Linear(heads * dim, D, bias=bias)
        make = {"head": lambda h: nn.RMSNorm(dim), "all": lambda h: nn.LayerNorm(h * dim), "spelled": lambda h: SpelledNorm(h * dim)}
        if norm:
            self.qn, self.kn = make[norm](heads), make[norm](kv)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.norm in ("all", "spelled"):
            q, k = self.qn(q), self.kn(k)
        q, k, v = q.view(b, t, self.heads, self.dim), k.view(b, t, self.kv, self.dim), v.view(b, t, self.kv, self.dim)
        if self.norm == "head":
            q, k = self.qn(q), self.kn(k)
        return self.o(attend(*(z.transpose(1, 2) for z in (q, k, v))))


class SpelledNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(d))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize("n", [2, 4])
def test_heads_that_do_not_divide(n):
    x, queries = features(2, 5, D), {"q.weight": 0, "o.weight": 1}
    shapes = {2: [(4, 1), (3, 3), (3, 1), (6, 3)], 4: [(8, 2), (14, 14), (14, 2), (6, 6), (4, 1), (6, 2)]}[n]
    cases = {}
    for heads, kv in shapes:
        more = {"share": 1 / n + 0.1, "local": queries if heads % n == 0 else {}}
        cases[heads, kv] = (lambda h=heads, k=kv: Block(Attention(h, k)), x, more)
    check_all(cases, n)


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


TEXT = dict(vocab_size=48, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)


def llama(**kw):
    hf = pytest.importorskip("transformers")
    config = dict(TEXT, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, use_cache=False)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**config, **kw}))


def test_three_ranks():
    hf = pytest.importorskip("transformers")
    gpt2 = lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=48, n_positions=32, n_embd=32, n_layer=1, n_head=4, use_cache=False))  # noqa: E731
    bert = lambda: hf.BertForMaskedLM(hf.BertConfig(**TEXT, max_position_embeddings=32))  # noqa: E731
    check_all({"convolutions": (ResNet, features(2, 3, 8, 8), {"share": 0.45}), "attention": (Attention, features(2, 5, D), {})}, 3)
    more = {"share": 0.45, "tol": 2e-5}
    check_all({"llama": (llama, ids(2, 6), more), "gpt2": (gpt2, ids(2, 6), more), "bert": (bert, ids(2, 6), more)}, 3)


# ------------------------------------------------- parameters inside a region


def reductions(n, count):
    """Asserts that norms of queries and keys cost no more than sums of `count` elements a token."""

    def then(model):
        plan = model.tensor_parallel_plan
        torch.manual_seed(0)
        bare = plan_tensor_parallel(Block(Attention()).double(), n, example_inputs=(torch.randn(2, 5, D).double(),))
        assert 0 <= plan.bytes_per_step - bare.bytes_per_step <= 2 * 5 * 8 * count * 4 * (n - 1) / n, (plan, bare)

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
    x, local = features(2, 5, D), {"q.weight": 0, "k.weight": 0, "v.weight": 0, "o.weight": 1}
    mlp = {"a.weight": 0, "b.weight": 1}
    norm = {"local": local, "share": 1 / n + 0.05}
    cases = {
        "norm of a head": (lambda: Block(Attention(norm="head")), x, norm),
        "norm of all heads": (lambda: Block(Attention(norm="all")), x, {**norm, "then": reductions(n, 4)}),
        "norm of all heads, spelled": (lambda: Block(Attention(norm="spelled")), x, {**norm, "then": reductions(n, 2)}),
        "sinks": (lambda: Block(Sinks()), x, norm),
        "slopes of heads": (lambda: Block(Biased("parameter")), x, norm),
        "slopes in a buffer": (lambda: Block(Biased("buffer")), x, norm),
        "relative positions": (Relative, x, norm),
        "temperatures": (lambda: Block(Cosine()), x, norm),
        "slopes and scales": (Slopes, x, {"local": mlp, "share": 1 / n + 0.05}),
    }
    check_all(cases, n)


# ------------------------------------------------------------------ experts


class Experts(nn.Module):
    """Experts as parameters of three dims; each token goes to all ("bmm", "einsum"), or a buffer of slots holds the chosen ("slots")."""

    def __init__(self, kind, experts=4, hidden=32):
        super().__init__()
        self.kind, self.router = kind, nn.Linear(D, experts, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(experts, D, 2 * hidden) * 0.2), nn.Parameter(torch.randn(experts, hidden, D) * 0.2)

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
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, 32), nn.GELU(), nn.Linear(32, D)) for _ in range(experts))

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
            for name, e in model.tensor_parallel_plan.entries.items():
                assert e.dim is not None or not name.endswith(ends), model.tensor_parallel_plan

        return then

    config = dict(TEXT, num_key_value_heads=4, num_local_experts=4, experts_implementation="eager", use_cache=False)
    mixtral = lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**config))  # noqa: E731
    cases = {kind: (lambda kind=kind: Block(Experts(kind)), features(2, 5, D), {"local": {"up": 2 if False else 0, "down": 0}, "share": 1 / n + 0.05}) for kind in ("bmm", "einsum")}
    more = {"calls": [features(1, 1, D), features(3, 7, D)], "then": split("0.weight", "2.weight"), "share": 1 / n + 0.1}
    cases["list"] = (lambda: Block(ExpertList()), features(2, 5, D), more)
    cases["mixtral"] = (mixtral, ids(2, 6), {"calls": [ids(1, 9)], "then": split("experts.gate_up_proj", "experts.down_proj"), "tol": 2e-5})
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
        self.decay, self.bonus, self.norm_o = nn.Parameter(torch.rand(4, 1, 1)), nn.Parameter(torch.rand(4, 6)), nn.GroupNorm(4, D)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, self.heads, self.dim) for f in (self.q, self.k, self.v))
        state, out = x.new_zeros(b, self.heads, self.dim, self.dim), []
        for i in range(t):
            new = k[:, i].unsqueeze(-1) * v[:, i].unsqueeze(-2)
            out.append(torch.einsum("bhk,bhkv->bhv", q[:, i], state + self.bonus.unsqueeze(-1) * new))
            state = state * torch.sigmoid(self.decay) + new
        y = self.norm_o(torch.stack(out, 1).reshape(b * t, -1)).view(b, t, -1)
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
    local = {"q.weight": 0, "k.weight": 0, "v.weight": 0, "o.weight": 1}
    big = {"share": 1 / n + 0.1, "local": {"in_proj.weight": 0, "out_proj.weight": 1, "A_log": 0, "conv.weight": 0, "dt_proj.weight": 0, "x_proj.weight": 1}}
    heads = {"share": 1 / n + 0.05, "local": local}
    mix = {"share": 1 / n + 0.05, "local": {"key.weight": 0, "value.weight": 0, "gate.weight": 0, "out.weight": 1}}
    cases = {"mamba": (lambda: Block(Mamba()), features(2, 4, D), big), "linear": (lambda: Block(Linear()), features(2, 4, D), heads), "rwkv": (lambda: Block(Rwkv()), features(2, 4, D), mix)}
    cases["transformers' mamba"] = (mamba, ids(2, 4), {"tol": 2e-5, "share": 1 / n + 0.1})
    check_all(cases, n)
