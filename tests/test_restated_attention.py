"""Attention as it is restated, one operator a step, against torch's own."""

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from models.torch_modules import randn
from ranks import own_process
from torch import nn
from torch.overrides import TorchFunctionMode

from quintnet_dt.tracing.composites import restated


class Restated(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (inner := restated(func, args, kwargs)) is not None:
            with self:
                return inner(*args, **kwargs)
        return func(*args, **kwargs)


def both(function, leaves):
    """Outputs and gradients of torch's own, and of what our modes run."""
    found = []
    for mode in (contextlib.nullcontext(), Restated()):
        torch.manual_seed(1)
        with mode:
            outs = [x for x in function() if x is not None]
        loss = sum((x * torch.arange(x.numel()).view_as(x).cos()).sum() for x in outs)
        found.append([*outs, *torch.autograd.grad(loss, leaves)])
    for own, ours in zip(*found):
        assert own.shape == ours.shape
        torch.testing.assert_close(ours, own, rtol=1e-12, atol=1e-11, equal_nan=True)


MASKS = {
    "none": lambda b, h, n, s: None,
    "bool 2-D": lambda b, h, n, s: torch.rand(n, s) > 0.7,
    "float 2-D": lambda b, h, n, s: randn(n, s).double().requires_grad_(),
    "bool 3-D": lambda b, h, n, s: torch.rand(b * h, n, s) > 0.7,
    "float 3-D": lambda b, h, n, s: randn(b * h, n, s).double().requires_grad_(),
    "causal": lambda b, h, n, s: torch.ones(n, s, dtype=torch.bool).tril() == 0,
}
SWITCHES = "batched separate bias bias_kv zero need average training".split()


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("of", ["self", "memory", "all apart"])
@own_process
def test_restated_attention(of, mask):
    e, heads, length = 12, 3, 4
    for i, bits in enumerate(itertools.product((0, 1), repeat=len(SWITCHES))):
        on = dict(zip(SWITCHES, bits))
        if i % 13:
            continue
        torch.manual_seed(i)
        make = lambda *shape: randn(*shape, dtype=torch.float64, requires_grad=True)
        batch = 2 if on["batched"] else 1
        wide = (batch,) if on["batched"] else ()
        query = make(length, *wide, e)
        key = query if of == "self" else make(5, *wide, e)
        value = make(5, *wide, e) if of == "all apart" else key
        source = key.shape[0]
        apart = {
            f"{x}_proj_weight": make(e, e) if on["separate"] else None for x in "qkv"
        }
        packed = None if on["separate"] else make(3 * e, e)
        bias_kv = (make(1, 1, e), make(1, 1, e)) if on["bias_kv"] else (None, None)
        bias, out = make(3 * e) if on["bias"] else None, (make(e, e), make(e))
        attn_mask = MASKS[mask](batch, heads, length, source)
        padding = [
            None,
            torch.rand(batch, source) > 0.6,
            randn(batch, source).double(),
        ][i % 3]
        if padding is not None and padding.dtype == torch.bool and not on["need"]:
            padding[-1] = True  # no key at all
        padding = padding[0] if padding is not None and not on["batched"] else padding

        def function():
            return F.multi_head_attention_forward(
                *(
                    query,
                    key,
                    value,
                    e,
                    heads,
                    packed,
                    bias,
                    *bias_kv,
                    bool(on["zero"]),
                    0.3,
                    *out,
                ),
                training=bool(on["training"]),
                key_padding_mask=padding,
                need_weights=bool(on["need"]),
                attn_mask=attn_mask,
                use_separate_proj_weight=bool(on["separate"]),
                average_attn_weights=bool(on["average"]),
                is_causal=mask == "causal",
                **apart,
            )

        given = [
            query,
            key,
            value,
            packed,
            *apart.values(),
            bias,
            *bias_kv,
            *out,
            attn_mask,
        ]
        both(
            function,
            list(
                {id(x): x for x in given if x is not None and x.requires_grad}.values()
            ),
        )


@own_process
def test_restated_dropout_in_attention():
    torch.manual_seed(0)
    q, k, v = (
        randn(2, h, 5, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)
    )
    wide = k.repeat_interleave(2, 1).detach().requires_grad_()
    # the first query sees no key
    nothing = (torch.rand(5, 5) > 0.5) & (torch.arange(5) > 0).unsqueeze(1)
    for options in (
        {"is_causal": True},
        {"attn_mask": nothing},
        {"attn_mask": randn(2, 1, 5, 5).double(), "scale": 0.3},
    ):
        both(
            lambda: [
                F.scaled_dot_product_attention(q, wide, wide, dropout_p=0.4, **options)
            ],
            [q, wide],
        )
        both(
            lambda: [
                F.scaled_dot_product_attention(
                    q, k, v, dropout_p=0.4, enable_gqa=True, **options
                )
            ],
            [q, k, v],
        )


def test_restated_attention_refuses_what_torch_refuses():
    x = randn(5, 2, 8)
    attn = nn.MultiheadAttention(8, 2)
    wrong = [
        {"attn_mask": torch.zeros(1, 5)},
        {"attn_mask": torch.zeros(2, 5, 5)},
        {"key_padding_mask": torch.zeros(1, 5)},
        {"is_causal": True},
        {"key": x[:, :1], "value": x[:, :1]},
        {"query": randn(5, 2, 6), "key": randn(5, 2, 6), "value": randn(5, 2, 6)},
    ]
    for options in wrong:
        for mode in (contextlib.nullcontext(), Restated()):
            with mode, pytest.raises((RuntimeError, AssertionError)):
                attn(**{"query": x, "key": x, "value": x, **options})
