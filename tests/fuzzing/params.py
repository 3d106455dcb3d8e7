"""Statements of the fuzzer's programs: parameters as tensors, by whatever way they are
read."""

from .layers import act
from .scope import Unsuited, kind

# ---- weights that are sliced, transposed, put together before use


@kind(4)
def weight_made(g):
    h, n = g.pick(), g.size()
    d = h.d
    p, k = g.one_of(2, 3, 4, 5), g.one_of(2, 3, 4, 5)
    i = g.rng.randrange(1, n)
    way = g.rng.randrange(16)
    if way == 0:
        g.let(f"F.linear({h}, torch.cat([{g.param(n, d)}, {g.param(k, d)}]))")
    elif way == 1:
        g.let(f"{h} @ torch.cat([{g.param(d, n)}, {g.param(d, k)}], 1)")
    elif way == 2:
        w = g.param(n, d)
        g.let(
            f"F.linear({h}, {w}[:{i}]) * F.linear({h}, {w}[{i}:]).sum(-1, keepdim=True)"
        )
    elif way == 3:
        w = g.param(p * k, d)
        g.let(
            f"{g.one_of('sum', 'torch.stack')}([F.linear({h}, {w}[i * {k}:(i + 1) *"
            f" {k}]) for i in range({p})])",
            "z",
        )
        z = g.vars[-1]
        if len(z.shape) > len(h.shape):
            g.vars.remove(z)
            g.let(f"{z}.softmax(0).mean(0)")
    elif way == 4:
        w = g.param(p * k, d)
        g.let(
            f"torch.einsum('...d,pkd->...pk', {h}, {w}.view({p}, {k},"
            f" {d})).softmax(-1).flatten(-2)"
        )
    elif way == 5:
        w = g.param(n, d)
        g.let(
            f"F.linear({h}, {w} / {w}.norm(dim=1, keepdim=True) *"
            f" {g.param(n, 1, scale=1)})"
        )
    elif way == 6:
        g.let(
            f"F.linear({h}, {g.param(n, d)} *"
            f" {g.buffer(f'(torch.rand({n}, {d}) > 0.3).double()')})"
        )
    elif way == 7:
        g.let(f"F.linear({h}, {g.param(n, 3)} @ {g.param(3, d)} + {g.param(n, d)})")
    elif way == 8:
        w = g.param(n, d)
        g.let(
            f"F.linear({h},"
            f" {w}.{g.one_of('softmax(0)', 'softmax(1)', 'tanh()', 'abs()', 'flip(0)', 'roll(1, 0)')})"
        )
    elif way == 9:
        w = g.param(d, n)
        g.let(f"F.linear(F.linear({h}, {w}.t()).relu(), {w})")
    elif way == 10:
        w = g.param(p, d, k)
        g.let(
            f"{g.one_of('sum', 'torch.stack')}([{h} @ {w}[i] for i in range({p})])", "z"
        )
        z = g.vars[-1]
        if len(z.shape) > len(h.shape):
            g.vars.remove(z)
            g.let(f"{z}.permute(*range(1, {z}.dim()), 0).flatten(-2)")
    elif way == 11:
        a, b = g.linear(d, n, bias=True), g.linear(d, k, bias=True)
        g.let(
            f"F.linear({h}, torch.cat([{a}.weight, {b}.weight]), torch.cat([{a}.bias,"
            f" {b}.bias]))"
        )
    elif way == 12:
        layer = g.linear(d, n, bias=True)
        g.let(f"F.linear({h}, {layer}.weight[:{i}], {layer}.bias[:{i}])")
    elif way == 13:
        layer = g.linear(d, n, bias=True)
        g.let(f"F.linear({act(g)}({layer}({h})), {layer}.weight.t())")
    elif way == 14:
        w, v = g.param(n, d), g.param(k, n)
        g.let(f"F.linear({h}, {v} @ {w})")
    else:
        w = g.own(
            f"nn.ParameterList([nn.Parameter(torch.randn({k}, {d}) * 0.3) for _ in"
            f" range({p})])",
            "ws",
        )
        g.let(
            f"torch.cat([F.linear({h}, w).{g.one_of('tanh()', 'softmax(-1)')} for w in"
            f" {w}], -1)"
        )


@kind(1.5)
def affine(g):
    h = g.pick()
    w = g.param(h.d)
    g.let(
        g.one_of(
            f"{h} * {w}",
            f"{h} + {w}",
            f"{h} * (1 + {w}) + {g.param(h.d)}",
            f"{h} * {g.param(1)}",
            f"torch.lerp({h}, {h}.tanh(), {w}.sigmoid())",
            f"F.prelu({h}.flatten(0, -2), {w}).view_as({h})",
        )
    )


@kind(1)
def experts(g):
    h, n, e = g.pick(), g.size(), g.one_of(2, 3, 4, 6)
    router = g.linear(h.d, e)
    r = g.let(f"{router}({h}).softmax(-1)", "r")
    way = g.one_of("stack", "einsum", "loop", "top")
    if way == "stack":
        layers = g.own(
            f"nn.ModuleList([nn.Linear({h.d}, {n}) for _ in range({e})])", "experts"
        )
        g.let(f"(torch.stack([f({h}) for f in {layers}], -2) * {r}[..., None]).sum(-2)")
    elif way == "loop":
        layers = g.own(
            f"nn.ModuleList([nn.Linear({h.d}, {n}) for _ in range({e})])", "experts"
        )
        g.let(f"sum({r}[..., i:i + 1] * f({h}) for i, f in enumerate({layers}))")
    elif way == "einsum":
        g.let(f"torch.einsum('...d,edn,...e->...n', {h}, {g.param(e, h.d, n)}, {r})")
    else:
        w = g.param(e, h.d, n)
        g.run(f"best, which = {r}.topk(1, -1)")
        g.let(f"best * torch.einsum('...d,...dn->...n', {h}, {w}[which[..., 0]])")


