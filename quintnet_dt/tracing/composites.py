"""What torch.nn computes in one piece, said again in pieces that can be sharded.

A torch-function mode sees `F.multi_head_attention_forward` as one call, in which no
head can be split. Our modes run what is here instead, with themselves on, so that the
calls within are the model's: in the trace, in the proof, and at run time where a module
is watched.
"""

import warnings
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ..parts import named_modules
from ..utils import quiet
from .attention import attention, multi_head_attention


def restated(func, args, kwargs):
    """What to run in place of a function that is many calls in one; None for any
    other."""
    if func is F.scaled_dot_product_attention and not (
        kwargs.get("dropout_p") or len(args) > 4 and args[4]
    ):
        return None
    return RESTATED.get(func)


RESTATED = {
    F.multi_head_attention_forward: multi_head_attention,
    F.scaled_dot_product_attention: lambda *args, **kwargs: attention(*args, **kwargs)[
        0
    ],
}


def plain(module):
    """Turn off what an nn.TransformerEncoder does beside calls that can be sharded:
    without gradients it packs what is not padding in nested tensors. Returns whether it
    was on."""
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
                f"{path or 'the model'}: sparse=True is now False: gradients of a"
                " DTensor cannot be sparse"
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
        # not padded on the right
        if encoder.mask_check and (shown[:, 1:] > shown[:, :-1]).any():
            return None
        return output.masked_fill(~shown.unsqueeze(-1), 0.0)
