"""Statements of the fuzzer's programs: parameters as tensors, by whatever way they are read; buffers, losses, branches, what is kept."""

from .layers import act, project
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
        g.let(f"F.linear({h}, {w}[:{i}]) * F.linear({h}, {w}[{i}:]).sum(-1, keepdim=True)")
    elif way == 3:
        w = g.param(p * k, d)
        g.let(f"{g.one_of('sum', 'torch.stack')}([F.linear({h}, {w}[i * {k}:(i + 1) * {k}]) for i in range({p})])", "z")
        z = g.vars[-1]
        if len(z.shape) > len(h.shape):
            g.vars.remove(z)
            g.let(f"{z}.softmax(0).mean(0)")
    elif way == 4:
        w = g.param(p * k, d)
        g.let(f"torch.einsum('...d,pkd->...pk', {h}, {w}.view({p}, {k}, {d})).softmax(-1).flatten(-2)")
    elif way == 5:
        w = g.param(n, d)
        g.let(f"F.linear({h}, {w} / {w}.norm(dim=1, keepdim=True) * {g.param(n, 1, scale=1)})")
    elif way == 6:
        g.let(f"F.linear({h}, {g.param(n, d)} * {g.buffer(f'(torch.rand({n}, {d}) > 0.3).double()')})")
    elif way == 7:
        g.let(f"F.linear({h}, {g.param(n, 3)} @ {g.param(3, d)} + {g.param(n, d)})")
    elif way == 8:
        w = g.param(n, d)
        g.let(f"F.linear({h}, {w}.{g.one_of('softmax(0)', 'softmax(1)', 'tanh()', 'abs()', 'flip(0)', 'roll(1, 0)')})")
    elif way == 9:
        w = g.param(d, n)
        g.let(f"F.linear(F.linear({h}, {w}.t()).relu(), {w})")
    elif way == 10:
        w = g.param(p, d, k)
        g.let(f"{g.one_of('sum', 'torch.stack')}([{h} @ {w}[i] for i in range({p})])", "z")
        z = g.vars[-1]
        if len(z.shape) > len(h.shape):
            g.vars.remove(z)
            g.let(f"{z}.permute(*range(1, {z}.dim()), 0).flatten(-2)")
    elif way == 11:
        a, b = g.linear(d, n, bias=True), g.linear(d, k, bias=True)
        g.let(f"F.linear({h}, torch.cat([{a}.weight, {b}.weight]), torch.cat([{a}.bias, {b}.bias]))")
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
        w = g.own(f"nn.ParameterList([nn.Parameter(torch.randn({k}, {d}) * 0.3) for _ in range({p})])", "ws")
        g.let(f"torch.cat([F.linear({h}, w).{g.one_of('tanh()', 'softmax(-1)')} for w in {w}], -1)")


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
        layers = g.own(f"nn.ModuleList([nn.Linear({h.d}, {n}) for _ in range({e})])", "experts")
        g.let(f"(torch.stack([f({h}) for f in {layers}], -2) * {r}[..., None]).sum(-2)")
    elif way == "loop":
        layers = g.own(f"nn.ModuleList([nn.Linear({h.d}, {n}) for _ in range({e})])", "experts")
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
    net = g.own(f"nn.Sequential(nn.Linear({h.d}, {n}), nn.Tanh(), nn.Linear({n}, {g.size()}))", "net")
    way = g.rng.randrange(11)
    name = g.new("h")
    if way == 0:
        g.run(f"w, b = {fc}.parameters()\n{name} = F.linear({h}, w, b)")
    elif way == 1:
        g.run(f"p = dict({fc}.named_parameters())\n{name} = F.linear({h}, p['weight'], p['bias'])")
    elif way == 2:
        g.run(f"{name} = F.linear({h}, {fc}._parameters['weight'])")
    elif way == 3:
        g.run(f"d = {fc}.state_dict(keep_vars=True)\n{name} = F.linear({h}, d['weight'], d['bias'])")
    elif way == 4:
        g.run(f"{name} = F.linear({h}, {net}.get_parameter('0.weight'))")
    elif way == 5:
        g.run(f"{name} = functional_call({fc}, {{k: v * 2 for k, v in {fc}.named_parameters()}}, ({h},))")
    elif way == 6:
        g.run(f"{name} = functional_call({net}, {{k: v + 0.1 for k, v in {net}.named_parameters()}}, ({h},))")
    elif way == 7:
        g.run(f"{name} = functional_call({net}, dict({net}.named_parameters()), ({h},))")
    elif way == 8:
        w, b = g.param(n, h.d), g.param(n)
        g.run(f"{name} = functional_call({fc}, {{'weight': {w} * 1, 'bias': {b} * 1}}, ({h},))")
    elif way == 9:
        lines = [
            f"p = dict({fc}.named_parameters())",
            f"loss = functional_call({fc}, p, ({h},)).pow(2).mean()",
            "grads = torch.autograd.grad(loss, list(p.values()), create_graph=True)",
            f"{name} = functional_call({fc}, {{k: v - 0.1 * d for (k, v), d in zip(p.items(), grads)}}, ({h},))",
        ]
        g.run("\n".join(lines))
    else:
        g.run(f"w = next({net}.parameters())\n{name} = {h}.to(w.device, w.dtype) @ w.t()")
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
        "sum(p.abs().mean() for m in s.modules() for p in m._parameters.values() if p is not None)",
        "torch.stack([p.pow(2).mean() for p in s.parameters()]).sum()",
    )
    h = g.pick()
    g.let(g.one_of(f"{h} + 0.01 * ({total})", f"0.01 * ({total})", f"{h}.pow(2).mean() + 0.01 * ({total})"))


