"""Models as people write them: mixtures of experts, and forwards that take other paths
than the one that was traced."""

import pytest
import torch
import torch.nn.functional as F
from models.written import Net, X, Y, heads, mlp, model, rows, run_models
from torch import nn


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("group", ["experts", "paths"])
def test_models(group, n):
    run_models(group, n)


# ---- mixtures of experts


class Expert(Net):
    def __init__(self):
        super().__init__(
            up=nn.Linear(16, 32), gate=nn.Linear(16, 32), down=nn.Linear(32, 16)
        )

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Experts(Net):
    def __init__(self):
        super().__init__(
            gate=nn.Linear(16, 4), experts=nn.ModuleList(Expert() for _ in range(4))
        )

    def forward(self, x):
        flat = x.reshape(-1, 16)
        weights, chosen = self.gate(flat).softmax(-1).topk(2, -1)
        return self.mix(flat, weights / weights.sum(-1, keepdim=True), chosen).view_as(
            x
        )


@model("experts", X, rows(1, 1, 16), Y, local=True)
class ByWhere(Experts):
    def mix(self, x, weights, chosen):
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, k = torch.where(chosen == i)
            if rows.numel():
                out.index_add_(0, rows, expert(x[rows]) * weights[rows, k, None])
        return out


@model("experts", X, Y, local=True)
class ByNonzero(Experts):
    def mix(self, x, weights, chosen):
        out, mask = torch.zeros_like(x), F.one_hot(chosen, 4).permute(2, 1, 0)
        for i in (mask.sum((-1, -2)) > 0).nonzero().flatten().tolist():
            k, rows = torch.where(mask[i])
            out[rows] += (
                self.experts[i](x[None, rows].reshape(-1, 16)) * weights[rows, k, None]
            )
        return out


@model("experts", X, Y, local=True)
class BySorting(Experts):
    def mix(self, x, weights, chosen):
        order, counts = (
            chosen.flatten().argsort(),
            torch.bincount(chosen.flatten(), minlength=4).tolist(),
        )
        parts = x[order // 2].split(counts)
        y = torch.cat([e(t) for e, t in zip(self.experts, parts)])
        return (
            torch.empty_like(y).index_copy(0, order, y).view(*chosen.shape, -1)
            * weights[..., None]
        ).sum(1)


@model("experts", X, Y, local=True)
class InOneTensor(Net):
    def __init__(self):
        super().__init__(
            gate=nn.Linear(16, 4),
            up=torch.randn(4, 16, 64) / 4,
            down=torch.randn(4, 32, 16) / 4,
            b=torch.randn(4, 16),
        )

    def forward(self, x):
        p = self.gate(x.reshape(-1, 16)).softmax(-1)
        w, chosen = p.topk(2, -1)
        routed = torch.zeros_like(p).scatter(1, chosen, w)
        g, u = torch.bmm(x.reshape(1, -1, 16).expand(4, -1, -1), self.up).chunk(2, -1)
        y = torch.einsum(
            "te,etd->td", routed, torch.bmm(F.silu(g) * u, self.down) + self.b[:, None]
        )
        h = torch.einsum("td,tkdh->tkh", y, self.up[chosen][..., :32])
        return (
            torch.einsum("tkh,tkhd,tk->td", F.gelu(h), self.down[chosen], w).view_as(x),
            p.mean(0).pow(2).sum(),
        )


# ---- other paths than the one that was traced


@model(
    "paths",
    X,
    Y,
    lambda: (-torch.rand(2, 6, 16),),
    lambda: (torch.rand(2, 6, 16) * 9,),
    (X, "no_grad"),
)
class Branches(Net):
    def __init__(self):
        super().__init__(
            f=mlp(),
            g=mlp(),
            a=nn.Linear(16, 32),
            b=nn.Linear(32, 16),
            halt=nn.Linear(16, 1),
        )
        self.layers, self.heads = nn.ModuleList(mlp() for _ in range(3)), nn.ModuleList(
            nn.Linear(16, 8) for _ in range(3)
        )

    def forward(self, x):
        x = self.f(x) if x.sum() > 0 else self.g(x)
        steps = 0
        while steps < 4 and self.halt(x).sigmoid().mean() < 0.55:
            x, steps = x + self.b(self.a(x).relu()), steps + 1
        for layer, head in zip(self.layers, self.heads):
            x = x + layer(x)
            y = head(x)
            if y.softmax(-1).max().item() > 0.6:
                break
        return y, steps


def flags(**given):
    return lambda: {
        "x": torch.randn(2, 5, 16),
        **{k: v() if callable(v) else v for k, v in given.items()},
    }


@model(
    "paths",
    flags(),
    flags(attn=True),
    flags(mask=lambda: torch.rand(2, 5) > 0.2),
    flags(mask=lambda: torch.rand(2, 1, 5, 5) > 0.2, attn=True),
    flags(x=lambda: torch.randn(5, 16)),
    flags(route="b"),
    flags(image=lambda: torch.randn(2, 3, 8, 8)),
    flags(),
    (flags(attn=True), "no_grad"),
    local=True,
)
class Flags(Net):
    """Attention weights asked for, masks of two kinds, another rank, a route by name, a
    part that was not reached."""

    def __init__(self):
        see = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.Flatten(2), nn.Linear(4, 4))
        super().__init__(
            qkv=nn.Linear(16, 48), o=nn.Linear(16, 16), see=see, bias=torch.randn(16)
        )
        self.routes = nn.ModuleDict({"a": mlp(), "b": mlp()})

    def forward(self, x, attn=False, mask=None, route="a", image=None):
        if x.dim() == 2:
            return self.forward(x[None], attn, mask)[0]
        if image is not None:
            x = torch.cat([self.see(image).mT + self.bias, x], 1)
        q, k, v = map(heads, self.qkv(x).chunk(3, -1))
        s = q @ k.mT
        if mask is not None:
            s = s.masked_fill(~(mask if mask.dim() == 4 else mask[:, None, None]), -1e9)
        p = s.softmax(-1)
        y = self.routes[route](self.o((p @ v).transpose(1, 2).flatten(2)))
        return (y, p.mean(1)) if attn else y
