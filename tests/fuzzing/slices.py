"""Statements of the fuzzer's programs: numbers that index, size or move features;
writes to parts of them."""

from .layers import act, pieces, project
from .scope import Unsuited, kind


def fused(g, p=None, k=None):
    """(a new variable of p pieces of k features, p, k)"""
    p, k = p or g.one_of(2, 3, 3, 4, 5, 5, 6, 7), k or g.one_of(2, 3, 4, 5, 6)
    return g.let(project(g, g.pick(), p * k), "y"), p, k


PIECEWISE = [
    *(
        "z.softmax(-1)",
        "z.logsumexp(-1, keepdim=True)",
        "z.cumsum(-1)",
        "z.tanh()",
        "z / (z.norm(dim=-1, keepdim=True) + 1)",
    ),
    *(
        "z - z.mean(-1, keepdim=True)",
        "z.flip(-1)",
        "z.roll(1, -1)",
        "z * z.sigmoid()",
        "z.log_softmax(-1)",
    ),
    *(
        "F.layer_norm(z, z.shape[-1:])",
        "z.sum(-1, keepdim=True)",
        "z.amax(-1, keepdim=True)",
        "z",
    ),
]


@kind(5)
def loop_over_pieces(g):
    y, p, k = fused(g)
    one = g.one_of(*PIECEWISE)
    all_ = f"[{one} for z in {pieces(g, y, p, k)}]"
    way = g.one_of("cat", "stack", "sum", "some")
    if way == "cat":
        g.let(f"torch.cat({all_}, -1)")
    elif way == "stack":
        g.let(
            f"torch.stack({all_},"
            f" {g.one_of(-2, -2, -1)}).{g.one_of('flatten(-2)', 'mean(-2)', 'sum(-2)', 'amax(-2)')}"
        )
    elif way == "sum":
        g.let(f"sum({all_})")
    else:
        g.run(f"parts = {all_}")
        i, j = g.rng.randrange(p), g.rng.randrange(p)
        g.let(f"parts[{i}] {g.one_of('*', '+', '-')} parts[{j}].tanh()")


@kind(3)
def gates(g):
    """Gated units by slices of one projection, of two to five pieces."""
    y, p, k = fused(g, p=g.one_of(2, 3, 3, 4, 5))
    g.run(f"{', '.join('abcde'[:p])} = {pieces(g, y, p, k)}")
    first, *rest = "abcde"[:p]
    terms = " ".join(f"{g.one_of('+', '*')} {act(g)}({x})" for x in rest)
    out = f"{first} {terms}"
    g.let(out if g.coin() else f"{g.linear(k, g.size())}({out})")


@kind(3)
def one_slice(g):
    """A part of the features, by constant numbers."""
    h = g.pick() if g.coin(0.4) else g.let(project(g, g.pick(), g.size()), "y")
    if h.d < 3:
        raise Unsuited
    a = g.rng.randrange(h.d - 1)
    b = g.rng.randrange(a + 1, h.d)
    g.let(
        g.one_of(
            f"{h}[...,"
            f" {a}:{b}].{g.one_of('softmax(-1)', 'tanh()', 'exp().clamp(max=3)')}",
            f"{h}[..., :{b}]",
            f"{h}[..., -{b}:]",
            f"{h}[..., {a}:]",
            f"{h}[..., :-{b}]",
            f"{h}[..., ::{g.one_of(2, 3)}]",
            f"{h}.narrow(-1, {a}, {b - a})",
            f"{h}.select(-1, {a}).unsqueeze(-1)",
            f"{h}[..., {a}, None]",
            f"{h}[..., [{a}, {b}, 0]]",
            f"{h}.index_select(-1, torch.tensor([{b}, {a}]))",
            f"{h}[..., :{b}].softmax(-1) * {h}[..., {b}:].sum(-1, keepdim=True)",
            f"torch.cat([{h}[..., {b}:], {h}[..., :{b}].tanh()], -1)",
            f"{h}.split([{b}, {h.d - b}], -1)[{g.one_of(0, 1)}]",
            f"{h} - {h}[..., {a}:{a + 1}]",
            f"{h}[..., {a}:{b}] * {h}[..., :{b - a}]",
            f"{h}.unfold(-1, {b - a}, {g.one_of(1, 2)}).mean(-1)",
            f"{h}.take_along_dim(torch.arange({b}).expand(*{h}.shape[:-1], {b}), -1)",
        )
    )


