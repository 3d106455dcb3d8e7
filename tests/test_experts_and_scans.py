"""Regions of mixtures of experts, of state spaces and of linear attention."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import pair
from models.regions import (
    FLOAT32,
    HEADS,
    TEXT,
    D,
    attention,
    check_all,
    features,
    ids,
    model,
)
from ranks import run_ranks
from torch import nn

# ------------------------------------------------------------------ experts


def experts(kind, e=4, hidden=32):
    """Experts as parameters of three dims; all compute each token, and the weights of
    those not chosen are zero."""

    def forward(m, x):
        flat = x.flatten(0, 1)
        probs = m.router(flat).softmax(-1)
        value, index = probs.topk(2, dim=-1)
        weights = torch.zeros_like(probs).scatter(
            1, index, value / value.sum(-1, keepdim=True)
        )
        if kind == "bmm":
            gate, up = torch.bmm(flat.expand(e, -1, -1), m.up).chunk(2, dim=-1)
            return (
                (torch.bmm(F.silu(gate) * up, m.down) * weights.t()[..., None])
                .sum(0)
                .view_as(x)
            )
        gate, up = torch.einsum("td,edh->teh", flat, m.up).chunk(2, dim=-1)
        return torch.einsum(
            "teh,ehd,te->td", F.silu(gate) * up, m.down, weights
        ).view_as(x)

    router = lambda: nn.Linear(D, e, bias=False)  # noqa: E731
    return model(
        forward,
        lambda: {"router": router(), "up": (e, D, 2 * hidden), "down": (e, hidden, D)},
    )


def repeated(e=4, hidden=32):
    """As Llama 4's: the tokens, repeated for each expert and scaled by its score."""

    def forward(m, x):
        flat = x.flatten(0, 1)
        scores = m.router(flat).sigmoid()
        each = flat.repeat(e, 1) * scores.t().reshape(-1, 1)
        gate, up = torch.bmm(each.view(e, -1, D), m.up).chunk(2, dim=-1)
        out = torch.bmm(F.silu(gate) * up, m.down).view(-1, D)
        out = out.reshape(e, -1, D).sum(0)
        return (m.shared(flat) + out).view_as(x)

    def parts():
        weights = {"up": (e, D, 2 * hidden), "down": (e, hidden, D)}
        shared = nn.Sequential(nn.Linear(D, 32), nn.GELU(), nn.Linear(32, D))
        return {"router": nn.Linear(D, e, bias=False), "shared": shared, **weights}

    return model(forward, parts)


def biased(e=4, hidden=32):
    """As GPT-OSS's: a bias of each token's expert, added in place."""

    def forward(m, x):
        flat = x.flatten(0, 1)
        value, index = m.router(flat).softmax(-1).topk(2, dim=-1)
        chosen = index.flatten()
        tokens = flat.repeat_interleave(2, 0)
        made = torch.einsum("td,tdh->th", tokens, m.up[chosen])
        out = torch.einsum("th,thd->td", F.silu(made), m.down[chosen])
        out.add_(m.bias[chosen])
        out = out * value.flatten().unsqueeze(-1)
        return out.view(-1, 2, D).sum(1).view_as(x)

    def parts():
        weights = {"up": (e, D, hidden), "down": (e, hidden, D), "bias": (e, D)}
        return {"router": nn.Linear(D, e, bias=False), **weights}

    return model(forward, parts)


def zeros_for_scores(m, x):
    """As GPT-NeoX-Japanese's: zeros for the scores of as many heads as there seem to
    be."""
    b, t, _ = x.shape
    q, k, v = (w(x).view(b, t, 8, 4).transpose(1, 2) for w in (m.q, m.k, m.v))
    heads = q.shape[1]
    q, k = (y.reshape(b * heads, t, 4) for y in (q, k))
    scores = torch.baddbmm(torch.zeros(b * heads, t, t, dtype=x.dtype), q, k.mT)
    out = scores.view(b, heads, t, -1).softmax(-1) @ v
    return m.o(out.transpose(1, 2).flatten(2))


class Cache:
    """An object that keeps keys for a next call."""


