"""apply_tensor_parallel: every kind of model gives, sharded, the outputs and gradients of the whole
one."""

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from helpers import check, compare, pair, same_output, share_of
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

from quintnet_dt import ProcessGroupManager, apply_tensor_parallel


def features(*shape):
    return lambda: (torch.randn(*shape),)


def ids(high, *shape):
    return lambda: (torch.randint(0, high, shape),)


def mlp(d=16, h=32, bias=True):
    return nn.Sequential(nn.Linear(d, h, bias=bias), nn.GELU(), nn.Linear(h, d, bias=bias))


class Attention(nn.Module):
    """Attention with separate q, k, v; `style` is how its sizes are written."""

    def __init__(
        self, d=32, heads=4, kv_heads=None, style="infer", bias=True, norm=False, dropout=0.0
    ):
        super().__init__()
        self.num_heads, self.kv_heads, self.head_dim = heads, kv_heads or heads, d // heads
        self.hidden, self.style, self.dropout = d, style, nn.Dropout(dropout)
        self.q = nn.Linear(d, heads * self.head_dim, bias=bias)
        self.k = nn.Linear(d, self.kv_heads * self.head_dim, bias=bias)
        self.v = nn.Linear(d, self.kv_heads * self.head_dim, bias=bias)
        self.o = nn.Linear(heads * self.head_dim, d, bias=bias)
        self.q_norm = nn.RMSNorm(self.head_dim) if norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim) if norm else nn.Identity()

    def heads(self, x, n):
        b, t, _ = x.shape
        return x.view(b, t, -1 if self.style == "infer" else n, self.head_dim)

    def forward(self, x, mask=None):
        b, t, _ = x.shape
        q = self.q_norm(self.heads(self.q(x), self.num_heads)).transpose(1, 2)
        k = self.k_norm(self.heads(self.k(x), self.kv_heads)).transpose(1, 2)
        v = self.heads(self.v(x), self.kv_heads).transpose(1, 2)
        groups = self.num_heads // self.kv_heads
        if groups > 1:  # as transformers' repeat_kv
            k = (
                k[:, :, None]
                .expand(b, k.shape[1], groups, t, self.head_dim)
                .reshape(b, -1, t, self.head_dim)
            )
            v = (
                v[:, :, None]
                .expand(b, v.shape[1], groups, t, self.head_dim)
                .reshape(b, -1, t, self.head_dim)
            )
        scores = q @ k.transpose(-1, -2) / self.head_dim**0.5
        causal = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        scores = scores.masked_fill(~causal, float("-inf"))
        if mask is not None:
            scores = scores + mask
        out = (self.dropout(scores.softmax(-1)) @ v).transpose(1, 2)
        return self.o(out.reshape(b, t, -1 if self.style == "infer" else self.hidden))


class Block(nn.Module):
    def __init__(self, d=32, h=64, dropout=0.0, parallel=False, **options):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = Attention(d, dropout=dropout, **options)
        self.mlp = nn.Sequential(nn.Linear(d, h), nn.GELU(), nn.Dropout(dropout), nn.Linear(h, d))
        self.parallel = parallel

    def forward(self, x, mask=None):
        if self.parallel:
            return x + self.attn(self.ln_1(x), mask) + self.mlp(self.ln_2(x))
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, vocab=64, d=32, layers=1, tied=False, **options):
        super().__init__()
        self.wte = nn.Embedding(vocab, d)
        self.blocks = nn.ModuleList(Block(d, **options) for _ in range(layers))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocab, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, ids, mask=None):
        x = self.wte(ids)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


# ---- layers


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_mlp(n, bias):
    def local(sharded, whole):
        assert {
            e.how for e in sharded.tensor_parallel_plan.entries.values() if len(e.shape) == 2
        } == {"local"}

    check(lambda: mlp(bias=bias), features(3, 16), n, share=1 / n + 0.05, then=local)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_gpt(n):
    check(GPT, ids(64, 2, 6), n, share=1 / n + 0.05)


