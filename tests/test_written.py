"""Models as people write them: many small ones, several to a launch, each against the whole model
over several calls."""

import copy
from collections import namedtuple
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import compare, double, pair, share_of
from ranks import run_ranks
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

CASES = {}  # group -> {name: (build, calls, options)}


def model(group, given, *calls, local=False):
    """Register a module class: `given` makes the example inputs, each of `calls` other ones, or
    (inputs, mode). `local`: some of it computes on shards."""

    def add(build):
        CASES.setdefault(group, {})[build.__name__] = (build, (given, *calls), local)
        return build

    return add


def run_models(group, n):
    """Every model of a group on n ranks: outputs, gradients and buffers of each call."""

    def ranks(rank):
        for name, (build, calls, local) in CASES[group].items():
            torch.manual_seed(3)
            calls = [c if isinstance(c, tuple) else (c, "train") for c in calls]
            calls = [(double(f()), mode) for f, mode in calls]
            at = "set-up"
            try:
                sharded, whole = pair(build, n, example_inputs=copy.deepcopy(calls[0][0]))
                assert share_of(sharded) <= 1 / n + 0.1, f"holds {share_of(sharded):.1%}"
                hows = {e.how for e in sharded.tensor_parallel_plan.entries.values()}
                assert not local or any(
                    e.units for e in sharded.tensor_parallel_plan.entries.values()
                ), hows
                for i, (given, mode) in enumerate(calls):
                    at = f"call {i}, {mode}"
                    sharded.train(mode == "train"), whole.train(mode == "train")
                    compare(sharded, whole, given, grad=mode != "no_grad")
            except Exception as e:
                raise AssertionError(f"{name}, {at}: {type(e).__name__}: {e}") from e

    run_ranks(ranks, n, timeout=240)


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize(
    "group", ["shared", "in_place", "buffers", "parameters", "gradients", "functional"]
)
def test_models(group, n):
    run_models(group, n)


def rows(*shape):
    return lambda: (torch.randn(*shape),)


def ids(rows, *shape):
    return lambda: (torch.randint(0, rows, shape),)


X, Y = rows(2, 6, 16), rows(3, 4, 16)
IDS, MORE_IDS = ids(48, 2, 7), ids(48, 3, 5)


def mlp(d=16, h=32, o=None):
    return nn.Sequential(nn.Linear(d, h), nn.GELU(), nn.Linear(h, o or d))


def heads(x):
    return x.unflatten(-1, (4, 4)).transpose(1, 2)


def attend(q, k, v, **options):
    return (
        F.scaled_dot_product_attention(heads(q), heads(k), heads(v), **options)
        .transpose(1, 2)
        .flatten(2)
    )


