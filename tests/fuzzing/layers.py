"""Statements of the fuzzer's programs: layers, attention, dropout, modules within
modules. Each kind is a function of a Scope that writes lines of __init__ and of the
forward, numbers in the code; what does not run is taken back."""

from .scope import Unsuited, fill, kind


def project(g, h, n):
    """Source of a projection of `h` to n features, by a layer or by weights."""
    way = g.rng.random()
    if way < 0.6:
        return f"{g.linear(h.d, n)}({h})"
    if way < 0.7:
        return f"{h} @ {g.param(h.d, n)}"
    if way < 0.8:
        return f"F.linear({h}, {g.param(n, h.d)}, {g.param(n)})"
    if way < 0.9:
        return f"{h} @ {g.param(n, h.d)}.t() + {g.param(n)}"
    return f"torch.einsum('...i,io->...o', {h}, {g.param(h.d, n)})"


def pieces(g, y, p, k):
    """Source of a list of the p pieces of k features of `y`, in one of the ways that
    people write it."""
    return g.one_of(
        f"[{y}[..., i * {k}:(i + 1) * {k}] for i in range({p})]",
        f"[{y}[..., {k} * i:{k} * i + {k}] for i in range({p})]",
        f"[{y}.narrow(-1, i * {k}, {k}) for i in range({p})]",
        f"{y}.split({k}, -1)",
        f"{y}.split({[k] * p}, dim=-1)",
        f"{y}.chunk({p}, -1)",
        f"{y}.tensor_split({p}, -1)",
        f"[{y}[..., i::{p}] for i in range({p})]",
        f"{y}.unflatten(-1, ({p}, {k})).unbind(-2)",
        f"[{y}.view(*{y}.shape[:-1], {p}, {k})[..., i, :] for i in range({p})]",
        f"[{y}.index_select(-1, torch.arange(i * {k}, i * {k} + {k})) for i in"
        f" range({p})]",
        f"[{', '.join(f'{y}[..., {i * k or str()}:{(i + 1) * k if i < p - 1 else str()}]' for i in range(p))}]",
    )


def act(g):
    return g.one_of(
        "F.gelu",
        "F.relu",
        "F.silu",
        "torch.tanh",
        "torch.sigmoid",
        "F.softplus",
        "torch.sin",
    )


# ---- layers


@kind(3)
def linear(g):
    h = g.pick()
    g.let(project(g, h, g.size()))


@kind(2)
def activation(g):
    h = g.pick()
    g.let(
        g.one_of(
            f"{act(g)}({h})",
            f"{h}.softmax(-1)",
            f"{h}.log_softmax(-1)",
            f"{h} * {h}.sigmoid()",
            f"{h} ** 2",
        )
    )


@kind(3)
def mlp(g):
    h = g.pick()
    n = g.size() * g.one_of(1, 2)
    out = h.d if g.coin() else g.size()
    inner = f"{act(g)}({project(g, h, n)})"
    inner = f"{dropout_of(g)}({inner})" if g.coin(0.2) else inner
    g.let(f"{'' if out != h.d or g.coin() else h + ' + '}{g.linear(n, out)}({inner})")


@kind(2)
def norm(g):
    h = g.pick()
    layer = g.one_of(
        "nn.LayerNorm({d})",
        "nn.RMSNorm({d})",
        "rms",
        "center",
        "unit",
        "group",
        "batch",
    )
    if layer == "rms":
        g.let(
            f"{h} * torch.rsqrt({h}.pow(2).mean(-1, keepdim=True) + 1e-2) *"
            f" {g.param(h.d, scale=1)}"
        )
    elif layer == "center":
        g.let(f"({h} - {h}.mean(-1, keepdim=True)) / ({h}.std(-1, keepdim=True) + 0.5)")
    elif layer == "unit":
        g.let(f"{h} / ({h}.norm(dim=-1, keepdim=True) + 0.5)")
    elif layer in ("group", "batch"):
        h = g.seq()
        n = next(n for n in (3, 2, 5, 1) if h.d % n == 0)
        made = g.own(
            (
                f"nn.GroupNorm({n}, {h.d})"
                if layer == "group"
                else f"nn.BatchNorm1d({h.d})"
            ),
            "norm",
        )
        g.let(f"{made}({h}.transpose(1, 2)).transpose(1, 2)")
    else:
        g.let(f"{g.own(layer.format(d=h.d), 'norm')}({h})")