# ---- a parameter read by its own module and by another; by other ways


@kind(3)
def parameter_read_outside(g):
    h, n, out = g.pick(), g.size() * g.one_of(1, 2), g.size()
    a, b = g.linear(h.d, n, bias=True), g.linear(n, out, bias=True)
    y = f"{b}({a}({h}).relu())"
    g.let(
        g.one_of(
            f"{y} - {b}.bias",
            f"{y} * {b}.bias.tanh()",
            f"{y} + {b}.bias.pow(2).sum()",
            f"{y} @ {b}.weight",
            f"{y} + {b}(-{a}({h})) + {b}.bias",
            f"{b}({a}({h}) - {a}.bias)",
            f"F.linear({a}({h}).relu(), {b}.weight, {b}.bias) + {b}.bias",
            f"{y} / {b}.weight.norm()",
            f"{y} + {a}.weight.mean() * {b}.bias",
            f"F.linear({a}({h}).relu(), {b}.weight, {g.param(out)})",
        )
    )


@kind(1)
def norm_read_outside(g):
    h, k, n = g.seq(), g.one_of(3, 4, 5, 6), g.one_of(2, 3, 4)
    q, norm = g.linear(h.d, n * k), g.own(f"nn.RMSNorm({k})", "norm")
    y = g.let(f"{norm}({q}({h}).view(B, T, {n}, {k})).flatten(2)")
    g.let(g.one_of(f"{y} * {norm}.weight.mean()", f"{y} + {norm}.weight.pow(2).sum()"))


@kind(2)
def read_by_other_ways(g):
    h, n = g.pick(), g.size()
    fc = g.linear(h.d, n, bias=True)
    net = g.own(
        f"nn.Sequential(nn.Linear({h.d}, {n}), nn.Tanh(), nn.Linear({n}, {g.size()}))",
        "net",
    )
    way = g.rng.randrange(11)
    name = g.new("h")
    if way == 0:
        g.run(f"w, b = {fc}.parameters()\n{name} = F.linear({h}, w, b)")
    elif way == 1:
        g.run(
            f"p = dict({fc}.named_parameters())\n{name} = F.linear({h}, p['weight'],"
            " p['bias'])"
        )
    elif way == 2:
        g.run(f"{name} = F.linear({h}, {fc}._parameters['weight'])")
    elif way == 3:
        g.run(
            f"d = {fc}.state_dict(keep_vars=True)\n{name} = F.linear({h}, d['weight'],"
            " d['bias'])"
        )
    elif way == 4:
        g.run(f"{name} = F.linear({h}, {net}.get_parameter('0.weight'))")
    elif way == 5:
        g.run(
            f"{name} = functional_call({fc}, {{k: v * 2 for k, v in"
            f" {fc}.named_parameters()}}, ({h},))"
        )
    elif way == 6:
        g.run(
            f"{name} = functional_call({net}, {{k: v + 0.1 for k, v in"
            f" {net}.named_parameters()}}, ({h},))"
        )
    elif way == 7:
        g.run(
            f"{name} = functional_call({net}, dict({net}.named_parameters()), ({h},))"
        )
    elif way == 8:
        w, b = g.param(n, h.d), g.param(n)
        g.run(
            f"{name} = functional_call({fc}, {{'weight': {w} * 1, 'bias': {b} * 1}},"
            f" ({h},))"
        )
    elif way == 9:
        lines = [
            f"p = dict({fc}.named_parameters())",
            f"loss = functional_call({fc}, p, ({h},)).pow(2).mean()",
            "grads = torch.autograd.grad(loss, list(p.values()), create_graph=True)",
            (
                f"{name} = functional_call({fc}, {{k: v - 0.1 * d for (k, v), d in"
                f" zip(p.items(), grads)}}, ({h},))"
            ),
        ]
        g.run("\n".join(lines))
    else:
        g.run(
            f"w = next({net}.parameters())\n{name} = {h}.to(w.device, w.dtype) @ w.t()"
        )
    g.keep(name)
    if g.coin():
        g.let(f"{g.one_of(net, fc)}({h})")


@kind(1.5)
def penalty(g):
    """A sum over the parameters, within the forward."""
    if not list(g.holder.parameters()):
        raise Unsuited
    total = g.one_of(
        "sum(p.pow(2).sum() for p in s.parameters())",
        "sum(p.norm() for n, p in s.named_parameters() if 'weight' in n or 'w' in n)",
        "torch.cat([p.flatten() for p in s.parameters()]).abs().mean()",
        "sum(p.abs().mean() for m in s.modules() for p in m._parameters.values() if p"
        " is not None)",
        "torch.stack([p.pow(2).mean() for p in s.parameters()]).sum()",
    )
    h = g.pick()
    g.let(
        g.one_of(
            f"{h} + 0.01 * ({total})",
            f"0.01 * ({total})",
            f"{h}.pow(2).mean() + 0.01 * ({total})",
        )
    )