class Net(nn.Module):
    """Submodules and parameters by keyword."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if torch.is_tensor(part) else part)


# ---- modules and weights used more than once


@model("shared", X, Y, local=True)
class TwiceInDifferentShapes(Net):
    def __init__(self):
        super().__init__(f=mlp())

    def forward(self, x):
        y = self.f(x)
        return y + self.f(torch.stack([x, y, x * 2])).mean(0)


@model("shared", X, Y, local=True)
class SharedByTwoParents(Net):
    def __init__(self):
        inner = nn.Linear(32, 32)
        a = nn.Sequential(nn.Linear(16, 32), nn.GELU(), inner, nn.GELU(), nn.Linear(32, 16))
        super().__init__(
            a=a, b=nn.Sequential(nn.Linear(16, 32), nn.Tanh(), inner, nn.Tanh(), nn.Linear(32, 16))
        )

    def forward(self, x):
        return self.b(self.a(x)) + x


@model("shared", IDS, MORE_IDS, local=True)
class WeightsUsedOutside(Net):
    def __init__(self):
        super().__init__(e=nn.Embedding(48, 16), c=nn.Linear(16, 32), f=mlp())

    def forward(self, i):
        x = self.f(self.e(i))
        return (
            F.linear(x, self.e.weight),
            x @ self.e.weight.t(),
            x @ self.c.weight[:8].T + self.c.bias[:8],
            self.c(x),
        )


@model("shared", IDS, MORE_IDS, local=True)
class TiedInThreePlaces(Net):
    def __init__(self):
        super().__init__(
            a=nn.Embedding(48, 16), b=nn.Embedding(48, 16), h=nn.Linear(16, 48, bias=False), f=mlp()
        )
        self.h.weight = self.b.weight = self.a.weight

    def forward(self, i):
        return self.h(self.f(self.a(i)) + self.b(i.flip(1)))


@model("shared", X, Y, (X, "eval"), local=True)
class OneDropoutOneActivation(Net):
    """Inside a region and outside of it."""

    def __init__(self):
        parts = dict(
            qkv=nn.Linear(16, 48), o=nn.Linear(16, 16), up=nn.Linear(16, 32), down=nn.Linear(32, 16)
        )
        super().__init__(**parts, drop=nn.Dropout(0.2), act=nn.PReLU())

    def forward(self, x):
        q, k, v = map(heads, self.qkv(x).chunk(3, -1))
        x = x + self.drop(
            self.o((self.drop((q @ k.mT).softmax(-1)) @ v).transpose(1, 2).flatten(2))
        )
        return self.act(x + self.drop(self.down(self.drop(self.act(self.up(x))))))


@model("shared", X, Y, local=True)
class RecurrentCell(Net):
    def __init__(self):
        super().__init__(i=nn.Linear(16, 32), h=nn.Linear(16, 32, bias=False), o=nn.Linear(32, 16))

    def forward(self, x):
        h, out = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = self.o(torch.tanh(self.i(x[:, t]) + self.h(h)))
            out.append(h)
        return torch.stack(out, 1)


# ---- in-place operators, kinds of arguments and outputs


@model("in_place", X, Y)
class WritesInPlace(Net):
    def __init__(self):
        super().__init__(a=nn.Linear(16, 32), b=nn.Linear(32, 16), c=nn.Linear(16, 32))

    def forward(self, x):
        h = self.a(x)
        part = h[..., :16]
        part *= 2
        h = h.clone()
        h[:, 1:].add_(self.c(x)[:, :-1])
        h[..., 0] = 1.0
        h.view(-1, 4, 8)[:, 0].zero_()
        h.masked_fill_(h > 3, 0.5)
        y = self.b(F.relu(h, inplace=True))
        y[0] += 1
        x = x.clone()
        x += y
        return x.clamp_(min=-1)


Point = namedtuple("Point", "inner rest more")


@dataclass
class Out:
    logits: torch.Tensor
    hidden: tuple = ()
    extra: object = None


@model("in_place", X, Y, local=True)
class NestedOutputs(Net):
    """That alias the input and each other, are None, are no tensors."""

    def __init__(self):
        super().__init__(f=mlp(), g=nn.Linear(16, 48))

    def forward(self, x):
        h = self.f(x)
        y = self.g(h)
        return Point(
            Out(y, (h, h, x, [y, {"k": (y[0], None)}])),
            {"h": h.view(-1), "x": x},
            ("s", 3, None, y.shape[0]),
        )


class Inner(Net):
    def __init__(self):
        super().__init__(a=nn.Linear(16, 32), c=nn.Linear(16, 32))

    def forward(self, d, *, scale):
        d["seen"] = h = self.a(d["x"][0])
        return Out(h, (self.c(d["x"][0]), None), extra={"list": [h * scale, h]})


def any_way(*names):
    return lambda: {name: torch.randn(2, 16) for name in names}


@model(
    "in_place",
    any_way("x", "scale"),
    any_way("scale", "x"),
    any_way("x", "scale", "y", "z"),
    local=True,
)
class KeywordsOnly(Net):
    def __init__(self):
        super().__init__(i=Inner(), b=nn.Linear(32, 16), g=mlp())

    def forward(self, *, x, **others):
        o = self.i({"x": (x,)}, scale=2.0)
        y = self.b(o.logits + o.hidden[0] + o.extra["list"][0])
        return {"y": y + sum(self.g(z) for z in others.values()), "n": len(others), "none": None}


# ---- buffers


@model("buffers", rows(2, 5, 16), rows(3, 7, 16), (rows(3, 9, 16), "eval"), local=True)
class Caches(Net):
    """A bias for each head, a registered mask, a rotary cache that grows."""

    def __init__(self):
        super().__init__(qkv=nn.Linear(16, 48), o=nn.Linear(16, 16))
        self.register_buffer("slopes", torch.arange(1.0, 5.0))
        self.register_buffer("more", torch.arange(4.0)[:, None, None], persistent=False)
        self.register_buffer("mask", torch.tril(torch.ones(16, 16)).bool()[None, None])
        self.register_buffer("inv", 1 / 10 ** (torch.arange(0, 4, 2) / 4), persistent=False)
        self.cache = None

    def turn(self, x):
        t = x.shape[2]
        if self.cache is None or len(self.cache[0]) < t:
            angles = torch.outer(torch.arange(t), self.inv)
            self.cache = angles.cos(), angles.sin()
        c, s, a, b = *(f[:t] for f in self.cache), x[..., ::2], x[..., 1::2]
        return torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2)

    def forward(self, x):
        t = x.shape[1]
        q, k, v = map(heads, self.qkv(x).chunk(3, -1))
        s = self.turn(q) @ self.turn(k).mT + self.more
        s = s + self.slopes.view(1, 4, 1, 1) * (torch.arange(t) - torch.arange(t)[:, None])
        s = s.masked_fill(~self.mask[:, :, :t, :t], float("-inf"))
        return self.o((s.softmax(-1) @ v).transpose(1, 2).flatten(2))


def updates(kind):
    @model("buffers", X, Y, (X, "eval"), Y, (Y, "no_grad"))
    class Updates(Net):
        def __init__(self):
            super().__init__(a=nn.Linear(16, 32), b=nn.Linear(32, 16))
            self.register_buffer("mean", torch.zeros(32))

        def forward(self, x):
            h = self.a(x)
            new = h.detach().mean((0, 1))
            if self.training and kind == "in place":
                self.mean.mul_(0.9).add_(new, alpha=0.1)
            elif self.training and kind == "replaced":
                self.mean = 0.9 * self.mean + 0.1 * new
            elif self.training:
                self.mean.data.copy_(0.9 * self.mean + 0.1 * new)
            return self.b(F.gelu(h - self.mean))

    CASES["buffers"][f"Updates, {kind}"] = CASES["buffers"].pop("Updates")


for kind in "in place", "replaced", "data":
    updates(kind)


# ---- parameters


@model("parameters", X, Y)
class OddParameters(Net):
    """In lists and dicts, on the root; of no dim, one element, none; complex; not contiguous."""

    def __init__(self):
        w, c = torch.randn, partial(torch.randn, dtype=torch.cdouble)
        super().__init__(
            w=w(16, 16),
            s=torch.tensor(1.5),
            one=w(1),
            none=torch.zeros(0, 16),
            c=c(16, 32),
            d=c(32, 16),
        )
        self.list = nn.ParameterList([w(16, 32), w(32, 16), w(16)])
        self.dict = nn.ParameterDict({"u": nn.Parameter(w(16, 64)), "v": nn.Parameter(w(64, 16))})
        self.t, self.u = nn.Parameter(w(64, 16).t()), nn.Parameter(w(16, 64).t())

    def forward(self, x):
        x = (
            torch.tanh(x @ self.list[0]) @ self.list[1]
            + self.list[2]
            + sum(w.sum() for w in self.list) * 0.01
        )
        x = F.silu(x @ self.dict["u"]) @ self.dict["v"] @ self.w * self.s + self.one
        x = torch.cat([x.flatten(0, -2), self.none])
        z = x.to(self.c.dtype) @ self.c
        return F.linear(torch.relu(F.linear(x, self.u)), self.t) + ((z * z.abs()) @ self.d).real


class Adapted(Net):
    """Low-rank matrices beside a frozen layer."""

    def __init__(self, base):
        lora = nn.Linear(base.in_features, 4, bias=False), nn.Linear(
            4, base.out_features, bias=False
        )
        super().__init__(
            base=base.requires_grad_(False), a=lora[0], b=lora[1], drop=nn.Dropout(0.1)
        )

    def forward(self, x):
        return self.base(x) + self.b(self.a(self.drop(x))) * 2


@model("parameters", X, Y, (X, "eval"), (Y, "no_grad"), local=True)
class Adapters(Net):
    def __init__(self):
        super().__init__(
            f=nn.Sequential(Adapted(nn.Linear(16, 32)), nn.GELU(), Adapted(nn.Linear(32, 16))),
            g=mlp(),
        )
        self.g[0].bias.requires_grad_(False)
        self.v, self.m = nn.Linear(16, 32).requires_grad_(False), nn.Parameter(torch.rand(32))
        self.A, self.B, self.o = (
            nn.Parameter(torch.randn(4, 16)),
            nn.Parameter(torch.randn(32, 4)),
            nn.Linear(32, 16),
        )

    def forward(self, x):
        w = self.v.weight + self.B @ self.A
        w = self.m[:, None] * w / w.norm(dim=1, keepdim=True).detach()
        return self.f(x) + self.g(x) + self.o(F.silu(F.linear(x, w, self.v.bias)))


def reparametrized(name, change):
    class Reparametrized(Net):
        def __init__(self):
            super().__init__(f=mlp(), g=mlp())
            change(self.f[0]), change(self.f[2])

        def forward(self, x):
            return self.g(self.f(x))

    Reparametrized.__name__ = name
    model("parameters", X, (Y, "eval"), Y)(Reparametrized)


for kind in "weight_norm", "spectral_norm", "orthogonal":
    reparametrized(kind, getattr(parametrizations, kind))
reparametrized("old spectral_norm", nn.utils.spectral_norm)


@model("parameters", X, Y)
class StandardizedAndMasked(Net):
    def __init__(self):
        super().__init__(
            a=nn.Linear(16, 32),
            b=nn.Linear(32, 16),
            g=torch.randn(32, 1),
            clipped=torch.tensor(3.0),
        )
        self.register_buffer("mask", (torch.randn(16, 32) > 0).float())

    def forward(self, x):
        self.clipped.data.clamp_(max=2)
        w = self.a.weight
        w = (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True) * self.g
        return (
            F.linear(F.gelu(F.linear(x, w, self.a.bias)), self.b.weight * self.mask, self.b.bias)
            * self.clipped
        )


# ---- gradients that are more than autograd's of the operators


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w.t(), x.flatten(0, -2).t() @ grad.flatten(0, -2)


class Normed(torch.autograd.Function):
    """A backward that looks at the whole gradient; decorated, as for autocast."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad):
        return grad / grad.norm() * grad.shape[-1]