@kind(1.5)
def shared(g):
    """A layer that was called before, again."""
    layer, d = g.rng.choice(g.layers) if g.layers else (None, 0)
    h = g.pick(lambda h: h.d == d, recent=9)
    g.let(
        g.one_of(
            f"{layer}({h})", f"{layer}({h}.tanh())", f"{layer}({h}) - {layer}(-{h})"
        )
    )


@kind(1)
def module_list(g):
    h = g.pick()
    layers = g.own(
        f"nn.ModuleList([nn.Linear({h.d}, {h.d}) for _ in range({g.one_of(2, 3)})])",
        "layers",
    )
    name = g.new("h")
    g.run(
        f"{name} = {h}\nfor layer in {layers}:\n    {name} = {name} +"
        f" {act(g)}(layer({name}))"
    )
    g.keep(name)


@kind(1)
def sequential(g):
    h, n, out = g.pick(), g.size(), g.size()
    kind = g.one_of("nn.ReLU()", "nn.GELU()", "nn.Tanh()")
    g.let(
        f"{g.own(f'nn.Sequential(nn.Linear({h.d}, {n}), {kind}, nn.Linear({n}, {out}))', 'net')}({h})"
    )


@kind(2.5)
def block(g):
    """A module of its own class, called once, or twice, or from a list."""
    if g.path.count(".") > 1:
        raise Unsuited
    h, attr = g.pick(), g.new("block")
    name = f"{attr.title()}{g.name if g.name != 'Net' else ''}"
    child = g.child(h, name, attr)
    fill(child, g.rng.randint(1, 4))
    made = [v for v in child.vars if v not in child.given]
    child.close(made[-1])
    g.classes.append(child)
    line = f"s.{attr} = {name}()"
    exec(line, {name: child.made, "s": g.holder})
    g.init.append(line)
    out = g.let(f"s.{attr}({h})")
    if out.shape == h.shape and g.coin(0.3):
        g.let(f"s.{attr}({out})")
    for inner in child.layers[:1]:
        # which the outer one calls too
        g.layers.append((f"s.{attr}.{inner[0][2:]}", inner[1]))


@kind(0.7)
def recurrent(g):
    h, n = g.seq(), g.size()
    layer = g.own(f"nn.{g.one_of('GRU', 'LSTM')}({h.d}, {n}, batch_first=True)", "rnn")
    g.let(f"{layer}({h})[0]")


@kind(1)
def convolution(g):
    h, n = g.seq(), g.size()
    way = g.one_of("conv", "depthwise", "pointwise", "functional")
    if way == "conv":
        layer = g.own(f"nn.Conv1d({h.d}, {n}, 3, padding=1)", "conv")
    elif way == "depthwise":
        layer = g.own(f"nn.Conv1d({h.d}, {h.d}, 3, padding=1, groups={h.d})", "conv")
    elif way == "pointwise":
        layer = g.own(f"nn.Conv1d({h.d}, {n}, 1)", "conv")
    else:
        g.let(
            f"F.conv1d({h}.transpose(1, 2), {g.param(n, h.d, 3)}, padding=1)[:, :,"
            " :T].transpose(1, 2)"
        )
        return
    g.let(f"{layer}({h}.transpose(1, 2)).transpose(1, 2)")


# ---- attention


def heads_of(g):
    return g.one_of(2, 3, 4, 6), g.one_of(2, 3, 4, 6)


@kind(2)
def attention(g):
    h, (n, k) = g.seq(), heads_of(g)
    q, key, v = (g.let(project(g, h, n * k), stem) for stem in "qkv")
    attend(g, h, q, key, v, n, k)


