"""How the fuzzer writes a program: statement by statement, each one run at once on three sizes of input, so that the
shapes that the next one needs are known, and what does not run is not written."""

import random
import re

import torch
from torch import nn

from .programs import NAMES, Call, Input, Program, Runner, build

SIZES = [3, 5, 6, 7, 8, 9, 10, 12, 12, 14, 15, 16, 18, 18, 20, 21, 24]


KINDS = {}  # {function of a Scope that writes a statement of one kind: how often it is tried}


def kind(weight):
    def register(f):
        KINDS[f] = weight
        return f

    return register


class Unsuited(Exception):
    """A kind of statement finds nothing here to work on."""


class Var(str):
    """The name of a float tensor in a forward; its dims are numbers, "B", "T", or "?" where calls change it otherwise."""

    def __new__(cls, name, shape):
        self = super().__new__(cls, name)
        self.shape = shape
        return self

    @property
    def d(self):
        return self.shape[-1]


class Scope:
    """One class as it is written: `init` and `body` are its lines, `holder` the module so far, `frames` the names in
    its forward for each of the sizes."""

    def __init__(self, rng, name, path, sizes, later, given):
        self.rng, self.name, self.path, self.sizes = rng, name, path, sizes
        self.init, self.body, self.vars, self.layers, self.classes, self.kinds = [], [], [], [], [], []
        self.later = later  # statements that a later call may start with
        self.holder, self.given, self.count = nn.Module(), list(given), 0
        names = {**NAMES, "s": self.holder, "SEEN": []}
        self.frames = [{**names, **{k: v[i] for k, v in given.items()}} for i in range(len(sizes))]
        for x in given:
            if self.frames[0][x].is_floating_point():
                self.vars.append(Var(x, self.shape_of(x)))
        first = next(iter(given))
        if self.shape_of(first)[:2] == ("B", "T"):
            self.run(f"B, T = {first}.shape[:2]")

    # ---- choices

    def coin(self, p=0.5):
        return self.rng.random() < p

    def pick(self, ok=lambda h: True, recent=3):
        """A variable with at least two dims and features last, one of the latest rather than an early one."""
        fit = [h for h in self.vars if len(h.shape) > 1 and isinstance(h.d, int) and h.d > 1 and ok(h)]
        if not fit:
            raise Unsuited
        return self.rng.choice(fit[-recent:] if self.coin(0.85) else fit)

    def seq(self, ok=lambda h: True):
        """A variable of (B, T, features)."""
        return self.pick(lambda h: h.shape[:-1] == ("B", "T") and ok(h))

    def size(self):
        return self.rng.choice(SIZES)

    def one_of(self, *options):
        return self.rng.choice(options)

    # ---- writing

    def new(self, stem):
        self.count += 1
        return f"{stem}{self.count}"

    def own(self, expression, stem="fc"):
        """Writes a line of __init__; returns "s.<name>"."""
        name = self.new(stem)
        line = f"s.{name} = {expression}"
        exec(line, {**NAMES, **{c.name: c.made for c in self.classes}, "s": self.holder})
        self.init.append(line)
        return f"s.{name}"

    def param(self, *shape, scale=0.3):
        return self.own(f"nn.Parameter(torch.randn({', '.join(map(str, shape))}) * {scale})", "w")

    def linear(self, d, n, bias=None):
        layer = self.own(f"nn.Linear({d}, {n})" if bias or bias is None and self.coin(0.7) else _no_bias(d, n))
        self.layers.append((layer, d))
        return layer

    def buffer(self, expression):
        name = self.new("buf")
        line = f's.register_buffer("{name}", {expression})'
        exec(line, {**NAMES, "s": self.holder})
        self.init.append(line)
        return f"s.{name}"

    def run(self, line):
        """Writes a statement of the forward (or several), and runs it."""
        for frame in self.frames:
            exec(line, frame)
        self.body += line.split("\n")

    def let(self, expression, stem="h"):
        name = self.new(stem)
        self.run(f"{name} = {expression}")
        return self.keep(name)

    def keep(self, name):
        """A name that a statement made is a variable from here on."""
        for frame in self.frames:
            x = frame[name]
            fit = x.dtype == torch.float64 and x.numel() <= 20000 and x.isfinite().all() and x.abs().max() < 1e3
            if not fit:
                raise Unsuited
        var = Var(name, self.shape_of(name))
        self.vars = [v for v in self.vars if v != name] + [var]
        return var

    def shape_of(self, name):
        shapes = [frame[name].shape for frame in self.frames]
        if len({len(s) for s in shapes}) > 1:
            raise Unsuited
        return tuple(dim_of(dims, self.sizes) for dims in zip(*shapes))

    def attempt(self, kind):
        """Writes a statement of a kind, or leaves everything as it was."""
        lists = "init", "body", "vars", "layers", "classes", "later"
        lengths = {name: list(getattr(self, name)) for name in lists}
        frames, holder, count = [dict(f) for f in self.frames], dict(vars(self.holder)), self.count
        inner = {k: dict(vars(self.holder)[k]) for k in ("_parameters", "_buffers", "_modules")}
        try:
            kind(self)
        except Exception:  # whatever the whole model says to this statement here
            for name, items in lengths.items():
                getattr(self, name)[:] = items
            self.frames, self.count = frames, count
            vars(self.holder).clear()
            vars(self.holder).update({**holder, **inner})
            return
        self._drop_unread(len(lengths["init"]), "\n".join(self.body[len(lengths["body"]) :]))
        self.kinds.append(kind.__name__)

    def _drop_unread(self, start, body):
        """Takes back what a statement owns and does not read."""
        for line in self.init[start:]:
            name = re.match(r's\.(\w+) =|s\.register_buffer\("(\w+)"', line)
            name = name[1] or name[2]
            if not re.search(rf"\bs\.{name}\b", body) and "kept" not in line:
                self.init.remove(line)
                delattr(self.holder, name)
                self.layers[:] = [layer for layer in self.layers if layer[0].split(".")[1] != name]
                self.later[:] = [
                    line for line in self.later if not re.search(rf"\bm\.{re.escape(self.path)}{name}\b", line)
                ]

    def child(self, h, name, attr):
        """A scope for a module that is called on `h`."""
        given = {"x": [frame[h] for frame in self.frames]}
        child = Scope(self.rng, name, f"{self.path}{attr}.", self.sizes, self.later, given)
        child.choice = self.choice
        return child

    def close(self, returned):
        """Ends the class: its lines are compiled, so that it can be made. Returns the class."""
        self.returned = returned
        names = {**NAMES, **{c.name: c.made for c in self.classes}}
        exec(self.source(), names)
        self.made = names[self.name]
        return self.made

    def source(self):
        lines = [f"class {self.name}(nn.Module):", "    def __init__(s):", "        super().__init__()"]
        lines += [f"        {line}" for line in self.init]
        lines += [f"    def forward(s, {', '.join(self.given)}):"]
        lines += [f"        {line}" for line in self.body]
        lines += [f"        return {self.returned}"]
        inner = [c.source() for c in self.classes]
        return "\n".join([*inner, *lines, ""])