class KeepsKeys(nn.Module):
    """Attention whose keys, one head's repeated for all, are kept before they are
    used."""

    def __init__(self):
        super().__init__()
        self.q, self.v = (nn.Linear(D, 48, bias=False) for _ in range(2))
        self.k, self.o = nn.Linear(D, 6, bias=False), nn.Linear(48, D, bias=False)

    def forward(self, x, cache):
        heads = (
            y.unflatten(-1, (8, 6)).transpose(1, 2) for y in (self.q(x), self.v(x))
        )
        q, v = heads
        cache.keys = self.k(x).unsqueeze(1).repeat(1, 8, 1, 1)
        mixed = (q @ cache.keys.mT).softmax(-1) @ v
        return self.o(mixed.transpose(1, 2).flatten(2))


def test_what_an_object_keeps_stays_whole():
    def ranks(rank):
        x, cache = features(2, 5, D)()[0].double(), Cache()
        options = dict(example_inputs=(x, Cache()), device="H100")
        sharded, whole = pair(KeepsKeys, 2, **options)
        expected = Cache()
        assert torch.allclose(sharded(x, cache), whole(x, expected), atol=1e-10)
        assert torch.allclose(cache.keys, expected.keys, atol=1e-10)

    run_ranks(ranks, 2)


def routed(m, x):
    """Modules, each for the tokens that go to it; and one that all tokens pass."""
    flat = x.view(-1, x.shape[-1])
    weight, chosen = m.router(flat).softmax(-1).topk(1, dim=-1)
    out = torch.zeros_like(flat)
    for e, expert in enumerate(m.experts):
        token, slot = torch.where(chosen == e)
        out.index_add_(
            0, token, expert(flat[token]) * weight[token, slot].unsqueeze(-1)
        )
    return out.view_as(x) + m.shared(x)


def expert_list():
    shared, *each = (
        nn.Sequential(nn.Linear(D, 32), nn.GELU(), nn.Linear(32, D)) for _ in range(4)
    )
    return {"router": nn.Linear(D, 3), "shared": shared, "experts": nn.ModuleList(each)}


@pytest.mark.parametrize("n", [2, 4])
def test_experts(n):
    hf = pytest.importorskip("transformers")

    def split(*ends):
        def then(sharded):
            plan = sharded.tensor_parallel_plan
            assert all(
                e.dim is not None
                for name, e in plan.entries.items()
                if name.endswith(ends)
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
    heads = {**{name: nn.Linear(D, 32) for name in "qkv"}, "o": nn.Linear(32, D)}
    cases = {
        kind: dict(build=experts(kind), given=x, local=local)
        for kind in ("bmm", "einsum")
    }
    cases["list"] = dict(
        build=model(routed, expert_list),
        given=x,
        calls=calls,
        then=split("0.weight", "2.weight"),
    )
    parts = split("experts.gate_up_proj", "experts.down_proj")
    cases["mixtral"] = dict(
        build=mixtral, given=ids(2, 6), calls=[ids(1, 9)], then=parts, tol=FLOAT32
    )
    cases |= {
        "tokens repeated for each expert": dict(
            build=repeated(), given=x, calls=calls, local=local
        ),
        "a bias of each token's expert": dict(
            build=biased(), given=x, calls=calls, local=local
        ),
        "zeros for the scores of heads": dict(
            build=model(zeros_for_scores, lambda: copy.deepcopy(heads)),
            given=x,
            calls=calls,
            local={"q.weight": 0, "o.weight": 1},
        ),
    }
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
        out.append(
            torch.einsum("bhk,bhkv->bhv", q[:, i], state + m.bonus.unsqueeze(-1) * new)
        )
        state = state * torch.sigmoid(m.decay) + new
    return m.after(torch.stack(out, 1).reshape(b * t, -1)).view(b, t, -1)


def rwkv(m, x):
    """Each token is mixed with the one before it; keys weigh values, with a decay for
    each channel."""
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
        linear_attention,
        decay=(4, 1, 1),
        bonus=(4, 6),
        after=lambda: nn.GroupNorm(4, D),
    )
    cases = {
        "mamba": dict(
            build=model(mamba, mamba_parts),
            given=x,
            local={**inner, "out_proj.weight": 1},
        ),
        # A length equal to the number of heads (4) would be taken for it in new_zeros:
        # right, but not local then.
        "linear attention": dict(build=linear, given=x, local=HEADS),
        "rwkv": dict(build=model(rwkv, rwkv_parts), given=x, local=mix),
        "transformers' mamba": dict(
            build=real, given=ids(2, 4), share=0.1, tol=FLOAT32
        ),
    }
    check_all(cases, n)
