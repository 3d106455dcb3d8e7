"""Rows of a tensor from the ranks that store them to those that use them: an
all-to-all, which DTensor has not."""

from functools import lru_cache
from operator import index
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from .axes.split import Segment, Split
from .groups import Group, SimulatedGroup, chunk_sizes, group_rank, group_size
from .private import constant


def exchange(x: Tensor, split: Split, group: Group) -> Tensor:
    """``y_r = X[positions[r]]`` along a split's dim: rank r's part of each block of the
    whole ``X``, whose part r, by `chunk_sizes`, is ``x_r``. ``dx`` goes back the same
    way.

    An all-to-all, for weights whose rows are stored in another order than they are used
    in.
    """
    n = group_size(group)
    if n == 1:
        return x
    dim = split.dim % x.dim()
    # on fake tensors no positions can be worked out
    if isinstance(group, SimulatedGroup):
        used = sum(length for _, length in split.ranges(group.rank, n))
        sent = _rows_sent(split, group.rank, n)
        route = Route(x.shape[dim], used, sent=sent)
    else:
        # numbers of a compiled graph too, in which those of a split may be symbols
        segments = tuple(
            (index(outer), index(inner)) for outer, inner in split.segments
        )
        units, rank = index(split.units), group_rank(group)
        route = _route(segments, units, split.balanced, rank, n, x.device)
    return Exchange.apply(x, dim, group, route, False)


@lru_cache
def most_sent(split: Split, n: int, back: bool) -> int:
    """How many rows of a split's dim the rank that sends most sends in an exchange; and
    `back`, those that have come, in the backward."""
    each = [_rows_sent(split, rank, n) for rank in range(n)]
    return max(rows.forward + rows.backward * back for rows in each)


class _Rows(NamedTuple):
    forward: int
    backward: int


def _rows_sent(split: Split, rank: int, n: int) -> _Rows:
    """How many rows of a split's dim a rank sends in an exchange."""
    sizes = chunk_sizes(split.length, n)
    first = sum(sizes[:rank])
    last = first + sizes[rank]
    ranges = split.ranges(rank, n)
    used = sum(length for _, length in ranges)
    stay = sum(max(0, min(s + k, last) - max(s, first)) for s, k in ranges)
    return _Rows(sizes[rank] - stay, used - stay)


class Route(NamedTuple):
    """Which rows an exchange moves, as one rank knows it."""

    stored: int  # how many rows this rank has
    used: int  # how many it gets
    rows: Tensor | None = None  # those that it has, in the order in which they are sent
    given: list | None = None  # how many of them to each rank
    taken: list | None = None  # how many come from each rank
    sent: _Rows = _Rows(0, 0)  # how many are sent, in a simulated group


@constant  # values are read, which would break a graph
def _route(*key) -> Route:
    return _route_of(*key)


@lru_cache
@torch.inference_mode(False)
def _route_of(
    segments: tuple,
    units: int,
    balanced: bool,
    rank: int,
    n: int,
    device: torch.device,
) -> Route:
    """The Route of a dim that is shared by a Split of these segments and units. Worked
    out once, and not at each step."""
    parts = tuple(Segment(*segment) for segment in segments)
    split = Split(0, units, parts, balanced)
    sizes = chunk_sizes(split.length, n)
    positions = [_positions(split, r, n) for r in range(n)]
    # who stores each
    owners = [p // max(sizes[0], 1) for p in positions]
    first = sum(sizes[:rank])
    given = [p[o == rank] - first for p, o in zip(positions, owners)]
    return Route(
        sizes[rank],
        len(positions[rank]),
        torch.cat(given).to(device),
        [len(g) for g in given],
        torch.bincount(owners[rank], minlength=n).tolist(),
    )


def _positions(split: Split, rank: int, n: int) -> Tensor:
    """Where in the whole dim a rank's part of each block lies."""
    ranges = split.ranges(rank, n)
    return torch.cat(
        [torch.arange(start, start + length, device="cpu") for start, length in ranges]
    )


class Exchange(Function):
    """Rows to the ranks that use them; ``back``: the same rows to the ranks that they
    came from."""

    @staticmethod
    def forward(ctx, x, dim, group, route, back):
        ctx.args = dim, group, route, not back
        if isinstance(group, SimulatedGroup):
            length = route.stored if back else route.used
            rows = route.sent.backward if back else route.sent.forward
            group.sends("all-to-all", rows * x.nbytes / max(x.shape[dim], 1))
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
