"""What torch.nn computes in one piece, said again in pieces that can be sharded.

A torch-function mode sees `F.multi_head_attention_forward` as one call, in which no head can be
split. Our modes run what is here instead, with themselves on, so that the calls within are the
model's: in the trace, in the proof, and at run time where a module is watched.
"""

import warnings
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ..parts import named_modules
from ..private import safe_softmax
from ..utils import quiet

INF = float("inf")


def restated(func, args, kwargs):
    """What to run in place of a function that is many calls in one; None for any other."""
    if func is F.scaled_dot_product_attention and not (
        kwargs.get("dropout_p") or len(args) > 4 and args[4]
    ):
        return None
    return RESTATED.get(func)


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
    """F.scaled_dot_product_attention, and its weights, with a dropout that is a call of its own:
    each rank takes its part of the whole mask.

    query: (..., heads, L, d); key, value: (..., heads, S, d); attn_mask broadcasts to (..., heads,
    L, S). `safe`: zeros where all is masked, not NaN.
    """
    if enable_gqa:
        group = query.shape[-3] // key.shape[-3]
        wide = [-1] * (query.dim() - 2)
        key, value = (
            x.unsqueeze(-3).expand(*wide, group, -1, -1).flatten(-4, -3) for x in (key, value)
        )
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal and attn_mask is not None:
        raise RuntimeError(
            "scaled_dot_product_attention: expected attn_mask or is_causal, found both"
        )
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        scores = (
            scores.masked_fill(~attn_mask, -INF)
            if attn_mask.dtype == torch.bool
            else scores + attn_mask
        )
    exact = torch.promote_types(scores.dtype, torch.float32)
    weights = safe_softmax(scores, -1, exact).to(value.dtype) if safe else scores.softmax(-1)
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
    """F.multi_head_attention_forward: query (L, batch, E) or (L, E), key and value (S, ...), packed
    weight [q | k | v] (3 E, E), masks that are True, or -inf, where nothing is attended to; returns
    (output like query, weights or None). Torch gives the `options` by keyword, all of them.
    """
    itself, batched = query is key is value, query.dim() == 3
    mask, padding, causal = (
        options[name] for name in ("attn_mask", "key_padding_mask", "is_causal")
    )
    static = options["static_k"], options["static_v"]
    if not batched:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        padding = None if padding is None else padding.unsqueeze(0)
    length, batch, found = query.shape
    source = key.shape[0] if static[0] is None else static[0].shape[1]
    fits = mask is None or tuple(mask.shape) in ((length, source), (batch * heads, length, source))
    fits &= padding is None or tuple(padding.shape) == (batch, source)
    fits &= key.shape[:2] == value.shape[:2] and key.shape[1] == batch
    if not fits or found != width or width % heads or (causal and mask is None):
        raise RuntimeError(
            f"multi_head_attention_forward: expected a query (L, batch, {width}), key and value (S,"
            f" batch, ...), {heads} heads that divide the features, attn_mask (L, S) or (batch *"
            " heads, L, S), not None if is_causal, key_padding_mask (batch, S); found"
            f" {[tuple(x.shape) for x in (query, key, value)]}, attn_mask"
            f" {mask if mask is None else tuple(mask.shape)}, key_padding_mask"
            f" {padding if padding is None else tuple(padding.shape)}"
        )

    separate = options["use_separate_proj_weight"] and [options[f"{x}_proj_weight"] for x in "qkv"]
    if itself and not separate:
        states = F.linear(query, weight, bias).chunk(3, -1)
    else:
        biases = [None] * 3 if bias is None else bias.chunk(3)
        states = [
            F.linear(*x) for x in zip((query, key, value), separate or weight.chunk(3), biases)
        ]
    if bias_k is not None:
        more = (bias_k, bias_v)
        states = states[0], *(
            torch.cat([x, b.expand(-1, batch, -1)]) for x, b in zip(states[1:], more)
        )
    q, k, v = (x.unflatten(-1, (-1, width // heads)).permute(1, 2, 0, 3) for x in states)
    k, v = (x if s is None else s.unflatten(0, (batch, -1)) for x, s in zip((k, v), static))
    if zero:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))

    causal = causal and padding is None and not options["need_weights"]  # else the mask says it
    mask, padding = (
        (
            torch.zeros_like(m, dtype=query.dtype).masked_fill(m, -INF)
            if m is not None and m.dtype == torch.bool
            else m
        )
        for m in (None if causal else mask, padding)
    )
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (batch, -1))
    if padding is not None:
        mask = padding[:, None, None] if mask is None else mask + padding[:, None, None]
    if mask is not None and k.shape[2] != source:
        mask = F.pad(mask, (0, k.shape[2] - source))
    dropout, weights = dropout if options["training"] else 0.0, None
    if options["need_weights"]:
        out, weights = attention(q, k, v, mask, dropout, safe=False)
        weights = weights.sum(1) / heads if options["average_attn_weights"] else weights
        weights = weights if batched else weights.squeeze(0)
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
    out = F.linear(out.permute(2, 0, 1, 3).flatten(2), out_weight, out_bias)
    return out if batched else out.squeeze(1), weights


RESTATED = {
    F.multi_head_attention_forward: multi_head_attention,
    F.scaled_dot_product_attention: lambda *args, **kwargs: attention(*args, **kwargs)[0],
}


def plain(module):
    """Turn off what an nn.TransformerEncoder does beside calls that can be sharded: without
    gradients it packs what is not padding in nested tensors. Returns whether it was on."""
    packs = isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor
    if packs:
        module.use_nested_tensor = False
    return packs


def adapt(model):
    """Give modules of torch.nn what a split model cannot have from them otherwise."""
    for path, module in named_modules(model):
        if plain(module):
            zero_padding = partial(_zero_padding, module)
            module.layers[-1].register_forward_hook(zero_padding, with_kwargs=True)
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            module.sparse = False
            warnings.warn(
                f"{path or 'the model'}: sparse=True is now False: gradients of a DTensor cannot be"
                " sparse"
            )


def _zero_padding(encoder, layer, args, kwargs, output):
    """After an encoder's last layer: zeros for padding, as nested tensors give."""
    mask = kwargs.get("src_key_padding_mask")
    slow = (
        layer.training
        or torch.is_autocast_enabled()
        or not torch.backends.mha.get_fastpath_enabled()
        or kwargs.get("src_mask") is not None
    )
    if slow or mask is None or output.dim() != 3 or output.requires_grad:
        return None
    with quiet():
        shown = mask == 0
        if encoder.mask_check and (shown[:, 1:] > shown[:, :-1]).any():  # not padded on the right
            return None
        return output.masked_fill(~shown.unsqueeze(-1), 0.0)