@pytest.mark.parametrize(
    "options, n",
    [
        (dict(style="written"), 2),
        (dict(style="written"), 4),
        (dict(kv_heads=2), 2),
        (dict(kv_heads=2, style="written"), 2),
        (dict(kv_heads=2), 4),
        (dict(kv_heads=1), 2),
        (dict(kv_heads=2, style="written"), 4),
        (dict(norm=True), 2),
        (dict(norm=True, style="written"), 4),
        (dict(parallel=True), 2),
        (dict(parallel=True, style="written", bias=False), 4),
        (dict(tied=True), 2),
        (dict(tied=True), 4),
        (dict(heads=8, kv_heads=4), 4),
    ],
    ids=str,
)
def test_variants_of_attention(options, n):
    def then(sharded, whole):
        if options.get("tied"):
            assert sharded.head.weight is sharded.wte.weight
            assert sharded.wte.weight.placements[0].is_shard()

    check(lambda: GPT(**options), ids(64, 2, 6), n, share=1 / n + 0.08, then=then)


class GatedMLP(nn.Module):
    def __init__(self, d=16, h=32, how="chunk"):
        super().__init__()
        self.gate_up, self.down, self.how, self.h = nn.Linear(d, 2 * h), nn.Linear(h, d), how, h

    def forward(self, x):
        x = self.gate_up(x)
        if self.how == "chunk":
            gate, up = x.chunk(2, dim=-1)
        elif self.how == "split":
            gate, up = x.split(self.h, dim=-1)
        elif self.how == "slice":
            gate, up = x[..., : self.h], x[..., self.h :]
        else:
            gate, up = x[..., ::2], x[..., 1::2]
        return self.down(F.silu(gate) * up)


@pytest.mark.parametrize(
    "how, n", [("chunk", 2), ("chunk", 4), ("split", 2), ("slice", 2), ("interleaved", 2)]
)
def test_fused_gate_up(how, n):
    check(lambda: GatedMLP(how=how), features(2, 3, 16), n, share=1 / n + 0.05)


class FusedAttention(nn.Module):
    """One projection for q, k and v. `kind`: equal pieces, grouped pieces of unequal size, or
    interleaved by head."""

    def __init__(self, d=32, heads=4, kv_heads=4, kind="split"):
        super().__init__()
        self.heads, self.kv_heads, self.dim, self.kind = heads, kv_heads, d // heads, kind
        self.embed_dim = d
        self.sizes = [heads * self.dim, kv_heads * self.dim, kv_heads * self.dim]
        self.qkv, self.proj = nn.Linear(d, sum(self.sizes)), nn.Linear(d, d)

    def forward(self, x):
        b, t, d = x.shape
        x = self.qkv(x)
        if self.kind == "split":
            q, k, v = x.split(self.sizes, dim=-1)
        elif self.kind == "width":
            q, k, v = x.split(self.embed_dim, dim=2)
        elif self.kind == "timm":
            q, k, v = (y.flatten(2) for y in x.reshape(b, t, 3, self.heads, self.dim).unbind(2))
        else:
            q, k, v = (y.flatten(2) for y in x.view(b, t, self.heads, 3, self.dim).unbind(3))
        q, k, v = (y.view(b, t, -1, self.dim).transpose(1, 2) for y in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads
        )
        return self.proj(out.transpose(1, 2).reshape(b, t, d))


@pytest.mark.parametrize(
    "kind, kv, n",
    [
        ("split", 4, 2),
        ("split", 4, 4),
        ("split", 2, 2),
        ("width", 4, 2),
        ("timm", 4, 4),
        ("interleaved", 4, 2),
    ],
)
def test_fused_qkv(kind, kv, n):
    check(lambda: FusedAttention(kind=kind, kv_heads=kv), features(2, 5, 32), n, share=1 / n + 0.05)


class ConvNet(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2)
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.n1, self.n2 = norm(8), norm(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.n1(self.c1(x)))
        x = F.relu(self.n2(self.c2(x)))
        return self.fc(self.depth(x).mean((2, 3)))


@pytest.mark.parametrize("train", [True, False])
def test_convolutions_with_batch_norm(train):
    check(ConvNet, features(2, 3, 8, 8), 2, train=train, calls=[features(3, 3, 10, 10)])


def test_group_norm():
    check(lambda: ConvNet(lambda c: nn.GroupNorm(4, c)), features(2, 3, 8, 8), 2)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_recurrent(layer):
    check(lambda: layer(8, 16, num_layers=2, batch_first=True), features(2, 5, 8), 2, share=0.6)


