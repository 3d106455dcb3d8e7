"""Statements of the fuzzer's programs: buffers, vocabularies, losses, branches, what is
kept, gradients within."""

from .layers import act, project
from .scope import Unsuited, kind

# ---- buffers, vocabularies, losses


@kind(1.5)
def buffered(g):
    h = g.pick()
    if g.coin():
        b = g.buffer(
            g.one_of(
                f"torch.rand({h.d})",
                f"torch.arange({h.d}) % 2",
                f"torch.arange({h.d}) > {h.d // 2}",
            )
        )
        if "rand" in g.init[-1]:
            g.later += [
                f"m.{g.path}{b[2:]}.data.copy_(torch.linspace(0, 1, {h.d}))",
                f"m.{g.path}{b[2:]}.mul_(0.5)",
            ]
        g.let(g.one_of(f"{h} * {b}", f"{h} + {b}"))
        return
    b = g.buffer(f"torch.zeros({h.d})")
    new = g.one_of(
        f"{h}.detach().flatten(0, -2).mean(0)",
        f"{h}.detach().abs().flatten(0, -2).amax(0)",
    )
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
        v = g.one_of(30, 32, 36, 40, 50, 64)
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
            g.one_of(
                f"{h} @ {e}.weight.t()",
                f"F.linear({h}, {e}.weight)",
                f"{g.linear(h.d, v, bias=False)}({h})",
            ),
            "logits",
        )
    else:
        h = g.pick()
        v = g.one_of(12, 14, 16, 18, 20, 24)
        if h.d == 1:
            raise Unsuited
        table = g.own(f"nn.Embedding({v}, {h.d})", "emb")
        which = (
            g.let(f"{h} + {table}((({h}.mean(-1) * 7).long() % {v}))")
            if g.coin(0.3)
            else h
        )
        logits = g.let(
            g.one_of(
                f"{g.linear(h.d, v, bias=g.coin(0.4))}({which})",
                f"{which} @ {table}.weight.t()",
            ),
            "logits",
        )
    if g.coin(0.65):
        real = g.one_of(
            v - g.rng.randint(1, v // 2), v - 2, v - 4, v - 8, v // 4 * 3, v // 2
        )
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
    if g.coin(0.7):
        loss(g, logits, ids)


@kind(1.5)
def loss_of_targets(g):
    loss(g, g.pick(lambda h: len(h.shape) == 3), [n for n in g.given if n == "target"])


def loss(g, logits, ids):
    bound = {"target": 12, "ids": 30}.get(ids[0], 99) if ids else 1
    index = (
        f"{ids[0]}.flatten()" if ids else f"{logits}.detach().flatten(0, -2).argmax(-1)"
    )
    index = f"{index} % {logits.d}" if bound > logits.d else index
    options, flat = "", f"{logits}.flatten(0, -2)"
    if g.coin(0.4):
        name = g.new("weights")
        g.init.append(f"s.{name} = None")
        setattr(g.holder, name, None)
        g.later += [
            f"m.{g.path}{name} = torch.linspace(0.1, 3, {logits.d},"
            " dtype=torch.float64)"
        ] * 2
        options = f", weight=s.{name}"
    options += g.one_of(
        "", "", ", label_smoothing=0.1", ", reduction='sum'", ", ignore_index=0"
    )
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
        f"if {test}:\n    {name} = {other}\nelse:\n    "
        f"{name} = {g.one_of(f'{h} * 0.5', f'{h}.tanh()', project(g, h, h.d))}"
    )
    g.keep(name)


@kind(1)
def kept(g):
    """A tensor that is kept: in a list on the module, in one of the file, on an
    object."""
    h = g.let(project(g, g.pick(), g.size()))
    h = g.let(f"{h}.{g.one_of('tanh()', 'softmax(-1)')}") if g.coin() else h
    value = f"{h}{'.detach()' if g.coin() else ''}"
    if g.coin():
        g.run(f"SEEN.append({value})")
        return
    if not hasattr(g.holder, "kept"):
        g.init.append("s.kept = []")
        g.holder.kept = []
    g.run(
        g.one_of(
            f"s.kept = [{value}]",
            f"s.kept.clear()\ns.kept.append({value})",
            f"s.kept = {{'h': {value}}}",
        )
    )


@kind(0.7)
def gradient_within(g):
    h = g.pick()
    y = g.let(f"{act(g)}({project(g, h, g.size())})")
    lines = ["with torch.enable_grad():", f"    z = {h}.detach().requires_grad_()"]
    fc = g.linear(h.d, 4)
    name = g.new("h")
    lines += [
        f"    {name}, = torch.autograd.grad({fc}(z).tanh().sum(), z, create_graph=True)"
    ]
    g.run("\n".join(lines))
    g.keep(name)
    g.vars.insert(0, y)


@kind(0.4)
def loop_over_time(g):
    """A recurrence written in Python."""
    h, n = g.seq(), g.size()
    a, b = g.linear(h.d, n), g.linear(n, n)
    g.run(
        f"state, out = {h}.new_zeros(B, {n}), []\nfor t in range(T):\n"
        f"    state = torch.tanh({a}({h}[:, t]) + {b}(state))\n    out.append(state)"
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
