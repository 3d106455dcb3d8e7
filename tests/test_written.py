"""Models as people write them: modules used twice, writes in place, nested outputs,
buffers, odd parameters."""

from collections import namedtuple
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from models.written import (
    CASES,
    IDS,
    MORE_IDS,
    Net,
    X,
    Y,
    heads,
    mlp,
    model,
    rows,
    run_models,
)
from torch import nn
from torch.nn.utils import parametrizations


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("group", ["shared", "in_place", "buffers", "parameters"])
def test_models(group, n):
    run_models(group, n)


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
        a = nn.Sequential(
            nn.Linear(16, 32), nn.GELU(), inner, nn.GELU(), nn.Linear(32, 16)
        )
        super().__init__(
            a=a,
            b=nn.Sequential(
                nn.Linear(16, 32), nn.Tanh(), inner, nn.Tanh(), nn.Linear(32, 16)
            ),
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
            a=nn.Embedding(48, 16),
            b=nn.Embedding(48, 16),
            h=nn.Linear(16, 48, bias=False),
            f=mlp(),
        )
        self.h.weight = self.b.weight = self.a.weight

    def forward(self, i):
        return self.h(self.f(self.a(i)) + self.b(i.flip(1)))


@model("shared", X, Y, (X, "eval"), local=True)
class OneDropoutOneActivation(Net):
    """Inside a region and outside of it."""

    def __init__(self):
        parts = dict(
            qkv=nn.Linear(16, 48),
            o=nn.Linear(16, 16),
            up=nn.Linear(16, 32),
            down=nn.Linear(32, 16),
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
        super().__init__(
            i=nn.Linear(16, 32), h=nn.Linear(16, 32, bias=False), o=nn.Linear(32, 16)
        )

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
        return {
            "y": y + sum(self.g(z) for z in others.values()),
            "n": len(others),
            "none": None,
        }


# ---- buffers


@model("buffers", rows(2, 5, 16), rows(3, 7, 16), (rows(3, 9, 16), "eval"), local=True)
class Caches(Net):
    """A bias for each head, a registered mask, a rotary cache that grows."""

    def __init__(self):
        super().__init__(qkv=nn.Linear(16, 48), o=nn.Linear(16, 16))
        self.register_buffer("slopes", torch.arange(1.0, 5.0))
        self.register_buffer("more", torch.arange(4.0)[:, None, None], persistent=False)
        self.register_buffer("mask", torch.tril(torch.ones(16, 16)).bool()[None, None])
        self.register_buffer(
            "inv", 1 / 10 ** (torch.arange(0, 4, 2) / 4), persistent=False
        )
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
        s = s + self.slopes.view(1, 4, 1, 1) * (
            torch.arange(t) - torch.arange(t)[:, None]
        )
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
    """In lists and dicts, on the root; of no dim, one element, none; complex; not
    contiguous."""

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
        self.dict = nn.ParameterDict(
            {"u": nn.Parameter(w(16, 64)), "v": nn.Parameter(w(64, 16))}
        )
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
        return (
            F.linear(torch.relu(F.linear(x, self.u)), self.t)
            + ((z * z.abs()) @ self.d).real
        )


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
            f=nn.Sequential(
                Adapted(nn.Linear(16, 32)), nn.GELU(), Adapted(nn.Linear(32, 16))
            ),
            g=mlp(),
        )
        self.g[0].bias.requires_grad_(False)
        self.v, self.m = nn.Linear(16, 32).requires_grad_(False), nn.Parameter(
            torch.rand(32)
        )
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
            F.linear(
                F.gelu(F.linear(x, w, self.a.bias)),
                self.b.weight * self.mask,
                self.b.bias,
            )
            * self.clipped
        )