def _no_bias(d, n):
    return f"nn.Linear({d}, {n}, bias=False)"


def dim_of(dims, sizes):
    if len(set(dims)) == 1:
        return dims[0]
    for letter in "B", "T":
        if all(d == size[letter] for d, size in zip(dims, sizes)):
            return letter
    return "?"


# ---- whole programs


def _sizes(rng):
    b, t = rng.choice([2, 3, 4]), rng.choice([4, 5, 6, 7])
    longer = rng.choice([n for n in (3, 5, 6, 8, 9) if n != t])
    return [{"B": b, "T": t}, {"B": rng.choice([n for n in (1, 2, 3, 5) if n != b]), "T": t}, {"B": b, "T": longer}]


def _inputs(rng):
    d = rng.choice(SIZES)
    x = Input("x", ("B", "T", d) if rng.random() < 0.85 else ("B", d), grad=rng.random() < 0.8)
    if rng.random() < 0.2:
        x = Input("ids", ("B", "T"), below=rng.choice([16, 18, 20, 24, 30]))
    more = []
    if rng.random() < 0.2:
        more.append(Input("y", ("B", "T", rng.choice([d, *SIZES]))))
    if rng.random() < 0.15 and x.name == "x":
        more.append(Input("target", ("B", "T"), below=rng.choice([5, 6, 9, 12])))
    return [x, *more]


WAYS = {
    "backward": 3,
    "no_grad": 1,
    "inference": 1,
    "checkpoint": 1.5,
    "second": 1,
    "refill": 1,
    "eval": 1,
    "later": 3,
    "step": 1,
}


def _calls(rng, scope, ways):
    """The traced call again, then others."""
    calls = [Call(seed=1), Call(seed=2)] if rng.random() < 0.4 else [Call(seed=1)]
    ways = {way: weight for way, weight in ways.items() if way != "later" or scope.later}
    for i in range(3, 3 + rng.choice([0, 1, 1, 1, 2])):
        if not ways:
            break
        how, size = rng.choices(list(ways), list(ways.values()))[0], rng.choice([0, 0, 1, 2])
        if how == "refill":
            detail = rng.choice(["inference", "data", "numpy", "copy_"])
            calls += [Call(how, size, seed=10 * i + j, detail=detail) for j in range(3)]
        elif how == "eval":
            calls.append(Call(rng.choice(["backward", "no_grad"]), size, seed=i, before="m.eval()"))
            drops = [line for line in scope.later if line.endswith(".train()")]
            if drops and rng.random() < 0.5:
                calls.append(Call("no_grad", size, seed=i, before=rng.choice(drops)))
            else:
                calls.append(Call("backward", size, seed=i + 100, before="m.train()"))
        elif how == "later":
            calls.append(Call("backward", size, seed=i, before=rng.choice(scope.later)))
        else:
            calls.append(Call(how, size, seed=i))
    return calls