@model("gradients", X, Y)
class CustomFunctions(Net):
    def __init__(self):
        super().__init__(
            f=mlp(),
            a=nn.Linear(16, 32),
            b=nn.Linear(32, 16),
            w=torch.randn(16, 32),
            v=torch.randn(32, 16),
        )

    def forward(self, x):
        x = Product.apply(F.gelu(Product.apply(self.f(x), self.w)), self.v)
        return self.b(Normed.apply(self.a(x)))


@model("gradients", X, Y, (X, "no_grad"))
class HooksOnTensors(Net):
    def __init__(self):
        super().__init__(
            e=nn.Linear(16, 16), a=nn.Linear(16, 32), b=nn.Linear(32, 16), n=nn.LayerNorm(16)
        )

    def forward(self, x):
        h = self.n(self.e(x))
        g = self.a(h)
        y = self.b(F.gelu(g)) + self.b(F.gelu(self.a(h * 2)))
        for t in (t for t in (h, g, y) if t.requires_grad):
            t.register_hook(lambda grad: grad / (grad.norm() + 1))
        return y


@model("gradients", X, Y)
class HooksOnModules(Net):
    def __init__(self):
        super().__init__(e=nn.Linear(16, 16), f=mlp(), g=mlp())
        self.f[0].register_forward_hook(lambda m, args, out: out / out.norm())
        self.f[2].register_forward_pre_hook(
            lambda m, args: (args[0] - args[0].mean(-1, keepdim=True),)
        )
        self.f.register_full_backward_hook(lambda m, grads, out: (grads[0] / grads[0].norm(),))
        self.g[0].register_full_backward_hook(lambda m, grads, out: (grads[0] * out[0].norm(),))
        self.g[2].register_full_backward_pre_hook(lambda m, out: (out[0] / out[0].norm(),))

    def forward(self, x):
        return self.g(self.f(self.e(x)))


