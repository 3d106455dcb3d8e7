"""What every rule is made with: the table of rules, and the few things that they say of
a node.

A rule is a function (node, axes) that sets the dims of the node's outputs (`axes.set`),
and says which factors of its inputs the operator sums over (`axes.contract`) or needs
whole (`axes.unsharded`). An operator without a rule is assumed to need every dim whole,
which is always right, never fast.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

from ...tracing.graph import Node, Value
from ..factors import Factor, fresh, unify
from ..findings import Findings

Rule: TypeAlias = Callable[[Node, Findings], None]

RULES: dict[str, Rule] = {}  # by the operator's name, that of aten's without "aten::"


def rule(names: str) -> Callable[[Rule], Rule]:
    """Enter a function as the rule of operators."""

    def add(f: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), f))
        return f

    return add


def unknown(node: Node, axes: Findings) -> None:
    """Everything is needed whole."""
    for v in node.inputs:
        axes.unsharded(node, v, every(axes.dims(v)))
    for v in node.outputs:
        if v.id in node.mutated or any(v is x for x in node.inputs):
            axes.unsharded(node, v, every(axes.dims(v)))


def every(dims: Iterable[list[Factor]]) -> list[Factor]:
    """All factors of some dims."""
    return [f for d in dims for f in d]


class Argument(NamedTuple):
    """An argument of an operator's schema."""

    position: int
    default: Any
    is_tensor: bool


@functools.cache
def signature(op: Any) -> dict[str, Argument]:
    """An operator's arguments by name."""
    return {
        a.name: Argument(
            i, a.default_value, str(a.type) in ("Tensor", "Optional[Tensor]")
        )
        for i, a in enumerate(op._schema.arguments)
    }


def arg(node: Node, name: str) -> Any:
    """An operator's argument by its schema name, None where it has none of that
    name."""
    position, default, _ = signature(node.op).get(name, (len(node.args), None, False))
    return (
        node.args[position]
        if position < len(node.args)
        else node.kwargs.get(name, default)
    )


def dims_of(node: Node, ndim: int, name: str = "dim") -> list[int]:
    """The dims that an operator was given, all of them where it was given none; a
    scalar has none."""
    dims = arg(node, name)
    if isinstance(dims, int):
        dims = [dims]
    return [d % ndim for d in dims] if ndim and dims else list(range(ndim))


def aligned(
    axes: Findings, values: Iterable[Value], shape: Sequence[int]
) -> list[list[Factor]]:
    """The dims of values as they broadcast to a shape: aligned from the right, dims of
    size 1 are repeated."""
    dims = [fresh(n) for n in shape]
    for v in values:
        first = len(shape) - len(v.shape)
        for dim, found, size, n in zip(
            dims[first:], axes.dims(v), v.shape, shape[first:]
        ):
            if size == n:
                unify(found, dim)
    return dims


def pass_but(node: Node, axes: Findings, dims: list[int]) -> None:
    """The given dims of the first input are needed whole, and all of the other inputs.
    The other dims pass to outputs of the first's rank, or of that less the given
    dims."""
    value, *others = node.inputs
    for v in others:
        axes.unsharded(node, v, every(axes.dims(v)))
    for i in dims:
        axes.unsharded(node, value, axes.dims(value)[i])
    before = list(enumerate(axes.dims(value)))
    passing = [(i, d) for i, d in before if i not in dims]
    for out in node.outputs:
        kept = before if len(out.shape) == len(before) else passing
        if len(out.shape) == len(kept):
            axes.set(
                out,
                [fresh(n) if i in dims else d for (i, d), n in zip(kept, out.shape)],
            )