def test_multihead_attention():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.fc = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 16)

        def forward(self, x):
            out, weights = self.attn(x, x, x)
            return self.fc(out), weights

    check(Net, features(2, 5, 16), 2, share=0.65)


@pytest.mark.parametrize("train, grad", [(True, True), (False, True), (False, False)])
def test_transformer_encoder_layer(train, grad):
    """In eval mode without gradients torch takes a fused path that reads the weights of its
    children."""
    build = lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)  # noqa: E731
    check(build, features(2, 5, 16), 2, train=train, grad=grad)


def test_vocabulary_loss_inside():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.fc = nn.Embedding(32, 16, padding_idx=0), nn.Linear(16, 32)

        def forward(self, ids, labels=None):
            logits = self.fc(self.emb(ids))
            loss = (
                F.cross_entropy(logits.flatten(0, 1), labels.flatten())
                if labels is not None
                else None
            )
            return {"loss": loss, "logits": logits}

    def both():
        return torch.randint(0, 32, (2, 5)), torch.randint(0, 32, (2, 5))

    check(Net, both, 4, calls=[ids(32, 3, 4)])


def test_norms_inside_a_region():
    """A norm over the sharded dim needs all of it; one over heads does not."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(8, 32), nn.LayerNorm(32), nn.Linear(32, 8)
            self.slope = nn.PReLU()
            self.scale = nn.Parameter(torch.rand(1))

        def forward(self, x):
            return self.b(self.slope(self.norm(self.a(x))) * self.scale)

    check(Net, features(3, 8), 2)


def test_scalar_weights_inside_a_region():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)
            self.slope, self.scale = nn.PReLU(), nn.Parameter(torch.rand(1))
            self.shift = nn.Parameter(torch.rand(32))

        def forward(self, x):
            return self.b(self.slope(self.a(x) * self.scale) + self.shift)

    check(Net, features(3, 8), 4, share=0.4)


def test_a_scale_computed_from_a_width():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x):
            x = self.a(x)
            return self.b(x / x.shape[-1] ** 0.5 + x.size(-1))

    check(Net, features(3, 8), 2)


# ---- sizes that tp does not divide


@pytest.mark.parametrize(
    "build, given, n",
    [
        (lambda: mlp(5, 6), features(3, 5), 4),
        (lambda: mlp(3, 2), features(3, 3), 4),
        (lambda: GPT(vocab=13, d=12, h=7, heads=3), ids(13, 2, 5), 2),
        (lambda: GPT(vocab=13, d=12, h=7, heads=3, style="written", tied=True), ids(13, 2, 5), 4),
        (lambda: GatedMLP(5, 7), features(2, 5), 2),
        (lambda: FusedAttention(12, 3, 3, kind="timm"), features(2, 4, 12), 2),
        (lambda: nn.Linear(1, 1), features(2, 1), 2),
        (lambda: nn.Embedding(13, 3), ids(13, 2, 3), 4),
    ],
    ids="units-fewer-heads-written-gated-fused-one-rows".split("-"),
)
def test_sizes_that_tp_does_not_divide(build, given, n):
    check(build, given, n)


# ---- ways to write a model


def test_dict_output_and_keyword_only_forward():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, *, x, scale=1.0):
            return {
                "out": self.net(x) * scale,
                "scale": scale,
                "nested": [x, {"y": self.net[0](x)}],
            }

    check(
        Net,
        lambda: {"x": torch.randn(3, 16)},
        2,
        calls=[lambda: {"x": torch.randn(5, 16), "scale": 2.0}],
    )


@dataclass
class Result:
    out: torch.Tensor
    hidden: torch.Tensor | None = None


def test_dataclass_output():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            h = self.a(x).relu()
            return Result(self.b(h), h)

    check(Net, features(3, 8), 2)


def test_module_called_twice():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.fc = mlp(), nn.Linear(16, 16)

        def forward(self, x):
            return self.fc(self.net(self.net(x).relu()))

    check(Net, features(3, 16), 2, share=0.6)


def test_weight_used_outside_its_module():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.net = nn.Embedding(24, 16), mlp()

        def forward(self, ids):
            return F.linear(self.net(self.emb(ids)), self.emb.weight)

    check(Net, ids(24, 2, 3), 2, share=0.6)


def test_childs_weights_used_by_the_parent_only():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            h = torch.addmm(self.a.bias, x, self.a.weight.t()).tanh()
            return h @ self.b.weight.T + self.b.bias

    check(Net, features(3, 8), 2, share=0.6)


def test_parameter_given_to_a_child():
    class Child(nn.Module):
        def forward(self, x, weight, bias):
            return F.linear(x, weight, bias)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.b1 = nn.Parameter(torch.randn(32, 8)), nn.Parameter(torch.randn(32))
            self.w2, self.child = nn.Parameter(torch.randn(8, 32)), Child()

        def forward(self, x):
            return self.child(self.child(x, self.w1, self.b1).relu(), self.w2, bias=None)

    check(Net, features(3, 8), 2, share=0.65)


def test_buffers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)
            self.register_buffer("gain", torch.randn(32))
            self.register_buffer("seen", torch.zeros(32))
            self.register_buffer("calls", torch.tensor(0), persistent=False)

        def forward(self, x):
            self.calls += 1
            h = self.a(x) * self.gain
            if self.training:
                self.seen.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
            return self.b(h)

    check(Net, features(3, 8), 2, calls=[features(3, 8)])


def set_first(h, x):
    h[..., 0] = 1.0


def set_slice(h, x):
    h[..., 4:] = 0


def set_every_other(h, x):
    h[:, ::2] = x.mean()


def add_to_slice(h, x):
    h[:, 3:5] += x[:, :2]


def zero_selected(h, x):
    h.select(-1, 0).zero_()


def zero_narrowed(h, x):
    h.narrow(-1, 0, 4).zero_()


def relu_and_scale(h, x):
    h *= 2
    h.add_(x.mean())
    F.relu(h, inplace=True)


@pytest.mark.parametrize(
    "change",
    [
        set_first,
        set_slice,
        set_every_other,
        add_to_slice,
        zero_selected,
        zero_narrowed,
        relu_and_scale,
    ],
)
def test_in_place_operators(change):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x):
            h = self.a(x) * 1
            change(h, x)
            return self.b(h).add_(x)

    check(Net, features(3, 8), 2)


def test_value_dependent_branch():
    """The other branch, with the same kinds of inputs as the traced one, takes a mean over the
    sharded units."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x):
            h = self.a(x)
            h = h.relu() if x.sum() > 0 else h * h.mean(-1, keepdim=True)
            return self.b(h)

    check(
        Net,
        lambda: (torch.ones(3, 8),),
        2,
        calls=[lambda: (-torch.ones(3, 8),), lambda: (torch.ones(3, 8),)],
    )