FIRST = [
    "list(m.parameters())[{i}].register_hook(lambda g: g * 0.5)",
    "list(m.parameters())[{i}].register_post_accumulate_grad_hook(lambda p: p.grad.mul_(0.5))",
    "list(m.parameters())[{i}].requires_grad_(False)",
    "list(m.modules())[{j}].register_forward_hook(lambda s, i, o: (o * 2) if torch.is_tensor(o) else None)",
    "m.apply(lambda s: [p.requires_grad_(p.dim() > 1) for p in s.parameters(recurse=False)])",
]


def chosen(only, without):
    """({kind of statement: weight}, {way of a call: weight}) but those that a user does not want."""
    kinds = {k: w for k, w in KINDS.items() if k.__name__ not in without}
    ways = {k: w for k, w in WAYS.items() if k not in without}
    some_kinds = {k: w for k, w in kinds.items() if k.__name__ in only}
    some_ways = {k: w for k, w in ways.items() if k in only}
    return some_kinds or kinds, some_ways if only else ways


def write(seed, attempt=0, only=(), without=()):
    """A program of a seed, unchecked; None where nothing could be written."""
    kinds, ways = chosen(only, without)
    rng = random.Random(f"{seed}/{attempt}")
    torch.manual_seed(rng.randrange(1 << 30))
    sizes, inputs = _sizes(rng), _inputs(rng)
    given = {i.name: [i.make(size, torch.Generator().manual_seed(1)) for size in sizes] for i in inputs}
    for i in inputs:
        if i.grad and not i.below:
            given[i.name] = [x.requires_grad_() for x in given[i.name]]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        scope = Scope(rng, "Net", "", sizes, ["[p.data.mul_(0.9) for p in m.parameters()]"], given)
        fill(scope, rng.choice([1, 1, 2, 2, 2, 3, 3, 4, 6]), kinds)
        if not list(scope.holder.parameters()):
            return None
        scope.close(_returned(scope))
    finally:
        torch.set_default_dtype(default)
    program = Program(seed, scope.source(), inputs, sizes, [], contiguous=rng.random() < 0.2, kinds=_kinds(scope))
    if rng.random() < 0.12 and "backward" in ways:
        counts = {"i": len(list(scope.holder.parameters())), "j": len(list(scope.holder.modules()))}
        program.first = rng.choice(FIRST).format(**{k: rng.randrange(n) for k, n in counts.items()})
    program.calls = _calls(rng, scope, ways)
    if any(c.how == "step" for c in program.calls):
        program.optimizer = rng.choice(["before", "after"])
    if rng.random() < (0.5 if any(c.how == "refill" for c in program.calls) else 0.15):
        fit = [(n, d) for n, p in build(program).named_parameters() for d, k in enumerate(p.shape) if k > 4]
        program.plan = dict([rng.choice(fit)]) if fit else {}
    return program


def fill(scope, n, kinds=None):
    """Writes n statements, of kinds chosen at random, where they fit; by default those of the scope around."""
    scope.choice = kinds = kinds or scope.choice
    tries = 0
    while len(scope.kinds) < n and tries < 6 * n:
        scope.attempt(scope.rng.choices(list(kinds), list(kinds.values()))[0])
        tries += 1


def _kinds(scope):
    return [k for c in scope.classes for k in _kinds(c)] + scope.kinds


def _returned(scope):
    """What a forward returns: the last variable, and most of those that nothing reads."""
    text, made = "\n".join(scope.body), [v for v in scope.vars if v not in scope.given]
    if not made:
        return scope.vars[-1]
    unread = [v for v in made[:-1] if text.count(v) == 1 and scope.coin(0.7)]
    returned = [*unread[-3:], made[-1]]
    if len(returned) == 1 and scope.coin(0.8):
        return returned[0]
    if scope.coin(0.3):
        return "{" + ", ".join(f'"{v}": {v}' for v in returned) + "}"
    return ", ".join(returned) + ("," if len(returned) == 1 else "")


def fitting(program):
    """The calls of a program, in their order, that the whole model makes with finite results; none where it cannot be
    built. Not on a process that forks later: it runs backwards."""
    try:
        runner, calls = Runner(program, build(program)), []
        runner.make_optimizer()
    except Exception:  # whatever is wrong with it
        return []
    for call in program.calls:
        try:
            if all(_sound(x) for x in runner.call(call).values()):
                calls.append(call)
        except Exception:
            continue
    return calls


def works(program):
    return len(fitting(program)) == len(program.calls)


def _sound(x):
    return not torch.is_tensor(x) or not x.is_floating_point() or bool(x.isfinite().all() and (x.abs() < 1e6).all())


def program_of(seed, only=(), without=()):
    """The program of a seed, on which the whole model runs."""
    for attempt in range(50):
        program = write(seed, attempt, only, without)
        for _ in range(3 if program else 0):
            fit = fitting(program)
            if fit and fit == program.calls:
                return program
            if fit[:1] != program.calls[:1]:
                break
            program.calls = fit
    raise RuntimeError(f"seed {seed}: none of 50 programs runs on the whole model")
