"""Norms of features that the ranks share: they exchange the statistics of each row, two
numbers or one, and keep their shards.

Means and variances of parts are joined as in Chan, Golub and LeVeque 1983
(https://doi.org/10.1080/00031305.1983.10483115), so that a large mean costs no digits.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import comm_ops
from ..axes.action import OnShard
from ..axes.split import Split
from ..groups import group_rank, group_size
from .context import Context


def layer_norm(
    context: Context,
    action: OnShard,
    func: Callable,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """F.layer_norm of this rank's features, along some of the last dims."""
    dims = tuple(range(-len(normalized_shape), 0))
    y = _scaled(_standardized(context, action, input, dims, eps), weight, bias)
    return y.to(_dtype(func, input, normalized_shape, weight, bias))


def group_norm(
    context: Context,
    action: OnShard,
    func: Callable,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """F.group_norm of this rank's channels, all of one group: input is (N, channels,
    ...)."""
    dims = tuple(range(1, input.dim()))
    ones = [1] * (input.dim() - 2)
    scales = [s if s is None else s.reshape(-1, *ones) for s in (weight, bias)]
    y = _scaled(_standardized(context, action, input, dims, eps), *scales)
    return y.to(_dtype(func, input, num_groups, weight, bias))


def rms_norm(
    context: Context,
    action: OnShard,
    func: Callable,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """F.rms_norm of this rank's features, along some of the last dims."""
    x = _precise(input)
    dims = tuple(range(-len(normalized_shape), 0))
    count = sum(_counts(context, action.split, x, dims))
    squares = comm_ops.all_reduce(x.square().sum(dims, keepdim=True), context.group)
    # one sum for all, which each rank uses for its own features
    squares = comm_ops.copy_in(squares, context.group)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    y = _scaled(x * torch.rsqrt(squares / count + eps), weight, None)
    return y.to(_dtype(func, input, normalized_shape, weight))


def _dtype(
    func: Callable, input: Tensor, sizes: Any, *scales: Tensor | None
) -> torch.dtype:
    """Of what the call itself would give, under autocast too."""
    alike = all(s is None or s.dtype == input.dtype for s in scales)
    if alike and not torch.is_autocast_enabled(input.device.type):
        return input.dtype
    with torch.no_grad():  # of nothing: that costs no kernel
        rows = input.new_empty((0, *input.shape[1:]))
        return func(rows if input.dim() > 1 else input, sizes, *scales).dtype


def _precise(x: Tensor) -> Tensor:
    """Statistics of short floats are taken in float32, as torch's kernels do."""
    return x.float() if x.dtype.itemsize < 4 else x


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = x if weight is None else x * weight
    return y if bias is None else y + bias


def _standardized(
    context: Context, action: OnShard, input: Tensor, dims: tuple[int, ...], eps: float
) -> Tensor:
    """Less the mean, over the standard deviation, both over some dims of the whole."""
    x = _precise(input)
    counts = _counts(context, action.split, x, dims)
    empty = not counts[group_rank(context.group)]
    mean = (x.sum if empty else x.mean)(dims, keepdim=True)
    square = (x - mean).square().sum(dims, keepdim=True)
    own = torch.stack([mean, square])[None]
    # (ranks, 2, rows): what each rank makes of it, it makes for its own features
    means, squares = comm_ops.all_gather(
        own, 0, context.group, partial_grad=True
    ).unbind(1)
    whole = sum(counts)
    mean = _weighed(means, counts) / whole
    square = squares.sum(0) + _weighed((means - mean).square(), counts)
    return (x - mean) * torch.rsqrt(square / whole + eps)


def _weighed(parts: Tensor, counts: list[int]) -> Tensor:
    """The sum of the ranks' parts, each times a number."""
    if len(set(counts)) == 1:
        return parts.sum(0) * counts[0]
    # no tensor of numbers, which a GPU would wait for
    each = [part * count for part, count in zip(parts.unbind(0), counts)]
    return torch.stack(each).sum(0)


def _counts(
    context: Context, split: Split, x: Tensor, dims: tuple[int, ...]
) -> list[int]:
    """Over how many elements of a row each rank's statistics are taken."""
    units = split.sizes(group_size(context.group))
    others = prod(x.shape[dim] for dim in dims if dim % x.dim() != split.dim)
    return [count * split.width * others for count in units]