def test_branch_on_what_the_weights_give():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 32, bias=False), nn.Linear(32, 8)

        def forward(self, x):
            h = self.a(x)
            h = h.relu() if h.sum() > 0 else h * h.mean(-1, keepdim=True)
            return self.b(h)

    check(Net, lambda: (torch.ones(3, 8),), 2, calls=[lambda: (-torch.ones(3, 8),)])


class Routed(nn.Module):
    def __init__(self, d=16, experts=4):
        super().__init__()
        self.router = nn.Linear(d, experts)
        self.experts = nn.ModuleList(mlp(d, 24) for _ in range(experts))

    def forward(self, x):
        scores = self.router(x).softmax(-1)
        weight, chosen = scores.topk(2, dim=-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            if token.numel():
                out.index_add_(0, token, expert(x[token]) * weight[token, slot, None])
        return out


@pytest.mark.parametrize("n", [2, 4])
def test_router_with_a_list_of_experts(n):
    check(Routed, features(6, 16), n, calls=[features(1, 16), features(20, 16)], share=1 / n + 0.1)


class HeadMean(nn.Module):
    """A mean over heads if asked for: by an argument, a float, or an attribute."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.mean = nn.Linear(8, 32), nn.Linear(32, 8), False

    def forward(self, x, mean=False, strength=0.0):
        h = self.a(x).view(*x.shape[:-1], -1, 8)
        if mean or self.mean or strength > 0.5:
            h = h - h.mean(-2, keepdim=True)
        return self.b(h.flatten(-2))


def test_flag_that_was_not_traced():
    x = torch.randn(3, 8)
    calls = [lambda: {"x": x, "mean": True}, lambda: {"x": x, "mean": False}, lambda: (x, True)]
    check(HeadMean, lambda: {"x": x}, 2, calls=calls)


@pytest.mark.parametrize("how", ["float", "attribute", "length", "type"])
def test_path_that_the_signature_may_miss(how):
    """Right, or a clear RuntimeError; never wrong."""

    class Net(HeadMean):
        def forward(self, x, strength=0.0):
            return super().forward(x, mean=how == "length" and x.shape[0] > 4, strength=strength)

    def ranks(rank):
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        sharded, whole = pair(Net, 2, example_inputs=(x, 0.1))
        compare(sharded, whole, (x, 0.1))
        given = {
            "float": (x, 0.9),
            "attribute": (x, 0.1),
            "length": (x.repeat(3, 1), 0.1),
            "type": (x, 1),
        }[how]
        sharded.mean = whole.mean = how == "attribute"
        try:
            compare(sharded, whole, given)
        except RuntimeError as e:
            assert "path" in str(e) and "example_inputs" in str(e)

    run_ranks(ranks, 2)


@pytest.mark.parametrize("n, style", [(2, "infer"), (2, "written"), (4, "written")])
def test_other_sizes_and_arguments_than_traced(n, style):
    def mask():
        return torch.randint(0, 64, (2, 6)), torch.zeros(2, 1, 6, 6).masked_fill(
            torch.rand(2, 1, 6, 6) < 0.2, -1e9
        )

    def per_head():
        return torch.randint(0, 64, (2, 5)), torch.randn(2, 4, 5, 5)

    calls = [ids(64, 5, 9), ids(64, 1, 1), mask, per_head, ids(64, 2, 6)]
    check(lambda: GPT(style=style), ids(64, 2, 6), n, calls=calls)


class Cache:
    """Keeps what it was given, as a KV cache does."""

    def __init__(self):
        self.kept = None

    def update(self, k):
        self.kept = k if self.kept is None else torch.cat([self.kept, k], 1)
        return self.kept


def test_cache_that_the_forward_fills():
    """Showing a new call right must not touch the caller's cache. Filled, it holds shards, which
    the next call goes on with."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x, cache=None):
            k = self.a(x)
            return self.b((k if cache is None else cache.update(k)).sum(1))

    def then(sharded, whole):
        caches, x = [Cache(), Cache()], torch.ones(2, 3, 8, dtype=torch.float64)
        found, expected = (m(x, cache=c) for m, c in zip((sharded, whole), caches))
        assert torch.allclose(found, expected, rtol=1e-9)
        assert caches[0].kept.shape == (2, 3, 16) and type(caches[0].kept) is torch.Tensor
        with torch.no_grad():
            for length in (3, 1, 2):
                x = torch.randn(
                    2,
                    length,
                    8,
                    dtype=torch.float64,
                    generator=torch.Generator().manual_seed(length),
                )
                same_output(*(m(x, cache=c) for m, c in zip((sharded, whole), caches)))
            again, half = copy.deepcopy(caches[0]), copy.deepcopy(caches[0])
            same_output(sharded(x, cache=again), whole(x, cache=caches[1]))
            half.__dict__.pop("_tp_shards")  # nothing says any more that it is a shard
            with pytest.raises(RuntimeError, match="shards from an earlier call"):
                sharded(x, cache=half)

    check(Net, features(2, 3, 8), 2, then=then)


def test_inputs_made_up():
    check(lambda: GPT(), ids(64, 2, 6), 2, example=False, share=0.55)
    check(ConvNet, features(2, 3, 8, 8), 2, example=False)


def test_inputs_that_cannot_be_made_up():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, a, b):
            return self.net(a["x"]) + b[0]

    with pytest.warns(UserWarning, match="example_inputs"):
        from quintnet_dt import plan_tensor_parallel

        plan_tensor_parallel(Net(), 2)
    check(Net, lambda: ({"x": torch.randn(2, 16)}, [torch.randn(16)]), 2, example=False, share=0.6)