class Block(Net):
    """Checkpoints functions of its own, which run again while it does not."""

    def __init__(self, reentrant):
        super().__init__(
            n=nn.LayerNorm(16),
            qkv=nn.Linear(16, 48),
            o=nn.Linear(16, 16),
            f=mlp(),
            s=nn.Linear(16, 32),
        )
        self.again = partial(checkpoint, use_reentrant=reentrant)

    def first(self, x):
        return self.o(attend(*self.qkv(self.n(x)).chunk(3, -1)))

    def second(self, x, scale):
        return self.f[2](torch.tanh(self.f[0](x)) * scale.mean(-1, keepdim=True))

    def forward(self, x):
        x = x + self.again(self.first, x)
        return x + self.again(self.second, x, self.s(x)) + self.again(self.f, x)


@model("gradients", X, (Y, "eval"))
class Checkpoints(Net):
    def __init__(self):
        super().__init__(e=nn.Linear(16, 16), a=Block(True), b=Block(False))

    def forward(self, x):
        return self.b(self.a(self.e(x)))


@model("gradients", X, Y, local=True)
class Forces(Net):
    """A gradient taken within the forward, differentiated again; parts without gradients;
    losses."""

    def __init__(self):
        super().__init__(
            f=nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1)),
            g=mlp(),
            t=mlp(),
            o=nn.Linear(16, 64),
        )

    def forward(self, x):
        with torch.no_grad():
            target = self.t(x)
        y = self.g(x)
        loss = F.mse_loss(self.g(y.detach()), target) + (self.o(y).detach() * self.o(y)).mean()
        x = x.detach().requires_grad_()
        energy = self.f(x).sum()
        return energy, -torch.autograd.grad(energy, x, create_graph=True)[0], loss