@kind(3)
def fused_attention(g):
    h, (n, k) = g.seq(), heads_of(g)
    d = n * k
    y = g.let(project(g, h, 3 * d), "qkv")
    way = g.rng.randrange(8)
    lines = [
        f"q, k, v = {y}[..., :{d}], {y}[..., {d}:{2 * d}], {y}[..., {2 * d}:]",
        f"q, k, v = {y}[..., :{d}], {y}[..., {d}:-{d}], {y}[..., -{d}:]",
        f"q, k, v = ({y}.narrow(-1, i * {d}, {d}) for i in range(3))",
        f"q, k, v = {y}.split({d}, -1)",
        f"q, k, v = {y}.chunk(3, -1)",
        (
            f"q, k, v = ({y}[..., i * {y}.shape[-1] // 3:(i + 1) * {y}.shape[-1] // 3]"
            " for i in range(3))"
        ),
        f"q, k, v = (t.flatten(2) for t in {y}.view(B, T, 3, {n}, {k}).unbind(2))",
        (
            f"q, k, v = (t.flatten(2) for t in {y}.view(B, T, {n}, {3 * k}).split({k},"
            " -1))"
        ),
    ]
    g.run(lines[way])
    attend(g, h, *(g.keep(name) for name in "qkv"), n, k)


@kind(1.5)
def weight_sliced_attention(g):
    h, (n, k) = g.seq(), heads_of(g)
    d = n * k
    layer = g.linear(h.d, 3 * d, bias=True)
    g.run(f"w, b = {layer}.weight, {layer}.bias")
    bounds = g.one_of(
        [f":{d}", f"{d}:{2 * d}", f"{2 * d}:"], [f":{d}", f"{d}:-{d}", f"-{d}:"]
    )
    q, key, v = (
        g.let(f"F.linear({h}, w[{at}], b[{at}])", stem)
        for stem, at in zip("qkv", bounds)
    )
    attend(g, h, q, key, v, n, k)


@kind(1.5)
def grouped_attention(g):
    """Fewer heads of keys and values; one fused projection with unequal pieces."""
    h, (n, k) = g.seq(), heads_of(g)
    m = g.one_of(*[m for m in (1, 2, 3) if n % m == 0])
    y = g.let(project(g, h, (n + 2 * m) * k), "qkv")
    a, b = n * k, (n + m) * k
    line = g.one_of(
        f"q, k, v = {y}.split([{n * k}, {m * k}, {m * k}], -1)",
        f"q, k, v = {y}[..., :{a}], {y}[..., {a}:{b}], {y}[..., {b}:]",
        f"q, k, v = {y}.narrow(-1, 0, {a}), {y}.narrow(-1, {a}, {m * k}),"
        f" {y}.narrow(-1, {b}, {m * k})",
    )
    g.run(line)
    g.run(f"q, k, v = (t.view(B, T, -1, {k}).transpose(1, 2) for t in (q, k, v))")
    g.run(f"k, v = (t.repeat_interleave({n // m}, 1) for t in (k, v))")
    g.run(
        "a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1,"
        " 2).reshape(B, T, -1)"
    )
    g.let(g.one_of("a", f"{g.linear(n * k, h.d)}(a)"))