# ---- modes


@pytest.mark.parametrize("style", ["infer", "written"])
def test_dropout_equals_the_whole_models(style):
    def then(sharded, whole):
        sharded.eval(), whole.eval()
        compare(sharded, whole, (torch.arange(10).view(2, 5),))
        compare(sharded, whole, (torch.arange(10).view(2, 5),), grad=False)
        with torch.inference_mode():
            assert torch.allclose(
                sharded(torch.arange(8).view(1, 8)), whole(torch.arange(8).view(1, 8))
            )
        sharded.train(), whole.train()
        compare(sharded, whole, (torch.arange(10).view(2, 5),))

    check(
        lambda: GPT(dropout=0.3, style=style),
        ids(64, 2, 6),
        2,
        calls=[ids(64, 3, 4)],
        share=0.55,
        then=then,
    )


@pytest.mark.parametrize(
    "kind", [nn.Dropout2d, nn.AlphaDropout, nn.RReLU, "functional", "attention", "bernoulli"]
)
def test_other_random_operators(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)
            self.drop = kind(0.4) if isinstance(kind, type) and kind is not nn.RReLU else nn.RReLU()

        def forward(self, x):
            h = self.a(x)
            if kind == "functional":
                h = torch.dropout(h, 0.4, self.training)
                h = F.dropout(input=h, p=0.4, training=self.training)
                h = torch.nn.functional.dropout(h.transpose(0, 1), 0.4, self.training).transpose(
                    0, 1
                )
            elif kind == "attention":
                h = h.view(h.shape[0], h.shape[1], 4, 8).transpose(1, 2)
                h = F.scaled_dot_product_attention(h, h, h, dropout_p=0.4)
                h = h.transpose(1, 2).flatten(2)
            elif kind == "bernoulli":
                h = h * torch.bernoulli(torch.full_like(h, 0.5)) * (
                    torch.rand_like(h) > 0.3
                ) + torch.randn(h.shape)
            else:
                h = self.drop(h)
            return self.b(h)

    check(Net, features(2, 6, 8), 2)