# ---- functional style


@model("functional", X, Y, local=True)
class Einsums(Net):
    """Attention on the root's own parameters, with sinks and a scale for each head."""

    def __init__(self, h=4):
        parts = {name: torch.randn(h, 16, 4) / 4 for name in "qkv"}
        super().__init__(
            **parts, o=torch.randn(h, 4, 16) / 4, sink=torch.randn(h), scale=torch.ones(h, 1, 1)
        )

    def forward(self, x):
        q, k, v = (torch.einsum("btd,hde->bthe", x, w) for w in (self.q, self.k, self.v))
        s = torch.einsum("bthd,bshd->bhts", q, k) * self.scale.exp()
        s = torch.cat([s, self.sink[None, :, None, None].expand(s.shape[0], -1, s.shape[2], 1)], -1)
        y = torch.einsum("bhts,bshe,hed->btd", s.softmax(-1)[..., :-1], v, self.o)
        x = x[:, None]
        return y + ((x @ self.q @ (x @ self.k).mT).softmax(-1) @ (x @ self.v) @ self.o).sum(1)


@model("functional", rows(2, 8, 16), rows(3, 8, 16), local=True)
class PositionBiases(Net):
    """A table of relative positions, ALiBi's slopes learned, cosine similarity, grouped queries."""

    def __init__(self):
        super().__init__(
            qkv=nn.Linear(16, 48),
            o=nn.Linear(16, 16),
            table=torch.randn(15, 4),
            slopes=torch.randn(4),
        )
        self.at, self.scale = nn.Embedding(8, 4), nn.Parameter(torch.zeros(4, 1, 1))
        self.gq, self.gkv = nn.Linear(16, 32), nn.Linear(16, 32)
        self.go = nn.Linear(32, 16)

    def forward(self, x):
        far = torch.arange(x.shape[1]) - torch.arange(x.shape[1])[:, None]
        q, k, v = map(heads, self.qkv(x).chunk(3, -1))
        s = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.scale.clamp(max=4).exp()
        s = s + self.table[(far + 7).view(-1)].view(*far.shape, -1).permute(2, 0, 1)
        s = s + self.at(far.clamp(-4, 3) + 4).permute(2, 0, 1) + far * self.slopes[:, None, None]
        x = x + self.o((s.softmax(-1) @ v).transpose(1, 2).flatten(2))
        q, k, v = (
            t.unflatten(-1, (-1, 4)).transpose(1, 2)
            for t in (self.gq(x), *self.gkv(x).chunk(2, -1))
        )
        return self.go(
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            .transpose(1, 2)
            .flatten(2)
        )


