"""What a line of notation says of a node."""

from math import prod
from typing import TypeAlias

from ...tracing.graph import Node, Value
from ..factors import Factor, fresh, length, unify
from ..findings import Findings
from .notation import LOOKED_UP, REST, WHOLE, Dim, Line, Name, Pattern, names_in
from .table import Rule, arg, every, signature, unknown

Factors: TypeAlias = dict[str, list[Factor]]  # those of each name that was met


class Misfit(Exception):
    """A line does not fit a node: what was expected, and what was found."""


def rule_of_line(line: Line, user: str = "") -> Rule:
    """The rule function of a line. One of a `user`, named so in errors, must fit the
    shapes that it meets; where another does not, nothing is known of the node."""

    def rule(node: Node, axes: Findings) -> None:
        try:
            _apply(line, node, axes)
        except Misfit as error:
            if user:
                raise ValueError(f"{user}: {error}") from None
            unknown(node, axes)

    return rule


def _apply(line: Line, node: Node, axes: Findings) -> None:
    effect = axes.effects[id(node)]
    factors = {name: fresh(_stated(node, of)) for name, of in line.lengths.items()}
    tensors = [arg(node, name) for name, a in signature(node.op).items() if a.is_tensor]
    for value, pattern in zip(tensors, line.inputs):
        if value is None:
            continue
        if pattern.is_addend:
            effect.bias = value.id
        for dim, found in zip(_input_dims(value, pattern), axes.dims(value)):
            unify(found, _bind(dim, length(found), factors))
            for name in dim:
                if name.mark == WHOLE:
                    axes.unsharded(node, value, factors[name.text])
    kept = {name.text for name in names_in(line.outputs)}
    for name in names_in(line.inputs):
        effect.lookup |= name.mark == LOOKED_UP
        if name.mark != WHOLE and name.text not in kept:
            axes.contract(node, factors.get(name.text, ()))
    for value, pattern in zip(node.outputs, line.outputs):
        axes.set(value, _output(value, pattern, factors))


def _stated(node: Node, of: str | int) -> int:
    """A length that is a number or an argument of the operator."""
    found = arg(node, of) if isinstance(of, str) else of
    return found if isinstance(found, int) else prod(found)


def _input_dims(value: Value, pattern: Pattern) -> list[Dim]:
    """The names of each dim of an input, which may lack the leftmost dims of its
    pattern."""
    ndim = len(value.shape)
    dims = _single(pattern, ndim - len(pattern.dims) + 1)
    if len(dims) < ndim:
        raise Misfit(
            f"expected a tensor of dims {pattern.text!r}, found shape {value.shape}"
        )
    return dims[len(dims) - ndim :]


def _output(value: Value, pattern: Pattern, factors: Factors) -> list[list[Factor]]:
    """The factors of each dim of an output. A dim of another length than its names' is
    new."""
    n = len(value.shape) - len(pattern.dims) + 1
    rest = sum(name.startswith(REST) for name in factors)
    dims = _single(pattern, n, rest)
    if len(dims) != len(value.shape):
        raise Misfit(
            f"expected a result of dims {pattern.text!r}, found shape {value.shape}"
        )
    named = [_bind(dim, n, factors) for dim, n in zip(dims, value.shape)]
    return [d if length(d) == n else fresh(n) for d, n in zip(named, value.shape)]


def _single(pattern: Pattern, n: int, rest: int | None = None) -> list[Dim]:
    """A pattern's dims, with n single ones for the rest, numbered from the right;
    `rest` for one that inputs have."""
    dims: list[Dim] = []
    for dim in pattern.dims:
        text, mark = dim[0]
        count = n if rest is None or text != REST else rest
        many = [(Name(f"{text}{i}", mark),) for i in range(-count, 0)]
        dims += many if text.endswith(REST) else [dim]
    return dims


def _bind(dim: Dim, n: int, factors: Factors) -> list[Factor]:
    """The factors of the names of a dim of length n. A name that was not met is as long
    as the others leave; nor was one met that broadcast."""
    names = [name.text for name in dim]
    may_broadcast = len(names) == 1 and n > 1
    new = [
        name
        for name in names
        if name not in factors or may_broadcast and not factors[name]
    ]
    given = prod(length(factors[name]) for name in names if name not in new)
    for name in new:
        factors[name] = fresh(n // max(given, 1))
    found = every(factors[name] for name in names)
    if len(names) > 1 and length(found) != n:
        lengths = " x ".join(str(length(factors[name])) for name in names)
        raise Misfit(
            f"expected a dim ({' '.join(names)}) of length {lengths}, found {n}"
        )
    return found
