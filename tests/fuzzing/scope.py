"""How the fuzzer writes a program: statement by statement, each one run at once on
three sizes of input, so that the shapes that the next one needs are known, and what
does not run is not written."""

import re

import torch
from torch import nn

from .programs import NAMES

SIZES = [3, 5, 6, 7, 8, 9, 10, 12, 12, 14, 15, 16, 18, 18, 20, 21, 24]


# {function of a Scope that writes a statement of one kind: how often it is tried}
KINDS = {}


def kind(weight):
    def register(f):
        KINDS[f] = weight
        return f

    return register


class Unsuited(Exception):
    """A kind of statement finds nothing here to work on."""


class Var(str):
    """The name of a float tensor in a forward; dims are numbers, "B", "T", or "?" where
    calls change it otherwise."""

    def __new__(cls, name, shape):
        self = super().__new__(cls, name)
        self.shape = shape
        return self

    @property
    def d(self):
        return self.shape[-1]


class Scope:
    """One class as it is written: `init` and `body` are its lines, `holder` the module
    so far, `frames` the names in its forward for each of the sizes."""

    def __init__(self, rng, name, path, sizes, later, given):
        self.rng, self.name, self.path, self.sizes = rng, name, path, sizes
        self.init, self.body, self.vars, self.layers, self.classes, self.kinds = (
            [],
            [],
            [],
            [],
            [],
            [],
        )
        self.later = later  # statements that a later call may start with
        self.holder, self.given, self.count = nn.Module(), list(given), 0
        names = {**NAMES, "s": self.holder, "SEEN": []}
        self.frames = [
            {**names, **{k: v[i] for k, v in given.items()}} for i in range(len(sizes))
        ]
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
        """A variable with at least two dims and features last, one of the latest rather
        than an early one."""
        fit = [
            h
            for h in self.vars
            if len(h.shape) > 1 and isinstance(h.d, int) and h.d > 1 and ok(h)
        ]
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
        exec(
            line, {**NAMES, **{c.name: c.made for c in self.classes}, "s": self.holder}
        )
        self.init.append(line)
        return f"s.{name}"

    def param(self, *shape, scale=0.3):
        return self.own(
            f"nn.Parameter(torch.randn({', '.join(map(str, shape))}) * {scale})", "w"
        )

    def linear(self, d, n, bias=None):
        layer = self.own(
            f"nn.Linear({d}, {n})"
            if bias or bias is None and self.coin(0.6)
            else _no_bias(d, n)
        )
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
            fit = (
                x.dtype == torch.float64
                and x.numel() <= 20000
                and x.isfinite().all()
                and x.abs().max() < 1e3
            )
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
        frames, holder, count = (
            [dict(f) for f in self.frames],
            dict(vars(self.holder)),
            self.count,
        )
        inner = {
            k: dict(vars(self.holder)[k])
            for k in ("_parameters", "_buffers", "_modules")
        }
        try:
            kind(self)
        except Exception:  # whatever the whole model says to this statement here
            for name, items in lengths.items():
                getattr(self, name)[:] = items
            self.frames, self.count = frames, count
            vars(self.holder).clear()
            vars(self.holder).update({**holder, **inner})
            return
        self._drop_unread(
            len(lengths["init"]), "\n".join(self.body[len(lengths["body"]) :])
        )
        self.kinds.append(kind.__name__)

    def _drop_unread(self, start, body):
        """Takes back what a statement owns and does not read."""
        for line in self.init[start:]:
            name = re.match(r's\.(\w+) =|s\.register_buffer\("(\w+)"', line)
            name = name[1] or name[2]
            if not re.search(rf"\bs\.{name}\b", body) and "kept" not in line:
                self.init.remove(line)
                delattr(self.holder, name)
                self.layers[:] = [
                    layer for layer in self.layers if layer[0].split(".")[1] != name
                ]
                self.later[:] = [
                    line
                    for line in self.later
                    if not re.search(rf"\bm\.{re.escape(self.path)}{name}\b", line)
                ]

    def child(self, h, name, attr):
        """A scope for a module that is called on `h`."""
        given = {"x": [frame[h] for frame in self.frames]}
        child = Scope(
            self.rng, name, f"{self.path}{attr}.", self.sizes, self.later, given
        )
        child.choice = self.choice
        return child

    def close(self, returned):
        """Ends the class: its lines are compiled, so that it can be made. Returns the
        class."""
        self.returned = returned
        names = {**NAMES, **{c.name: c.made for c in self.classes}}
        exec(self.source(), names)
        self.made = names[self.name]
        return self.made

    def source(self):
        lines = [
            f"class {self.name}(nn.Module):",
            "    def __init__(s):",
            "        super().__init__()",
        ]
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


def fill(scope, n, kinds=None):
    """Writes n statements, of kinds chosen at random, where they fit; by default those
    of the scope around."""
    scope.choice = kinds = kinds or scope.choice
    tries = 0
    while len(scope.kinds) < n and tries < 6 * n:
        scope.attempt(scope.rng.choices(list(kinds), list(kinds.values()))[0])
        tries += 1
