"""Rows of a tensor from the ranks that store them to those that use them: an
all-to-all, which DTensor has not."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from .groups import Group, SimulatedGroup, chunk_sizes, group_rank, group_size


def exchange(x: Tensor, dim: int, group: Group, positions: Tensor) -> Tensor:
    """``y_r = X[positions[r]]`` along ``dim``, of the whole ``X`` whose part r, by
    `chunk_sizes`, is ``x_r``; ``dx`` goes back the same way.

    ``positions`` is (ranks, length): every index of ``X`` once, increasing for each
    rank. An all-to-all, for weights whose rows are stored in another order than they
    are used in. Returns (..., length, ...).
    """
    if group_size(group) == 1:
        return x
    # on fake tensors no positions can be worked out
    if isinstance(group, SimulatedGroup):
        route = Route(x.shape[dim], positions.shape[1])
    else:
        route = Route.of(positions, group_rank(group))
    return Exchange.apply(x, dim % x.dim(), group, route, False)


class Route(NamedTuple):
    """Which rows an exchange moves, as one rank knows it."""

    stored: int  # how many rows this rank has
    used: int  # how many it gets
    rows: Tensor | None = None  # those that it has, in the order in which they are sent
    given: list | None = None  # how many of them to each rank
    taken: list | None = None  # how many come from each rank

    @classmethod
    def of(cls, positions, rank):
        sizes = chunk_sizes(positions.numel(), len(positions))
        # (ranks, length)
        owners = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[
            positions
        ]
        given = [p[o == rank] - sum(sizes[:rank]) for p, o in zip(positions, owners)]
        taken = torch.bincount(owners[rank], minlength=len(sizes)).tolist()
        return cls(
            sizes[rank],
            positions.shape[1],
            torch.cat(given),
            [len(g) for g in given],
            taken,
        )


class Exchange(Function):
    """Rows to the ranks that use them; ``back``: the same rows to the ranks that they
    came from."""

    @staticmethod
    def forward(ctx, x, dim, group, route, back):
        ctx.args = dim, group, route, not back
        if isinstance(group, SimulatedGroup):
            length = route.stored if back else route.used
            return x.new_zeros((*x.shape[:dim], length, *x.shape[dim + 1 :]))
        rows = x.movedim(dim, 0)
        if not back:
            y = _swap(rows[route.rows], route.given, route.taken, group)
        else:
            came = _swap(rows, route.taken, route.given, group)
            y = torch.empty_like(came)
            y[route.rows] = came
        return (
            y
            if dim == 0
            else y.movedim(0, dim).clone(memory_format=torch.contiguous_format)
        )

    @staticmethod
    def backward(ctx, dy):
        return Exchange.apply(dy, *ctx.args), None, None, None, None


def _swap(x, given, taken, group):
    """Rows to every rank and rows from every rank: so many each."""
    y = x.new_empty((sum(taken), *x.shape[1:]))
    dist.all_to_all_single(y, x.contiguous(), taken, given, group=group)
    return y
