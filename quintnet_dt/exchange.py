"""Rows of a tensor from the ranks that store them to those that use them: an
all-to-all, which DTensor has not."""

from functools import lru_cache
from operator import index
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from .axes.split import Split
from .groups import Group, SimulatedGroup, chunk_sizes, group_rank, group_size
from .private import constant


def exchange(x: Tensor, split: Split, group: Group) -> Tensor:
    """``y_r = X[positions[r]]`` along a split's dim: rank r's part of each block of the
    whole ``X``, whose part r, by `chunk_sizes`, is ``x_r``. ``dx`` goes back the same
    way.

    An all-to-all, for weights whose rows are stored in another order than they are used
    in. The ranks share the units evenly.
    """
    n = group_size(group)
    if n == 1:
        return x
    dim = split.dim % x.dim()
    # on fake tensors no positions can be worked out
    if isinstance(group, SimulatedGroup):
        route = Route(x.shape[dim], split.length // n)
    else:
        # numbers of a compiled graph too, in which those of a split may be symbols
        blocks = tuple(
            (index(outer), index(split.units * inner))
            for outer, inner in split.segments
        )
        route = _route(blocks, group_rank(group), n, x.device)
    return Exchange.apply(x, dim, group, route, False)


class Route(NamedTuple):
    """Which rows an exchange moves, as one rank knows it."""

    stored: int  # how many rows this rank has
    used: int  # how many it gets
    rows: Tensor | None = None  # those that it has, in the order in which they are sent
    given: list | None = None  # how many of them to each rank
    taken: list | None = None  # how many come from each rank


@constant  # values are read, which would break a graph
def _route(*key) -> Route:
    return _route_of(*key)


@lru_cache
@torch.inference_mode(False)
def _route_of(blocks: tuple, rank: int, n: int, device: torch.device) -> Route:
    """The Route of a dim of blocks after each other, each (how many, of what length).
    Worked out once, and not at each step."""
    start, found = 0, []
    for count, length in blocks:
        rows = torch.arange(start, start + count * length, device="cpu")
        # (blocks, ranks, length of a part) -> (ranks, ...)
        found.append(rows.view(count, n, -1).transpose(0, 1).reshape(n, -1))
        start += count * length
    positions, sizes = torch.cat(found, 1), chunk_sizes(start, n)
    # who stores each
    owners = positions // sizes[0]
    given = [p[o == rank] - sum(sizes[:rank]) for p, o in zip(positions, owners)]
    return Route(
        sizes[rank],
        positions.shape[1],
        torch.cat(given).to(device),
        [len(g) for g in given],
        torch.bincount(owners[rank], minlength=n).tolist(),
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
