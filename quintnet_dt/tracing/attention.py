"""Attention as torch.nn.functional computes it, in calls of which each can be
sharded."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..private import safe_softmax

INF = float("inf")


def attention(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
    safe=True,
):
    """F.scaled_dot_product_attention, and its weights, with a dropout that is a call of
    its own: each rank takes its part of the whole mask.

    query: (..., heads, L, d); key, value: (..., heads, S, d); attn_mask broadcasts to
    (..., heads, L, S). `safe`: zeros where all is masked, not NaN.
    """
    if enable_gqa:
        group = query.shape[-3] // key.shape[-3]
        wide = [-1] * (query.dim() - 2)
        key, value = (
            x.unsqueeze(-3).expand(*wide, group, -1, -1).flatten(-4, -3)
            for x in (key, value)
        )
    scores = (
        query * (query.shape[-1] ** -0.5 if scale is None else scale)
    ) @ key.transpose(-2, -1)
    if is_causal and attn_mask is not None:
        raise RuntimeError(
            "scaled_dot_product_attention: expected attn_mask or is_causal, found both"
        )
    if is_causal:
        attn_mask = torch.ones(
            scores.shape[-2:], dtype=torch.bool, device=query.device
        ).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -INF)
    elif attn_mask is not None:
        scores = scores + attn_mask
    exact = torch.promote_types(scores.dtype, torch.float32)
    weights = (
        safe_softmax(scores, -1, exact).to(value.dtype) if safe else scores.softmax(-1)
    )
    if dropout_p:
        weights = F.dropout(weights, dropout_p)
    return weights @ value, weights


def multi_head_attention(
    query,
    key,
    value,
    width,
    heads,
    weight,
    bias,
    bias_k,
    bias_v,
    zero,
    dropout,
    out_weight,
    out_bias,
    **options,
):
    """F.multi_head_attention_forward: query (L, batch, E) or (L, E), key and value (S,
    ...), packed weight [q | k | v] (3 E, E), masks that are True, or -inf, where
    nothing is attended to; returns (output like query, weights or None). Torch gives
    the `options` by keyword, all of them.
    """
    one_tensor, batched = query is key is value, query.dim() == 3
    padding = options["key_padding_mask"]
    if not batched:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        padding = None if padding is None else padding.unsqueeze(0)
    mask, static_k = options["attn_mask"], options["static_k"]
    source = key.shape[0] if static_k is None else static_k.shape[1]
    mask_missing = options["is_causal"] and mask is None
    masks_fit = _fit(query, key, value, heads, source, mask, padding)
    if not masks_fit or mask_missing or query.shape[2] != width or width % heads:
        raise RuntimeError(_expected(query, key, value, width, heads, mask, padding))
    inputs = query if one_tensor else (query, key, value)
    states = _states(inputs, weight, bias, options)
    q, k, v = _heads(states, bias_k, bias_v, width // heads, options)
    if zero:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    out, weights = _attend(
        q, k, v, padding, source, heads, dropout, query.dtype, options
    )
    out = F.linear(out.permute(2, 0, 1, 3).flatten(2), out_weight, out_bias)
    if batched:
        return out, weights
    return out.squeeze(1), None if weights is None else weights.squeeze(0)


def _heads(
    states: list[Tensor],
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    features: int,
    options: dict,
) -> list[Tensor]:
    """q, k and v as (batch, heads, length, features); keys and values that are given
    static are taken as they are."""
    q, k, v = states
    batch = q.shape[1]
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.expand(-1, batch, -1)])
        v = torch.cat([v, bias_v.expand(-1, batch, -1)])
    found = []
    for x, static in (q, None), (k, options["static_k"]), (v, options["static_v"]):
        if static is None:
            found.append(x.unflatten(-1, (-1, features)).permute(1, 2, 0, 3))
        else:
            found.append(static.unflatten(0, (batch, -1)))
    return found


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Tensor | None,
    source: int,
    heads: int,
    dropout: float,
    mask_dtype: torch.dtype,
    options: dict,
) -> tuple[Tensor, Tensor | None]:
    """The heads' outputs, and their weights if they are asked for. `source`: how many
    keys the masks are for."""
    need_weights, mask = options["need_weights"], options["attn_mask"]
    # Else the mask says it.
    causal = options["is_causal"] and padding is None and not need_weights
    if causal:
        mask = None
    mask = _scores_mask(mask, padding, mask_dtype, q.shape[0], k.shape[2] - source)
    dropout = dropout if options["training"] else 0.0
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal), None
    out, weights = attention(q, k, v, mask, dropout, safe=False)
    if options["average_attn_weights"]:
        weights = weights.sum(1) / heads  # not of q: a shard has fewer
    return out, weights


def _states(inputs, weight: Tensor, bias: Tensor | None, options: dict) -> list[Tensor]:
    """q, k and v: of one tensor by the packed weight, else each of its own."""
    weights = None
    if options["use_separate_proj_weight"]:
        weights = [options[f"{x}_proj_weight"] for x in "qkv"]
    elif isinstance(inputs, Tensor):
        return F.linear(inputs, weight, bias).chunk(3, -1)
    biases = [None] * 3 if bias is None else bias.chunk(3)
    each = inputs if isinstance(inputs, tuple) else [inputs] * 3
    return [F.linear(*x) for x in zip(each, weights or weight.chunk(3), biases)]


def _fit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    source: int,
    mask: Tensor | None,
    padding: Tensor | None,
) -> bool:
    """Whether the tensors' shapes fit each other."""
    length, batch, _ = query.shape
    if mask is not None:
        one_for_all, one_for_each = (length, source), (batch * heads, length, source)
        if tuple(mask.shape) not in (one_for_all, one_for_each):
            return False
    if padding is not None and tuple(padding.shape) != (batch, source):
        return False
    return key.shape[:2] == value.shape[:2] and key.shape[1] == batch


def _expected(query, key, value, width, heads, mask, padding) -> str:
    return (
        f"multi_head_attention_forward: expected a query (L, batch, {width}), key and"
        f" value (S, batch, ...), {heads} heads that divide the features, attn_mask (L,"
        " S) or (batch * heads, L, S), not None if is_causal, key_padding_mask (batch,"
        f" S); found {[tuple(x.shape) for x in (query, key, value)]}, attn_mask"
        f" {mask if mask is None else tuple(mask.shape)}, key_padding_mask"
        f" {padding if padding is None else tuple(padding.shape)}"
    )


def _scores_mask(
    mask: Tensor | None,
    padding: Tensor | None,
    dtype: torch.dtype,
    batch: int,
    appended: int,
) -> Tensor | None:
    """What is added to the scores. `appended`: keys beyond those that the masks are
    for."""
    mask, padding = _as_addend(mask, dtype), _as_addend(padding, dtype)
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (batch, -1))
    if padding is not None:
        over_keys = padding[:, None, None]
        mask = over_keys if mask is None else mask + over_keys
    if mask is not None and appended:
        mask = F.pad(mask, (0, appended))
    return mask


def _as_addend(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -INF)
