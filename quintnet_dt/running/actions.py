"""How each kind of action is run: one collective on one tensor, differentiable."""

from dataclasses import replace
from typing import Any, Callable

import torch
from torch import Tensor

from .. import comm_ops
from ..axes.action import (
    ADD_ONCE,
    EXCHANGE,
    GATHER,
    MEAN,
    SPLIT,
    SUM,
    SUM_GRADIENT,
    TAKE_HEADS,
)
from ..axes.split import Heads, Split
from ..exchange import exchange
from ..groups import Group, group_rank, group_size


class _AddOnce(torch.autograd.Function):
    """y = x on rank 0 and 0 elsewhere; dx = dy: an addend of a sum over ranks. dy is
    replicated, so dx is too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: bool) -> Tensor:
        ctx.first = first
        return x.view_as(x) if first else torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _OfOne.apply(grad, ctx.first), None


class _OfOne(torch.autograd.Function):
    """y = x, as rank 0 holds it; the ranks' x are equal. Its gradient counts once: the
    adjoint of `_AddOnce`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: bool) -> Tensor:
        ctx.first = first
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _AddOnce.apply(grad, ctx.first), None


def _along(collective: Callable, whole: bool) -> Callable:
    """An action that shares each block of a dim by itself."""

    def act(x: Tensor, split: Split, group: Group) -> Tensor:
        if len(split.segments) > 1:
            parts = x.split(_lengths(x, split), split.dim)
            each = [replace(split, segments=(segment,)) for segment in split.segments]
            made = [act(part, one, group) for part, one in zip(parts, each)]
            return torch.cat(made, split.dim)
        units = split.sizes(group_size(group))
        present = split.units if whole else units[group_rank(group)]
        dim, inner = split.dim, split.segments[0].inner
        # what is within a unit may have another length than when traced
        if split.blocks == 1:
            inner = x.shape[dim] // present if present else inner
            return collective(x, dim, group, [u * inner for u in units])
        # of nothing, -1 could be any number
        outer = -1 if present else split.segments[0].outer
        blocks = x.unflatten(dim, (outer, present, inner))
        return collective(blocks, dim + 1, group, units).flatten(dim, dim + 2)

    return act


def _lengths(x: Tensor, split: Split) -> list[int]:
    """How long each segment is in a tensor that has the dim, or a rank's part of it."""
    units = x.shape[split.dim] // split.width
    return [units * outer * inner for outer, inner in split.segments]


def _mean(x: Tensor, split: Split, group: Group) -> Tensor:
    """The mean of the ranks' means, each of its units; one of none is NaN."""
    units = split.sizes(group_size(group))
    if 0 in units:
        x = x.nan_to_num()
    return comm_ops.all_reduce(x * (units[group_rank(group)] / split.units), group)


def _add_once(x: Tensor, split: Split | None, group: Group) -> Tensor:
    """An addend on the first rank. Ranks that have unequal parts may sum its gradient
    in another order; then all take the first one's, bit for bit."""
    first = group_rank(group) == 0
    if split is None or split.units % group_size(group) == 0:
        return _AddOnce.apply(x, first)
    x = comm_ops.copy_in(x, group)
    return x if first else x.masked_fill(torch.ones_like(x, dtype=torch.bool), 0)


def _take_heads(x: Tensor, heads: Heads, group: Group) -> Tensor:
    """Of key-value heads, those that this rank's query heads attend to."""
    mine = heads.of_rank(group_rank(group), group_size(group))
    x = comm_ops.copy_in(x, group)
    if not mine:
        return x.narrow(heads.dim, 0, 0)
    # no index tensor, which a GPU would wait for
    return torch.cat([x.narrow(heads.dim, head, 1) for head in mine], heads.dim)


_gather = _along(comm_ops.all_gather, whole=False)
_split = _along(comm_ops.split, whole=True)

ACTIONS: dict[str, Callable[..., Tensor]] = {
    SUM_GRADIENT: lambda x, split, group: (
        comm_ops.copy_in(x, group) if x.requires_grad else x
    ),
    SUM: lambda x, split, group: comm_ops.all_reduce(x, group),
    MEAN: _mean,
    GATHER: _gather,
    SPLIT: _split,
    TAKE_HEADS: _take_heads,
    EXCHANGE: exchange,
    ADD_ONCE: _add_once,
}
