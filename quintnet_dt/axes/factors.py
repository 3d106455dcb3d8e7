"""Factors: what a dim is made of. Operators say which factors are the same; a union-find merges
them, and splits one where a view does.

A factor that `split` or a slice cuts in unequal pieces ([q | k | v]) has factors of its own in each
piece."""

from math import prod


class Factor:
    """A part of a dim, `size` long; merged with others by `unify`, and split in two (outer, inner)
    by `take`."""

    __slots__ = ("size", "parent", "parts", "pieces", "opaque")

    def __init__(self, size):
        self.size, self.parent, self.parts, self.pieces, self.opaque = size, None, None, None, False

    def root(self):
        f = self
        while f.parent is not None:
            f = f.parent
        if self is not f:
            self.parent = f  # a shorter way next time
        return f

    def __repr__(self):
        return f"<{self.size}>"


def leaves(factors):
    """The unsplit factors that `factors` stand for, outermost first."""
    out = []
    for f in factors:
        f = f.root()
        out += leaves(f.parts) if f.parts else [f]
    return out


def flat(factors):
    """Leaves, and those within the pieces of a leaf."""
    for f in leaves(factors):
        yield f
        yield from (g for piece in f.pieces or () for g in flat(piece))


def _cut(leaf, outer):
    leaf.parts = [Factor(outer), Factor(leaf.size // outer)]
    for part in leaf.parts:
        part.opaque = leaf.opaque or leaf.pieces is not None
    return leaf.parts


def piece(factors, start, length):
    """The factors of a part of a dim, which need not divide it; None where that is several factors,
    or cut elsewhere."""
    f, *more = leaves(factors)
    if more:
        return None
    if length == f.size:
        return [f]
    if f.pieces is None:
        f.pieces = [
            [Factor(size)] if size > 1 else []
            for size in (start, length, f.size - start - length)
            if size
        ]
    for part in f.pieces:
        size = prod(g.size for g in leaves(part))
        if start + length <= size:
            return None if start < 0 else part if length == size else piece(part, start, length)
        start -= size


def take(factors, size):
    """Split a list of factors into (the outer ones that make `size`, the rest), or None if none can
    be cut there."""
    rest, got = leaves(factors), []
    need = size
    while need > 1:
        if not rest:
            return None
        leaf = rest[0]
        if need % leaf.size == 0:
            need //= leaf.size
            got.append(rest.pop(0))
        elif leaf.size % need == 0:
            rest[:1] = _cut(leaf, need)
        else:
            return None
    return got, rest


def unify(xs, ys):
    """Say that two lists of factors are the same positions of the same axes."""
    xs, ys = leaves(xs), leaves(ys)
    while xs and ys:
        a, b = xs[0], ys[0]
        if a is b:
            xs.pop(0), ys.pop(0)
        elif a.size == b.size:
            b.parent, a.opaque = a, a.opaque or b.opaque
            a.pieces, others = a.pieces or b.pieces, b.pieces
            if others not in (None, a.pieces):
                same = [
                    [prod(f.size for f in p) for p in map(leaves, cut)]
                    for cut in (a.pieces, others)
                ]
                a.opaque |= same[0] != same[1]
                for p, q in zip(a.pieces, others) if not a.opaque else ():
                    unify(p, q)
            xs, ys = leaves(xs[1:]), leaves(ys[1:])
        elif a.size % b.size == 0:
            _cut(a, b.size)
            xs, ys = leaves(xs), leaves(ys)
        elif b.size % a.size == 0:
            _cut(b, a.size)
            xs, ys = leaves(xs), leaves(ys)
        else:  # 8 x 3 against 6 x 4: no common refinement
            for f in xs + ys:
                f.opaque = True
            return