def test_eval_after_train_with_batch_norm():
    def then(sharded, whole):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        for train in (False, True, False):
            sharded.train(train), whole.train(train)
            compare(sharded, whole, (x,))

    check(ConvNet, features(2, 3, 8, 8), 2, then=then)


def test_frozen_parameters_and_no_grad():
    def half():
        model = GPT(norm=True)
        for p in [*model.wte.parameters(), *model.blocks[0].attn.parameters()]:
            p.requires_grad_(False)
        return model

    def all_frozen():
        return GPT(norm=True).requires_grad_(False)

    check(half, ids(64, 2, 6), 2, share=0.55)
    check(all_frozen, ids(64, 2, 6), 2, grad=False, share=0.55)


@pytest.mark.parametrize("called_before", [False, True])
def test_thawed_after_it_was_sharded(called_before):
    def ranks(rank):
        x = torch.arange(12).view(2, 6)
        sharded, whole = pair(lambda: GPT(norm=True).requires_grad_(False), 2, example_inputs=(x,))
        if called_before:
            compare(sharded, whole, (x,), grad=False)
        sharded.requires_grad_(), whole.requires_grad_()
        compare(sharded, whole, (x,))

    run_ranks(ranks, 2)


def test_adapters_on_a_frozen_model():
    class LoRA(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base.requires_grad_(False)
            self.a, self.b = nn.Linear(base.in_features, 4, bias=False), nn.Linear(
                4, base.out_features, bias=False
            )

        def forward(self, x):
            return self.base(x) + self.b(self.a(x))

    def build():
        model = GPT().requires_grad_(False)
        for block in model.blocks:
            for name in "qvo":
                setattr(block.attn, name, LoRA(getattr(block.attn, name)))
        return model

    check(build, ids(64, 2, 6), 2, share=0.6)


def test_hooks_that_are_there_already():
    """A hook of the user's may change inputs and outputs, and runs once a call."""

    def build():
        model = nn.Sequential(mlp(), nn.Linear(16, 8))
        model.register_forward_pre_hook(lambda m, args: (args[0].flatten(1),))
        model[0][0].register_forward_hook(lambda m, args, out: out * 2)
        model[0].register_forward_pre_hook(
            lambda m, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True
        )
        model.count = []
        model.register_forward_hook(lambda m, args, out: m.count.append(1))
        return model

    def then(sharded, whole):
        assert len(sharded.count) == len(whole.count)

    calls = [features(5, 4, 4), features(1, 4, 4)]
    check(build, features(3, 4, 4), 2, share=0.6, calls=calls, then=then)


def test_hook_that_changes_the_kind_of_input():
    def build():
        model = mlp()
        model.register_forward_pre_hook(lambda m, args: (torch.stack(args[0], -1),))
        return model

    def given():
        return ([torch.randn(3) for _ in range(16)],)

    check(build, given, 2, calls=[lambda: ([torch.randn(1) for _ in range(16)],)])


def test_copy_and_reload_of_a_sharded_model():
    import copy

    def then(sharded, whole):
        again = copy.deepcopy(sharded)
        again.tensor_parallel_mesh = sharded.tensor_parallel_mesh
        compare(again, whole, (torch.randn(2, 16, generator=torch.Generator().manual_seed(0)),))
        with torch.no_grad():
            for model in (again, whole):
                for p in model.parameters():
                    p.mul_(1.5)
        sharded.load_state_dict(again.state_dict())
        compare(sharded, whole, (torch.ones(2, 16),))

    check(mlp, features(3, 16), 2, then=then)


def test_after_an_exception_the_model_still_works():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x, fail=False):
            h = self.a(x).view(x.shape[0], 4, 8)
            if fail:
                raise KeyError("in the middle")
            return self.b(h.reshape(x.shape[0], 32))

    def then(sharded, whole):
        for _ in range(2):
            with pytest.raises(KeyError):
                sharded(torch.ones(2, 8).double(), fail=True)
        with pytest.raises(RuntimeError):
            sharded(torch.ones(2, 9).double())
        compare(sharded, whole, (torch.ones(2, 8),))

    check(Net, features(3, 8), 2, then=then)


