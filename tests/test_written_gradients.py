"""Models as people write them: functions and hooks that change gradients, checkpoints;
functional style."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from models.written import Net, X, Y, attend, heads, mlp, model, rows, run_models
from torch import nn
from torch.utils.checkpoint import checkpoint


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("group", ["gradients", "functional"])
def test_models(group, n):
    run_models(group, n)


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


class Gelu(torch.autograd.Function):
    """As BLOOM's: a backward of its own that does the same at each element."""

    @staticmethod
    def forward(ctx, x, scale=1.0):
        ctx.save_for_backward(x)
        ctx.scale = scale
        return x * torch.sigmoid(1.7 * x) * scale

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(1.7 * x)
        return grad * ctx.scale * (s + 1.7 * x * s * (1 - s)), None


class Rounded(torch.autograd.Function):
    """Straight through: with a context set up apart, of any number of arguments."""

    @staticmethod
    def forward(*args):
        x, scale = args
        return torch.round(x * scale) / scale

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad.clone(), None


@model("gradients", X, Y, (X, "no_grad"), local=True)
class PointwiseFunctions(Net):
    def __init__(self):
        super().__init__(
            qkv=nn.Linear(16, 48), o=nn.Linear(16, 16), a=nn.Linear(16, 32)
        )
        self.b = nn.Linear(32, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.o(attend(Rounded.apply(q, 64.0), k, Gelu.apply(v, 0.5)))
        return x + self.b(checkpoint(Gelu.apply, self.a(x), use_reentrant=False))


class BySize(Gelu):
    """A pointwise backward that divides by a size: not the same on a shard."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / grad.shape[-1]


class Gated(torch.autograd.Function):
    """The gradient of a number that is learned sums over all elements."""

    @staticmethod
    def forward(ctx, x, gate):
        ctx.save_for_backward(x, gate)
        return x * gate

    @staticmethod
    def backward(ctx, grad):
        x, gate = ctx.saved_tensors
        return grad * gate, (grad * x).sum()


class InPlace(BySize):
    @staticmethod
    def backward(ctx, grad):
        return grad.clone().cumsum(-1)


@model("gradients", X, Y)
class FunctionsThatNeedTheWhole(Net):
    def __init__(self):
        super().__init__(f=mlp(), g=mlp(), h=mlp(), gate=torch.tensor(0.7))

    def forward(self, x):
        x = self.f[2](BySize.apply(self.f[0](x)))
        x = self.g[2](Gated.apply(self.g[0](x), self.gate))
        return self.h[2](InPlace.apply(self.h[0](x)))


@model("gradients", X, Y)
class PointwiseFunctionsBesideWholes(Net):
    """On sums that wait, on what others need whole, on what the model returns."""

    def __init__(self):
        super().__init__(f=mlp(), g=mlp(), a=nn.Linear(16, 32))

    def forward(self, x):
        x = self.g(Gelu.apply(self.f[2](torch.relu(self.f[0](x))), 2.0))
        shard = Gelu.apply(self.a(x))
        norm = shard / shard.norm(dim=-1, keepdim=True)
        return norm, Gelu.apply(self.a(x) * x.mean())


@model("gradients", X, Y, (X, "no_grad"))
class HooksOnTensors(Net):
    def __init__(self):
        super().__init__(
            e=nn.Linear(16, 16),
            a=nn.Linear(16, 32),
            b=nn.Linear(32, 16),
            n=nn.LayerNorm(16),
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
        self.f.register_full_backward_hook(
            lambda m, grads, out: (grads[0] / grads[0].norm(),)
        )
        self.g[0].register_full_backward_hook(
            lambda m, grads, out: (grads[0] * out[0].norm(),)
        )
        self.g[2].register_full_backward_pre_hook(
            lambda m, out: (out[0] / out[0].norm(),)
        )

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
    """A gradient taken within the forward, differentiated again; parts without
    gradients; losses."""

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
        loss = (
            F.mse_loss(self.g(y.detach()), target)
            + (self.o(y).detach() * self.o(y)).mean()
        )
        x = x.detach().requires_grad_()
        energy = self.f(x).sum()
        return energy, -torch.autograd.grad(energy, x, create_graph=True)[0], loss


# ---- functional style


@model("functional", X, Y)
class Einsums(Net):
    """Attention on the root's own parameters, with sinks and a scale for each head."""

    def __init__(self, h=4):
        parts = {name: torch.randn(h, 16, 4) / 4 for name in "qkv"}
        super().__init__(
            **parts,
            o=torch.randn(h, 4, 16) / 4,
            sink=torch.randn(h),
            scale=torch.ones(h, 1, 1),
        )

    def forward(self, x):
        q, k, v = (
            torch.einsum("btd,hde->bthe", x, w) for w in (self.q, self.k, self.v)
        )
        s = torch.einsum("bthd,bshd->bhts", q, k) * self.scale.exp()
        s = torch.cat(
            [s, self.sink[None, :, None, None].expand(s.shape[0], -1, s.shape[2], 1)],
            -1,
        )
        y = torch.einsum("bhts,bshe,hed->btd", s.softmax(-1)[..., :-1], v, self.o)
        x = x[:, None]
        return y + (
            (x @ self.q @ (x @ self.k).mT).softmax(-1) @ (x @ self.v) @ self.o
        ).sum(1)


@model("functional", rows(2, 8, 16), rows(3, 8, 16), local=True)
class PositionBiases(Net):
    """A table of relative positions, ALiBi's slopes learned, cosine similarity, grouped
    queries."""

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
        s = (
            F.normalize(q, dim=-1)
            @ F.normalize(k, dim=-1).mT
            * self.scale.clamp(max=4).exp()
        )
        s = s + self.table[(far + 7).view(-1)].view(*far.shape, -1).permute(2, 0, 1)
        s = (
            s
            + self.at(far.clamp(-4, 3) + 4).permute(2, 0, 1)
            + far * self.slopes[:, None, None]
        )
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
    """Attention whose head size is computed from the projection's own size, as einops
    does, and the other way round; heads at the front and in the middle."""

    def __init__(self, h=4):
        super().__init__(
            q=nn.Linear(16, 32),
            k=nn.Linear(16, 32),
            v=nn.Linear(16, 32),
            o=nn.Linear(32, 16),
        )
        self.h = h

    def forward(self, x):
        for view in self.by_view, self.by_unflatten, self.by_dim:
            q, k, v = (view(layer(x)) for layer in (self.q, self.k, self.v))
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            x = x + self.o(y.reshape(*y.shape[:2], y.shape[2] * y.shape[3]))
        return x

    def by_view(self, y):
        return y.reshape(y.shape[0], y.shape[1], self.h, y.shape[-1] // self.h).permute(
            0, 2, 1, 3
        )

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
            f=f,
            g=mlp(),
            w=torch.randn(4, 16, 8),
            v=torch.randn(4, 8, 16),
            mix=torch.randn(3),
        )
        # the model's own part
        self.h = nn.Sequential(Apply(lambda x: self.g(x)), Apply(lambda x: x * 2))

    def forward(self, x):
        y = torch.vmap(lambda w, v: torch.tanh(x @ w) @ v)(self.w, self.v)
        layers = [self.f(x), self.h(x), y.sum(0)]
        return sum(w * t for w, t in zip(self.mix.softmax(0), layers)), torch.stack(
            layers
        ).mean(0)