@kind(2)
def moved(g):
    """Features in another order, padded, or masked by their number."""
    h = g.pick() if g.coin(0.4) else g.let(project(g, g.pick(), g.size()), "y")
    n, half = h.d, h.d // 2
    i = g.rng.randrange(1, n)
    g.let(
        g.one_of(
            f"{h}.roll({i}, -1)",
            f"{h}.flip(-1)",
            f"torch.cat([-{h}[..., {half}:], {h}[..., :{half}]], -1)",
            f"torch.stack([-{h}[..., 1::2], {h}[..., :{half * 2}:2]], -1).flatten(-2)",
            f"F.pad({h}, ({g.one_of(0, 1)}, {i}))",
            f"F.pad({h}, (0, -{i}))" if i < n - 1 else f"F.pad({h}, (1, 0))",
            f"torch.cat([{h}, {h}.new_zeros(*{h}.shape[:-1],"
            f" {g.one_of(1, 2, 4)})], -1)",
            f"{h} * (torch.arange({n}) < {i})",
            f"torch.where(torch.arange({n}) < {i}, {h}, -{h})",
            f"{h}.masked_fill(torch.arange({n}) >= {i}, 0.5)",
            f"{h} * F.one_hot(torch.tensor({i}), {n})",
            f"{h} @ torch.eye({n}, dtype={h}.dtype)[:, :{i}]",
            f"{h}.tril({g.one_of(0, 1)})",
            f"{h}.cumsum(-1)",
            f"{h}.sort(-1).values",
            f"{h}.topk({min(i, 3)}, -1).values",
            f"{h}.repeat(1, 1, 2)",
            f"{h}.repeat_interleave(2, -1)",
            f"torch.cat([{h}[..., :{half}].flip(-1), {h}[..., {half}:]], -1)",
            f"{h}.diff(dim=-1)",
            f"{h} / {n} ** 0.5",
            f"{h} * ({h}.argmax(-1, keepdim=True) + 1)",
        )
    )


@kind(4)
def written(g):
    """An assignment, or a call in place, to a part of the features."""
    if g.coin(0.3):
        h = g.pick()
        y = g.let(f"{h}.clone()", "y")
    else:
        y = g.let(project(g, g.pick(), g.size()), "y")
    n = y.d
    a = g.rng.randrange(n - 1)
    b = g.rng.randrange(a + 1, n)
    at = g.one_of(
        f":{b}",
        f"{a}:{b}",
        f"-{b}:",
        f"{b}:",
        f"{a}",
        "-1",
        f"[{a}, {b}]",
        "::2",
        f"{a}::{g.one_of(2, 3)}",
        f"{a}:-1",
    )
    part = f"{y}[..., {at}]"
    line = g.one_of(
        f"{part} = {g.one_of(0.25, 0.0, -1e2)}",
        f"{part} = {g.one_of(0.25, -1.0)}",
        f"{part} = {part}.tanh()",
        f"{part} += 1",
        f"{part} *= {g.one_of(0.5, 2)}",
        f"{part} -= {part}.mean()",
        f"{part}.fill_(0.25)",
        f"{y}.narrow(-1, {a}, {b - a}).zero_()",
        f"{part}.mul_(2)",
        f"{y}.select(-1, {a}).add_(1)",
        f"{y}[..., :{b - a}].copy_({y}[..., {n - b + a}:].clone())",
        f"{y}.index_fill_(-1, torch.tensor([{a}, {b}]), 0.5)",
        f"{y} = torch.slice_scatter({y}, {y}[..., :{b - a}] * 0, -1, {a}, {b})",
        f"{y} = torch.select_scatter({y}, {y}[..., 0] * 0, -1, {a})",
        f"{y} = {y}.index_add(-1, torch.tensor([{a}, {b}]), {y}[..., :2].tanh())",
        f"{y}[:, 0] = {g.one_of(0.0, 0.5)}",
        f"{y}[:, 1:] = {y}[:, :-1].clone()",
        (
            f"{y}[0, {g.one_of(0, -1)}, {at}] = 0.5"
            if len(y.shape) > 2
            else f"{y}[0, {at}] = 0.5"
        ),
        f"{y}[..., {y}.shape[-1] // 2:] = 0.1",
        f"out = torch.zeros_like({y})\nout[..., {at}] = {part}\n{y} = out + {y}.tanh()",
    )
    g.run(line)
    g.keep(str(y))


@kind(1.5)
def written_in_a_loop(g):
    """A tensor that is filled piece by piece."""
    y, p, k = fused(g)
    name = g.new("h")
    one = g.one_of(*[e for e in PIECEWISE if "keepdim=True)" not in e[-14:]])
    at = f"i * {k}:(i + 1) * {k}"
    g.run(
        f"{name} = torch.{g.one_of('zeros', 'empty')}_like({y})\nfor i in range({p}):\n"
        f"    z = {y}[..., {at}]\n    {name}[..., {at}] = {one}"
    )
    g.keep(name)