def attend(g, h, q, key, v, n, k):
    d = n * k
    way = g.one_of(
        "view", "view", "minus", "loop", "chunks", "einsum", "scores", "biased"
    )
    if way == "loop":
        head = (
            f"({q}[..., at] @ {key}[..., at].mT / {k} ** 0.5).softmax(-1) @"
            f" {v}[..., at]"
        )
        g.run(
            f"out = []\nfor i in range({n}):\n    at = slice(i * {k}, i * {k} + {k})\n "
            f"   out.append({head})"
        )
        a = "torch.cat(out, -1)"
    elif way == "chunks":
        heads = f"zip(*(t.chunk({n}, -1) for t in ({q}, {key}, {v})))"
        a = f"torch.cat([(a @ b.mT).softmax(-1) @ c for a, b, c in {heads}], -1)"
    else:
        shape = f"B, T, {n}, -1" if way == "minus" else f"B, T, {n}, {k}"
        g.run(
            f"{q}, {key}, {v} = (t.reshape({shape}).transpose(1, 2) for t in ({q},"
            f" {key}, {v}))"
        )
        a = f"F.scaled_dot_product_attention({q}, {key}, {v}, is_causal={g.coin()})"
        if way == "einsum":
            a = (
                f"torch.einsum('bhqk,bhkd->bhqd', torch.einsum('bhqd,bhkd->bhqk', {q},"
                f" {key}).softmax(-1), {v})"
            )
        if way == "scores":
            mask = "torch.ones(T, T).tril() == 0"
            a = (
                f"({q} @ {key}.mT * {k} ** -0.5).masked_fill({mask}, -1e4).softmax(-1)"
                f" @ {v}"
            )
        if way == "biased":
            a = f"({q} @ {key}.mT + {g.param(n, 1, 1)}).softmax(-1) @ {v}"
        a = (
            f"({a}).transpose(1,"
            f" 2).{g.one_of('flatten(2)', f'reshape(B, T, {d})', 'reshape(B, T, -1)')}"
        )
    g.vars = [x for x in g.vars if x not in (q, key, v)]
    if g.coin(0.75):
        a = f"{g.linear(d, h.d)}({a})"
        a = f"{h} + {a}" if g.coin() else a
    g.let(a)


@kind(0.6)
def torch_attention(g):
    n, k = heads_of(g)
    h = g.seq(lambda h: h.d % 2 == 0 or h.d % 3 == 0)
    n = g.one_of(*[n for n in (2, 3, 4, 6) if h.d % n == 0])
    m = g.own(f"nn.MultiheadAttention({h.d}, {n}, batch_first=True)", "mha")
    g.let(f"{m}({h}, {h}, {h}, need_weights={g.coin()})[0]")


# ---- dropout


def dropout_of(g):
    name = g.own(f"nn.Dropout({g.one_of(0.0, 0.1, 0.3, 0.5)})", "drop")
    path = f"m.{g.path}{name[2:]}"
    g.later += [f"{path}.p = 0.4", f"{path}.train()"]
    return name


@kind(1.5)
def dropout(g):
    h = g.pick()
    if g.coin(0.3):
        g.let(f"F.dropout({h}, {g.one_of(0.1, 0.3)}, s.training)")
    else:
        g.let(f"{dropout_of(g)}({h})")


@kind(1)
def dropout_of_a_transposed(g):
    """The mask is drawn in the order of memory, which a collective may change."""
    h, n = g.seq(), g.size()
    drop, inner = dropout_of(g), project(g, h, n)
    way = g.one_of("sum", "conv", "heads", "einsum")
    if way == "sum":
        y = g.let(inner)
        g.let(
            f"{drop}({g.linear(n, g.size())}({y}.relu().transpose(0,"
            " 1)).transpose(0, 1))"
        )
    elif way == "conv":
        g.let(
            f"{drop}({g.own(f'nn.Conv1d({h.d}, {n}, 1)', 'conv')}({h}.transpose(1,"
            " 2)).transpose(1, 2))"
        )
    elif way == "heads":
        k = g.one_of(2, 3, 4)
        y = g.let(project(g, h, 4 * k))
        g.let(
            f"{drop}({y}.view(B, T, 4, {k}).transpose(1, 2)).transpose(1, 2).flatten(2)"
        )
    else:
        p, q = g.param(6, h.d, 2), g.param(6, 6)
        q1 = g.let(f"torch.einsum('btd,hde->bhte', {h}, {p})", "q")
        a = g.let(
            f"torch.einsum('bhqk,gh->bgqk', ({q1} @ {q1}.mT).softmax(-1), {q})", "a"
        )
        g.vars = [v for v in g.vars if v not in (q1, a)]
        g.let(f"{drop}({a}).mean(-1).transpose(1, 2)")