# ---- buffers, vocabularies, losses


@kind(1.5)
def buffered(g):
    h = g.pick()
    if g.coin():
        b = g.buffer(g.one_of(f"torch.rand({h.d})", f"torch.arange({h.d}) % 2", f"torch.arange({h.d}) > {h.d // 2}"))
        if "rand" in g.init[-1]:
            g.later += [f"m.{g.path}{b[2:]}.data.copy_(torch.linspace(0, 1, {h.d}))", f"m.{g.path}{b[2:]}.mul_(0.5)"]
        g.let(g.one_of(f"{h} * {b}", f"{h} + {b}"))
        return
    b = g.buffer(f"torch.zeros({h.d})")
    new = g.one_of(f"{h}.detach().flatten(0, -2).mean(0)", f"{h}.detach().abs().flatten(0, -2).amax(0)")
    update = g.one_of(
        f"{b}.mul_(0.9).add_(0.1 * {new})",
        f"{b} = 0.9 * {b} + 0.1 * {new}",
        f"{b}.copy_({new})",
        f"{b}[:2] = {new}[:2]",
    )
    g.run(f"if s.training:\n    with torch.no_grad():\n        {update}")
    g.let(f"{h} - {b}")


@kind(4)
def vocabulary(g):
    """A table, a head tied to it or not, a padded vocabulary that is masked, a loss."""
    ids = [name for name in g.given if not g.frames[0][name].is_floating_point()]
    if ids and ids[0] == "ids":
        v = max(30, int(g.frames[0]["ids"].max()) + 1) + g.one_of(0, 2, 6)
        e = g.own(f"nn.Embedding({v}, {g.one_of(8, 9, 12, 15, 16)})", "emb")
        h = g.let(f"{e}(ids)")
        if g.coin():
            h = g.let(
                g.one_of(
                    f"{h} + {e}.weight[0]",
                    f"{h} * {e}.embedding_dim ** 0.5",
                    f"{h}.tanh()",
                    f"{h} + {project(g, h, h.d)}",
                )
            )
        logits = g.let(
            g.one_of(f"{h} @ {e}.weight.t()", f"F.linear({h}, {e}.weight)", f"{g.linear(h.d, v, bias=False)}({h})"),
            "logits",
        )
    else:
        h = g.pick()
        v = g.one_of(12, 14, 16, 18, 20, 24)
        if h.d == 1:
            raise Unsuited
        table = g.own(f"nn.Embedding({v}, {h.d})", "emb")
        which = g.let(f"{h} + {table}((({h}.mean(-1) * 7).long() % {v}))") if g.coin(0.3) else h
        logits = g.let(g.one_of(f"{g.linear(h.d, v)}({which})", f"{which} @ {table}.weight.t()"), "logits")
    if g.coin():
        real = v - g.rng.randint(1, v // 2)
        value = g.one_of(-1e2, -50.0, 0.0)
        g.run(
            g.one_of(
                f"{logits}[..., {real}:] = {value}",
                f"{logits}[..., {real}:].fill_({value})",
                f"{logits}[..., {real}:] -= 10",
                f"{logits} = {logits}[..., :{real}]",
            )
        )
        logits = g.keep(str(logits))
    if g.coin():
        loss(g, logits, ids)


@kind(1.5)
def loss_of_targets(g):
    loss(g, g.pick(lambda h: len(h.shape) == 3), [n for n in g.given if n == "target"])


def loss(g, logits, ids):
    bound = {"target": 12, "ids": 30}.get(ids[0], 99) if ids else 1
    index = f"{ids[0]}.flatten()" if ids else f"{logits}.detach().flatten(0, -2).argmax(-1)"
    index = f"{index} % {logits.d}" if bound > logits.d else index
    options, flat = "", f"{logits}.flatten(0, -2)"
    if g.coin(0.4):
        name = g.new("weights")
        g.init.append(f"s.{name} = None")
        setattr(g.holder, name, None)
        g.later += [f"m.{g.path}{name} = torch.linspace(0.1, 3, {logits.d}, dtype=torch.float64)"] * 2
        options = f", weight=s.{name}"
    options += g.one_of("", "", ", label_smoothing=0.1", ", reduction='sum'", ", ignore_index=0")
    g.let(
        g.one_of(
            f"F.cross_entropy({flat}, {index}{options})",
            f"F.nll_loss({flat}.log_softmax(-1), {index})",
            f"-{flat}.log_softmax(-1).gather(-1, ({index})[:, None]).mean()",
        ),
        "loss",
    )


# ---- branches, what is kept, gradients within


@kind(1.5)
def branch(g):
    h = g.pick()
    name = g.new("h")
    other = f"{g.linear(h.d, h.d)}({h})"
    test = g.one_of(
        "s.training",
        "torch.is_grad_enabled()",
        f"{h}.shape[0] > 2",
        f"{h}.shape[1] > 5",
        "T % 2 == 0",
        f"{h}.shape[-1] > {h.d - 1}",
        "flag",
    )
    if test == "flag":
        flag = g.new("flag")
        g.init.append(f"s.{flag} = False")
        setattr(g.holder, flag, False)
        g.later += [f"m.{g.path}{flag} = True"] * 2
        test = f"s.{flag}"
    g.run(
        f"if {test}:\n    {name} = {other}\nelse:\n    {name} = {g.one_of(f'{h} * 0.5', f'{h}.tanh()', project(g, h, h.d))}"
    )
    g.keep(name)


@kind(1)
def kept(g):
    """A tensor that is kept: in a list on the module, in one of the file, on an object."""
    h = g.let(project(g, g.pick(), g.size()))
    h = g.let(f"{h}.{g.one_of('tanh()', 'softmax(-1)')}") if g.coin() else h
    value = f"{h}{'.detach()' if g.coin() else ''}"
    if g.coin():
        g.run(f"SEEN.append({value})")
        return
    if not hasattr(g.holder, "kept"):
        g.init.append("s.kept = []")
        g.holder.kept = []
    g.run(g.one_of(f"s.kept = [{value}]", f"s.kept.clear()\ns.kept.append({value})", f"s.kept = {{'h': {value}}}"))


@kind(0.7)
def gradient_within(g):
    h = g.pick()
    y = g.let(f"{act(g)}({project(g, h, g.size())})")
    lines = ["with torch.enable_grad():", f"    z = {h}.detach().requires_grad_()"]
    fc = g.linear(h.d, 4)
    name = g.new("h")
    lines += [f"    {name}, = torch.autograd.grad({fc}(z).tanh().sum(), z, create_graph=True)"]
    g.run("\n".join(lines))
    g.keep(name)
    g.vars.insert(0, y)


@kind(0.4)
def loop_over_time(g):
    """A recurrence written in Python."""
    h, n = g.seq(), g.size()
    a, b = g.linear(h.d, n), g.linear(n, n)
    g.run(
        f"state, out = {h}.new_zeros(B, {n}), []\nfor t in range(T):\n    state = torch.tanh({a}({h}[:, t]) + {b}(state))\n    out.append(state)"
    )
    g.let("torch.stack(out, 1)")


@kind(1)
def two_inputs(g):
    h = g.pick()
    other = g.pick(lambda x: x != h and x.shape[:-1] == h.shape[:-1], recent=9)
    if other.d == h.d:
        g.let(
            g.one_of(
                f"{h} + {other}",
                f"{h} * {other}.sigmoid()",
                f"torch.stack([{h}, {other}], -1).flatten(-2)",
                f"torch.maximum({h}, {other})",
            )
        )
    else:
        n = g.size()
        g.let(
            g.one_of(
                f"torch.cat([{h}, {other}], -1)",
                f"{g.linear(h.d, n)}({h}) + {g.linear(other.d, n)}({other})",
                f"{h} * {other}.mean(-1, keepdim=True)",
            )
        )