@kind(1.5)
def in_place(g):
    h = g.pick()
    y = g.let(project(g, h, h.d), "y")
    g.run(
        g.one_of(
            f"{y}.add_({h})",
            f"{y} += {h}",
            f"{y}.mul_({g.param(h.d)})",
            f"{y}.relu_()",
            f"{y}.clamp_(-1, 1)",
            f"{y}.tanh_().add_(1)",
        )
    )
    g.keep(str(y))


@kind(2)
def unequal_split(g):
    h = g.pick()
    n = g.size()
    a = g.rng.randrange(1, n - 1)
    b = g.rng.randrange(a + 1, n) if g.coin() else n
    sizes = [a, b - a] + ([n - b] if b < n else [])
    y = g.let(project(g, h, n), "y")
    names = [g.new("u") for _ in sizes]
    g.run(f"{', '.join(names)} = {y}.split({sizes}, {g.one_of('-1', 'dim=-1')})")
    for name in names:
        if g.coin():
            g.keep(name)
    if g.coin(0.7):
        g.let(
            f"torch.cat([{', '.join(f'{act(g)}({x})' for x in g.rng.sample(names, len(names)))}], -1)"
        )


@kind(2)
def grouped_view(g):
    """Features as groups of constant size: a norm, a softmax or a weight within
    each."""
    y, p, k = fused(g)
    lead = f"*{y}.shape[:-1]"
    shape = g.one_of(f"{lead}, {p}, {k}", f"{lead}, {p}, -1", f"{lead}, -1, {k}")
    z = g.let(f"{y}.{g.one_of('view', 'reshape')}({shape})", "z")
    g.vars.remove(z)
    one = g.one_of(
        *(
            f"{z}.softmax({g.one_of(-1, -2)})",
            f"{z} * {g.param(p, 1)}",
            f"{z} * {g.param(k)}",
            f"{z}[..., 1:, :]",
            f"{z}[..., :2]",
        ),
        *(
            f"{z} / ({z}.norm(dim={g.one_of(-1, -2)}, keepdim=True) + 1)",
            f"{z}.flip(-2)",
            f"{z}.transpose(-1, -2)",
            f"{z}[..., 0, :] - {z}[..., 1, :]",
        ),
        *(
            f"{z}.mean(-2)",
            f"{z} @ {g.param(k, 3)}",
            f"torch.einsum('...pk,pkj->...pj', {z}, {g.param(p, k, 2)})",
            f"{z} - {z}[..., :1, :]",
        ),
    )
    w = g.let(one, "z")
    g.vars.remove(w)
    g.let(f"{w}.flatten(-2)" if len(w.shape) > len(y.shape) else f"{w}.tanh()")


@kind(1)
def reshaped(g):
    h = g.seq()
    d = h.d
    k = g.one_of(*[k for k in (2, 3, 4, 5) if d % k == 0])
    g.let(
        g.one_of(
            f"{g.linear(d, g.size())}({h}.reshape(-1, {d})).view(B, T, -1)",
            f"{h}.view(B, T, {k}, {d // k}).permute(0, 1, 3, 2).reshape(B, T, {d})",
            f"{h}.reshape(B, T * {k}, {d // k}).softmax(1).reshape(B, T, {d})",
            f"{g.linear(d // k, g.one_of(3, 4, 5))}({h}.view(B, T, {k},"
            f" {d // k})).flatten(2)",
            f"{h}.transpose(0, 1).reshape(T, B * {k}, {d // k}).transpose(0, 1)"
            f".reshape(B, {k}, T, -1).transpose(1, 2).flatten(2)",
            f"{h}.mean(1, keepdim=True) + {h}.amax(1, keepdim=True)",
            f"{h}[:, -1] * {h}[:, 0]",
            f"{h}.transpose(1, 2).flatten(0, 1).view(B, {d}, T).transpose(1, 2)",
        )
    )


@kind(1)
def along_the_sequence(g):
    h = g.seq()
    g.let(
        g.one_of(
            f"torch.cat([{h}[:, :1], {h}[:, 1:] - {h}[:, :-1]], 1)",
            f"F.pad({h}[:, :-1], (0, 0, 1, 0))",
            f"{h}.cumsum(1) / torch.arange(1, T + 1)[:, None]",
            f"({h} @ {h}.mT).softmax(-1) @ {h}",
            f"{h}.softmax(1)",
            f"{h}[:, torch.arange(T - 1, -1, -1)]",
            f"{h} + {g.param(12, h.d)}[:T]",
            f"{h} * torch.linspace(0, 1, T)[:, None].to({h})",
            f"torch.stack([{h}[:, t] for t in range(T)], 1)",
        )
    )