@model("functional", X, Y, local=True)
class ConditionedScan(Net):
    """A state space, its sizes split unequally, its steps in Python; shift and scale
    from a condition; a net that makes weights."""

    def __init__(self, i=32, s=4):
        super().__init__(
            a=torch.rand(i, s),
            d=torch.randn(i),
            x=nn.Linear(i, 2 + 2 * s),
            dt=nn.Linear(2, i),
        )
        self.inp, self.out, self.c, self.w = (
            nn.Linear(16, 2 * i),
            nn.Linear(i, 16),
            nn.Linear(16, 2 * i),
            mlp(o=64),
        )
        self.conv, self.s = nn.Conv1d(i, i, 3, groups=i, padding=2), s

    def forward(self, x):
        x = F.linear(
            x, self.w(x.mean((0, 1))).view(16, 4).sum(1, keepdim=True).expand(16, 16)
        )
        scale, shift = self.c(x.mean(1, keepdim=True)).chunk(2, -1)
        x, z = self.inp(x).chunk(2, -1)
        x = F.silu(self.conv(x.mT)[..., : x.shape[1]].mT) * (1 + scale) + shift
        dt, b, c = self.x(x).split([2, self.s, self.s], -1)
        dt, h, out = (
            F.softplus(self.dt(dt)),
            x.new_zeros(len(x), x.shape[2], self.s),
            [],
        )
        for k in range(x.shape[1]):
            h = (
                h * torch.exp(-dt[:, k, :, None] * self.a.exp())
                + (dt * x)[:, k, :, None] * b[:, k, None]
            )
            out.append((h * c[:, k, None]).sum(-1))
        return self.out((torch.stack(out, 1) + x * self.d) * F.silu(z))
