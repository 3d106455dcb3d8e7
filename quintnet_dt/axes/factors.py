"""Factors: what a dim is made of. Operators say which factors are the same; a
union-find merges them, and splits one where a view does.

A factor that `split` or a slice cuts in unequal pieces ([q | k | v]) has factors of its
own in each piece."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Optional


@dataclass(eq=False, slots=True)
class Factor:
    """A part of a dim, `size` long. One that was merged with another has a `parent`,
    one that was split in two has `parts`, outer and inner. `unshardable`: operators cut
    it at places that have no factors in common, so that it cannot be sharded.
    `joined`: its pieces were only put together; where it is cut otherwise, it is one of
    its own, without them."""

    size: int
    parent: Optional["Factor"] = None
    parts: list["Factor"] | None = None
    pieces: list[list["Factor"]] | None = None
    unshardable: bool = False
    joined: bool = False

    def root(self) -> "Factor":
        """What this factor was merged into."""
        f = self
        while f.parent is not None:
            f = f.parent
        if self is not f:
            self.parent = f  # a shorter way next time
        return f

    def __repr__(self) -> str:
        return f"<{self.size}>"


def fresh(size: int) -> list[Factor]:
    """The factors of a dim of which nothing is known: its own. One of size 1 has
    none."""
    return [Factor(size)] if size != 1 else []


def length(factors: Iterable[Factor]) -> int:
    """How long a dim of these factors is."""
    return prod(f.size for f in factors)


def leaves(factors: Iterable[Factor]) -> list[Factor]:
    """The unsplit factors that `factors` stand for, outermost first."""
    out = []
    for f in factors:
        f = f.root()
        out += leaves(f.parts) if f.parts else [f]
    return out


def flat(factors: Iterable[Factor]) -> Iterator[Factor]:
    """Leaves, and those within the pieces of a leaf."""
    for f in leaves(factors):
        yield f
        for piece in f.pieces or ():
            yield from flat(piece)


def join(dims: list[list[Factor]]) -> list[Factor]:
    """The factors of a dim that is some dims, one after the other."""
    first, *others = [leaves(dim) for dim in dims]
    if all(other == first for other in others):
        return [*fresh(len(dims)), *first]
    sizes = [length(dim) for dim in dims]
    return [Factor(sum(sizes), pieces=list(dims), joined=True)]


def _cut(leaf: Factor, outer: int) -> list[Factor]:
    _forget_joined(leaf)
    unshardable = leaf.unshardable or leaf.pieces is not None
    leaf.parts = [
        Factor(size, unshardable=unshardable) for size in (outer, leaf.size // outer)
    ]
    return leaf.parts


def _forget_joined(leaf: Factor) -> None:
    if leaf.joined:
        leaf.pieces, leaf.joined = None, False


def in_pieces(factors: list[Factor], sizes: list[int]) -> bool:
    """Whether a dim is known to be pieces of these sizes."""
    f, *more = leaves(factors)
    return not more and f.pieces is not None and _piece_sizes(f) == sizes


def _piece_sizes(leaf: Factor) -> list[int]:
    return [length(part) for part in leaf.pieces or ()]


def piece(factors: list[Factor], start: int, size: int) -> list[Factor] | None:
    """The factors of a part of a dim, which need not divide it; None where that is
    several factors, or cut elsewhere."""
    f, *more = leaves(factors)
    if more:
        return None
    if size == f.size:
        return [f]
    if f.pieces is None:
        f.pieces = [fresh(n) for n in (start, size, f.size - start - size) if n]
    for part in f.pieces:
        here = length(part)
        if start + size <= here:
            if start < 0:
                return None
            return part if size == here else piece(part, start, size)
        start -= here
    return None


def take(factors: list[Factor], size: int) -> tuple[list[Factor], list[Factor]] | None:
    """Split a list of factors into (the outer ones that make `size`, the rest), or None
    if none can be cut there."""
    rest, outer = leaves(factors), []
    while size > 1:
        if not rest:
            return None
        leaf = rest[0]
        if size % leaf.size == 0:
            size //= leaf.size
            outer.append(rest.pop(0))
        elif leaf.size % size == 0:
            rest[:1] = _cut(leaf, size)
        else:
            return None
    return outer, rest


def unify(xs: Iterable[Factor], ys: Iterable[Factor]) -> None:
    """Say that two lists of factors are the same positions of the same axes."""
    while (xs := leaves(xs)) and (ys := leaves(ys)):
        a, b = xs[0], ys[0]
        if a.size == b.size:
            if a is not b:
                _merge(a, b)
            xs, ys = xs[1:], ys[1:]
        elif a.size % b.size == 0:
            _cut(a, b.size)
        elif b.size % a.size == 0:
            _cut(b, a.size)
        else:  # 8 x 3 against 6 x 4: no common refinement
            return mark_unshardable(xs + ys)


def mark_unshardable(factors: Iterable[Factor]) -> None:
    for f in leaves(factors):
        f.unshardable = True


def _merge(a: Factor, b: Factor) -> None:
    b.parent = a
    a.unshardable |= b.unshardable
    if _cut_apart(a, b):  # what was only put together gives way, of two the second
        _forget_joined(b if b.joined else a)
    if a.pieces is None:
        a.pieces, a.joined = b.pieces, b.joined
    elif _cut_apart(a, b):
        a.unshardable = True
    elif b.pieces is not None and not a.unshardable:
        a.joined &= b.joined
        for p, q in zip(a.pieces, b.pieces):
            unify(p, q)


def _cut_apart(a: Factor, b: Factor) -> bool:
    """Whether both are pieces, of other sizes."""
    both = a.pieces is not None and b.pieces is not None
    return both and _piece_sizes(a) != _piece_sizes(b)
