"""What is run instead of calls that cannot run on a shard: dropout, a lookup of rows,
cross entropy over classes, norms over features (norms.py), an attention without
heads."""

from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import comm_ops
from ..axes.action import SPLIT, Action, OnShard
from ..groups import group_rank, group_size
from .context import Context
from .norms import group_norm, layer_norm, rms_norm


def on_shard(
    context: Context,
    action: OnShard,
    func: Callable,
    args: tuple,
    kwargs: dict,
    order: tuple[int, ...] | None = None,
) -> Any:
    """Run a call on this rank's shard, which lies in the whole as `action` says.
    `order`: of its dims in memory in the whole model, where that differs."""
    if action.call == "dropout":
        return _drop_out(context, action, order, func, *args, **kwargs)
    return _INSTEAD[action.call](context, action, func, *args, **kwargs)


def _drop_out(
    context: Context,
    action: OnShard,
    order: tuple[int, ...] | None,
    func: Callable,
    x: Tensor,
    *rest: Any,
    **kwargs: Any,
) -> Tensor:
    """This rank's part of the whole tensor's mask: results and random states are those
    of the whole model."""
    with torch.no_grad():
        sizes = action.split.sizes(group_size(context.group))
        shape = list(x.shape)
        mine, length = sizes[group_rank(context.group)], shape[action.split.dim]
        # what is within a unit may have another length than when traced
        shape[action.split.dim] = (
            length // mine * action.split.units if mine else action.split.length
        )
        # A mask is drawn in the order of memory.
        if order is None:
            dims = sorted(range(x.dim()), key=x.stride, reverse=True)
        else:
            dims = [*order, *(d for d in range(x.dim()) if d not in order)]
        back = [dims.index(d) for d in range(x.dim())]
        ones = x.new_ones([shape[d] for d in dims]).permute(back)
        mask = context.act([Action(SPLIT, action.split)], func(ones, *rest, **kwargs))
    inplace = kwargs.get("inplace", len(rest) > 2 and rest[2])
    return x.mul_(mask) if inplace else x * mask


def _mine(context: Context, action: OnShard, ids: Tensor) -> tuple[Tensor, Tensor, int]:
    """Which of the ids in [0, action.split.units) are elsewhere, and this rank's
    counted from its first (others are 0)."""
    sizes = action.split.sizes(group_size(context.group))
    rank = group_rank(context.group)
    ids = ids - sum(sizes[:rank])
    absent = (ids < 0) | (ids >= sizes[rank])
    return absent, ids.masked_fill(absent, 0), sizes[rank]


def _look_up(
    context: Context,
    action: OnShard,
    func: Callable,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """An embedding of which this rank has some rows: zeros for the others, so that the
    ranks' results sum to the whole.

    input: ids of any shape, in [0, rows); weight: (this rank's rows, d); returns
    (*input.shape, d).
    """
    absent, ids, count = _mine(context, action, input)
    if padding_idx is not None:
        elsewhere, at, _ = _mine(
            context, action, torch.tensor(padding_idx % action.split.units)
        )
        padding_idx = None if elsewhere else int(at)
    if count == 0:  # no row to look up: one of zeros, which gets no gradient
        weight = F.pad(weight, (0, 0, 0, 1))
    return func(ids, weight, padding_idx, *args, **kwargs).masked_fill(
        absent.unsqueeze(-1), 0
    )


def without_padding(func: Callable) -> Callable:
    """F.embedding in the proof, of a rank's rows, which the padding's may not be
    among."""

    def look_up(
        input: Tensor, weight: Tensor, padding_idx: Any = None, *rest: Any, **kw: Any
    ) -> Tensor:
        return func(input, weight, None, *rest, **kw)

    return look_up


def _cross_entropy(
    context: Context,
    action: OnShard,
    func: Callable,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The cross entropy of logits of which this rank has some classes (Megatron-LM,
    arXiv 1909.08053, section 3): the ranks exchange a maximum, a sum of exponentials
    and the target's logit for each row, and not the logits.

    input: (N, this rank's classes, ...) or (this rank's classes); target: (N, ...) or
    (), class indices.
    """
    x = input.movedim(min(1, input.dim() - 1), -1)
    x = x.float() if x.dtype.itemsize < 4 else x
    if not x.shape[-1]:  # no class here: one that is never the target's
        x = F.pad(x, (0, 1), value=-float("inf"))
    with torch.no_grad():
        top = comm_ops.all_gather(x.amax(-1)[None], 0, context.group).amax(0)
    x = x - top.unsqueeze(-1)
    ignored = target == ignore_index
    absent, ids, _ = _mine(context, action, target.masked_fill(ignored, 0))
    own = x.gather(-1, ids.unsqueeze(-1)).squeeze(-1).masked_fill(absent, 0)
    total, own = comm_ops.all_reduce(
        x.exp().sum(-1), context.group
    ), comm_ops.all_reduce(own, context.group)
    loss = total.log() - own
    if label_smoothing:
        mean = comm_ops.all_reduce(x.sum(-1), context.group) / action.split.units
        loss = (1 - label_smoothing) * loss + label_smoothing * (total.log() - mean)
    loss = loss.masked_fill(ignored, 0)
    if reduction != "none":
        loss = loss.sum() / ((~ignored).sum() if reduction == "mean" else 1)
    return loss.to(input.dtype)


def _attend(
    context: Context,
    action: OnShard,
    func: Callable,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """An attention of which a rank may have no head, which fused kernels may not take:
    two products of nothing, so that gradients of nothing follow.

    query: (..., this rank's heads, t, d); key, value: (..., heads, s, d).
    """
    if query.numel():
        return func(query, key, value, *args, **kwargs)
    return query @ key.mT @ value


_INSTEAD: dict[str, Callable] = {
    "embedding": _look_up,
    "cross_entropy": _cross_entropy,
    "scaled_dot_product_attention": _attend,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "group_norm": group_norm,
}