@model("functional", X, Y, local=True)
class SizesOfItsOwn(Net):
    """Attention whose head size is computed from the projection's own size, as einops does, and the
    other way round; heads at the front and in the middle."""

    def __init__(self, h=4):
        super().__init__(
            q=nn.Linear(16, 32), k=nn.Linear(16, 32), v=nn.Linear(16, 32), o=nn.Linear(32, 16)
        )
        self.h = h

    def forward(self, x):
        for view in self.by_view, self.by_unflatten, self.by_dim:
            q, k, v = (view(layer(x)) for layer in (self.q, self.k, self.v))
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            x = x + self.o(y.reshape(*y.shape[:2], y.shape[2] * y.shape[3]))
        return x

    def by_view(self, y):
        return y.reshape(y.shape[0], y.shape[1], self.h, y.shape[-1] // self.h).permute(0, 2, 1, 3)

    def by_unflatten(self, y):
        return y.unflatten(-1, (self.h, y.shape[-1] // self.h)).transpose(1, 2)

    def by_dim(self, y):
        return y.view(*y.shape[:2], -1, 32 // self.h).transpose(1, 2)


class Apply(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *args):
        return self.f(*args)


@model("functional", X, Y, local=True)
class LambdasAndMaps(Net):
    def __init__(self):
        f = nn.Sequential(
            nn.Linear(16, 32),
            Apply(torch.tanh),
            Apply(partial(F.gelu, approximate="tanh")),
            nn.Linear(32, 16),
        )
        super().__init__(
            f=f, g=mlp(), w=torch.randn(4, 16, 8), v=torch.randn(4, 8, 16), mix=torch.randn(3)
        )
        self.h = nn.Sequential(
            Apply(lambda x: self.g(x)), Apply(lambda x: x * 2)
        )  # the model's own part

    def forward(self, x):
        y = torch.vmap(lambda w, v: torch.tanh(x @ w) @ v)(self.w, self.v)
        layers = [self.f(x), self.h(x), y.sum(0)]
        return sum(w * t for w, t in zip(self.mix.softmax(0), layers)), torch.stack(layers).mean(0)


@model("functional", X, Y, local=True)
class ConditionedScan(Net):
    """A state space, its sizes split unequally, its steps in Python; shift and scale from a
    condition; a net that makes weights."""

    def __init__(self, i=32, s=4):
        super().__init__(
            a=torch.rand(i, s), d=torch.randn(i), x=nn.Linear(i, 2 + 2 * s), dt=nn.Linear(2, i)
        )
        self.inp, self.out, self.c, self.w = (
            nn.Linear(16, 2 * i),
            nn.Linear(i, 16),
            nn.Linear(16, 2 * i),
            mlp(o=64),
        )
        self.conv, self.s = nn.Conv1d(i, i, 3, groups=i, padding=2), s

    def forward(self, x):
        x = F.linear(x, self.w(x.mean((0, 1))).view(16, 4).sum(1, keepdim=True).expand(16, 16))
        scale, shift = self.c(x.mean(1, keepdim=True)).chunk(2, -1)
        x, z = self.inp(x).chunk(2, -1)
        x = F.silu(self.conv(x.mT)[..., : x.shape[1]].mT) * (1 + scale) + shift
        dt, b, c = self.x(x).split([2, self.s, self.s], -1)
        dt, h, out = F.softplus(self.dt(dt)), x.new_zeros(len(x), x.shape[2], self.s), []
        for k in range(x.shape[1]):
            h = (
                h * torch.exp(-dt[:, k, :, None] * self.a.exp())
                + (dt * x)[:, k, :, None] * b[:, k, None]
            )
            out.append((h * c[:, k, None]).sum(-1))
        return self.out((torch.stack(out, 1) + x * self.d) * F.silu(z))