# ---- meshes and sources


def test_submesh_and_process_group_manager():
    def ranks(rank):
        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(rank // 2))
        for tp in (
            init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["tp"],
            ProcessGroupManager(tp_size=2),
        ):
            sharded, whole = pair(mlp, tp, example_inputs=(x.double(),))
            assert sharded.tensor_parallel_mesh.size() == 2 and share_of(sharded) < 0.6
            compare(sharded, whole, (x,))
        sharded, whole = pair(mlp, 2)
        compare(sharded, whole, (x,))
        dp = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "dp"))[
            "tp"
        ]  # ranks 0 and 2, 1 and 3
        sharded, whole = pair(lambda: GPT(), dp)
        compare(sharded, whole, (torch.arange(6).view(2, 3),))

    run_ranks(ranks, 4)


@pytest.mark.parametrize("source", [0, 1])
def test_weights_come_from_the_source_rank(source):
    def ranks(rank):
        def build():
            torch.manual_seed(100 + rank % 2)  # seeds differ within a tp group
            model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 5))
            model[1].running_mean.normal_()
            return model.double().eval()

        torch.manual_seed(0)
        model = apply_tensor_parallel(build(), 2, src_data_rank=source)
        rank = source  # what the other rank built
        whole = build()
        there = model.state_dict()
        for name, t in whole.state_dict().items():
            found = (
                there[name].full_tensor() if hasattr(there[name], "full_tensor") else there[name]
            )
            assert torch.equal(found, t), name
        compare(model, whole, (torch.ones(2, 6),))

    run_ranks(ranks, 4)


def test_no_source_takes_local_slices():
    def ranks(rank):
        torch.manual_seed(rank)
        whole = mlp()
        state = {k: v.clone() for k, v in whole.state_dict().items()}
        model = apply_tensor_parallel(
            whole, 2, src_data_rank=None, example_inputs=(torch.ones(2, 16),)
        )
        for name, p in model.named_parameters():
            placement = p.placements[0]
            mine = (
                state[name].chunk(2, placement.dim)[rank] if placement.is_shard() else state[name]
            )
            assert torch.equal(p.to_local(), mine), name

    run_ranks(ranks, 2)


def test_users_plan_wins(n=2):
    plan = {
        "blocks.0.attn.q.weight": Replicate(),
        "blocks.0.attn.o.weight": Shard(0),
        "blocks.0.mlp.0.weight": Shard(1),
        "wte.weight": Shard(1),
        "norm.weight": Shard(0),
        "blocks.0.mlp.3.bias": Shard(0),
        "head.weight": Replicate(),
    }

    def then(sharded, whole):
        found = {name: p.placements[0] for name, p in sharded.named_parameters() if name in plan}
        assert found == plan

    check(GPT, ids(64, 2, 6), n, plan=plan, then=then, calls=[ids(64, 1, 4)])
