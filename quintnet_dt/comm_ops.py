"""Differentiable collectives that DTensor has not, or runs too slowly.

``x_r`` is rank r's tensor. A tensor is *replicated* where every rank holds the same
(its gradient is then the same everywhere too); else it *varies*, and each rank holds
the gradient of its own. Six operators in three pairs: the backward of each is the
forward of its partner, so gradients of any order are right.

    all_reduce      varies -> replicated    y   = sum_r x_r
    copy_in         replicated -> varies    y_r = x
    all_gather      varies -> replicated    y   = cat_r(x_r)
    split           replicated -> varies    y_r = x[part r]
    reduce_scatter  varies -> varies        y_r = (sum_s x_s)[part r]
    all_gather(partial_grad=True)           y_r = cat_s(x_s), varies -> varies

The first pair is g and f of Megatron-LM (arXiv 1909.08053, section 3), the last its
sequence parallelism's (arXiv 2205.05198, section 4.2.2). Torch's functional
``all_reduce`` takes its result to vary (its backward is an all-reduce): before a
replicated loss, gradients are n times too large.

Every rank must make the same calls in the same order, and either every rank's input
requires grad or none does. Inputs and incoming gradients are never modified. A group of
one communicates nothing and gives the input itself back.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .groups import Group, SimulatedGroup, Sizes, chunk_sizes, group_rank, group_size

# 2.13 has new names for these and warns of the old ones; 2.11 has only the old.
_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_flat = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)


# --- The functions to call: each gives contiguous memory of its own, but for copy_in.


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """``y = sum_r x_r``; ``dx_r = dy``. Any shape; the same bits on every rank."""
    return x if group_size(group) == 1 else All_Reduce.apply(x, group)


def copy_in(x: Tensor, group: Group) -> Tensor:
    """``y_r = x``; ``dx = sum_r dy_r``. Any shape. Where a replicated tensor enters
    work that differs by rank.

    ``y`` is ``x`` or a view of it; autograd refuses to modify the view in place."""
    return (
        Copy.apply(x, group)
        if group_size(group) != 1 and x.requires_grad and torch.is_grad_enabled()
        else x
    )


def all_gather(
    x: Tensor, dim: int, group: Group, sizes: Sizes = None, partial_grad: bool = False
) -> Tensor:
    """``y = cat_r(x_r, dim)``; ``dx_r = dy[part r]``; with ``partial_grad`` (y's use
    varies), ``(sum_s dy_s)[part r]``.

    ``x`` is (..., sizes[rank], ...), its other dims the same on every rank; ``dim``,
    where the parts lie, may be negative; ``sizes`` is every rank's length along it,
    None if all have this rank's. Returns (..., sum(sizes), ...). Raises ValueError if
    ``dim`` is out of range, or ``sizes`` is not one length per rank or does not fit
    ``x`` (which can only be seen on the rank whose ``x`` it is: the others wait for
    it).
    """
    dim, sizes = _check(x, dim, group, sizes, whole=False)
    return (
        x
        if group_size(group) == 1
        else All_Gather.apply(x, dim, group, sizes, partial_grad)
    )


def split(x: Tensor, dim: int, group: Group, sizes: Sizes = None) -> Tensor:
    """``y_r = x[part r]``; ``dx = cat_r(dy_r, dim)``. A copy: the whole can be freed.

    ``x`` is (..., sum(sizes), ...), replicated; ``dim``, what to split, may be
    negative; ``sizes`` is every rank's length along it, None for `chunk_sizes`. Returns
    (..., sizes[rank], ...). Raises ValueError if ``dim`` is out of range, or ``sizes``
    is not one length per rank or does not add up to the length of ``x``.
    """
    dim, sizes = _check(x, dim, group, sizes, whole=True)
    return x if group_size(group) == 1 else Split.apply(x, dim, group, sizes)


def reduce_scatter(x: Tensor, dim: int, group: Group, sizes: Sizes = None) -> Tensor:
    """``y_r = (sum_s x_s)[part r]``; ``dx_r = cat_s(dy_s, dim)``. Shapes and errors as
    for `split`; ``x`` varies."""
    dim, sizes = _check(x, dim, group, sizes, whole=True)
    return x if group_size(group) == 1 else ReduceScatter.apply(x, dim, group, sizes)


# --- The autograd functions. Backward is the partner's function: differentiable again.
# Gradients stay materialized: a rank whose gradient is undefined joins with zeros. No
# setup_context: it costs microseconds a call. One collective each, so nothing that
# async could overlap. Results are no views: autograd forbids in-place work on those.
# ``sizes`` is None where all are equal; backends want equal lengths, so uneven parts
# are filled up to the longest.


class All_Reduce(Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        if isinstance(group, SimulatedGroup):
            group.sends("all-reduce", 2 * group.share * x.nbytes)
            return (x * group.size).to(x.dtype).contiguous()
        y = x.clone(memory_format=torch.contiguous_format)  # strides may differ by rank
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx, dy):
        return copy_in(dy, ctx.group), None


class Copy(Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)  # detach() would let in-place work change x unseen

    @staticmethod
    def backward(ctx, dy):
        return all_reduce(dy, ctx.group), None


class All_Gather(Function):
    @staticmethod
    def forward(ctx, x, dim, group, sizes, partial_grad):
        ctx.args, ctx.partial_grad = (dim, group, sizes), partial_grad
        n, x = group_size(group), x if sizes is None else _filled(x, dim, max(sizes))
        if isinstance(group, SimulatedGroup):
            y = torch.cat([x.contiguous()] * n)
            group.sends("all-gather", group.share * y.nbytes)
        else:
            y = x.new_empty((n * x.shape[0], *x.shape[1:]))
            _gather_flat(y, x.contiguous(), group=group)
        if sizes is None:
            return y if dim == 0 else torch.cat(y.chunk(n), dim)
        return torch.cat(
            [part.narrow(dim, 0, s) for part, s in zip(y.chunk(n), sizes)], dim
        )

    @staticmethod
    def backward(ctx, dy):
        return (
            (reduce_scatter if ctx.partial_grad else split)(dy, *ctx.args),
            None,
            None,
            None,
            None,
        )


class Split(Function):
    @staticmethod
    def forward(ctx, x, dim, group, sizes):
        ctx.args = dim, group, sizes
        n, rank = group_size(group), group_rank(group)
        sizes = sizes or [x.shape[dim] // n] * n
        return x.narrow(dim, sum(sizes[:rank]), sizes[rank]).clone(
            memory_format=torch.contiguous_format
        )

    @staticmethod
    def backward(ctx, dy):
        return all_gather(dy, *ctx.args), None, None, None


class ReduceScatter(Function):
    @staticmethod
    def forward(ctx, x, dim, group, sizes):
        ctx.args = dim, group, sizes
        n = group_size(group)
        parts = x.split(sizes or [x.shape[dim] // n] * n, dim)
        own = parts[group_rank(group)]
        if isinstance(group, SimulatedGroup):
            group.sends("reduce-scatter", group.share * x.nbytes)
            return (own * group.size).to(x.dtype).contiguous()
        if sizes is not None:
            parts = [_filled(part, dim, max(sizes)) for part in parts]
        y = x.new_empty(parts[0].shape)
        _scatter_flat(
            y,
            (x if dim == 0 and sizes is None else torch.cat(parts)).contiguous(),
            group=group,
        )
        return (
            y
            if sizes is None
            else y.narrow(dim, 0, own.shape[dim]).clone(
                memory_format=torch.contiguous_format
            )
        )

    @staticmethod
    def backward(ctx, dy):
        return all_gather(dy, *ctx.args, partial_grad=True), None, None, None


def _filled(x, dim, length):
    """``x`` with zeros after it, up to a length along one dim."""
    return F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, length - x.shape[dim]])


def _check(
    x: Tensor, dim: int, group: Group, sizes: Sizes, whole: bool
) -> tuple[int, Sizes]:
    """``dim`` from 0 and the parts' lengths, None if equal. Is ``x`` whole or a
    part?"""
    n = group_size(group)
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim {dim} is out of range for shape {tuple(x.shape)}")
    dim, length = dim % x.dim(), x.shape[dim]
    if sizes is None:
        return dim, tuple(chunk_sizes(length, n)) if whole and length % n else None
    sizes = tuple(sizes)
    if len(sizes) != n or min(sizes) < 0:
        raise ValueError(f"expected sizes of {n} ranks, each >= 0, found {sizes}")
    rank = group_rank(group)
    what, total = (
        ("their sum", sum(sizes)) if whole else (f"rank {rank}'s", sizes[rank])
    )
    if total != length:
        fit = f"to fit x of shape {tuple(x.shape)} along dim {dim}"
        raise ValueError(
            f"expected sizes {sizes} {fit}: {what} is {total}, not {length}"
        )
    return dim, None if min(sizes) == max(sizes) else sizes
