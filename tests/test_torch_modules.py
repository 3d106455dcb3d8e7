"""torch.nn's own composite modules: attention, transformers and their fast paths."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from helpers import pair, run, same_output
from models.torch_modules import (
    causal,
    check_all,
    encoder,
    left_padding,
    padding,
    randn,
    same,
)
from ranks import run_ranks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from quintnet_dt import plan_tensor_parallel


class Attention(nn.Module):
    """A user's module around nn.MultiheadAttention."""

    def __init__(self, width=32, heads=4, **options):
        super().__init__()
        self.attn, self.fc = nn.MultiheadAttention(width, heads, **options), nn.Linear(
            width, width
        )

    def forward(self, x, y=None, z=None, **options):
        y = x if y is None else y
        out, weights = self.attn(x, y, y if z is None else z, **options)
        return self.fc(out), weights


TRANSFORMERS = {
    "encoder": (
        encoder(2, activation="gelu"),
        lambda: {"src": randn(2, 5, 32)},
        lambda: {"src": randn(2, 6, 32), "src_key_padding_mask": padding(2, 6)},
        lambda: {"src": randn(2, 6, 32), "src_key_padding_mask": left_padding(2, 6)},
        lambda: {"src": randn(2, 6, 32), "mask": causal(6)},
        lambda: {"src": randn(6, 32)},
    ),
    "encoder, padded, with a norm": (
        encoder(norm=True),
        lambda: {"src": randn(2, 5, 32), "src_key_padding_mask": padding(2, 5)},
    ),
    "encoder, norm first": (
        encoder(2, norm_first=True, batch_first=False),
        lambda: {"src": randn(5, 2, 32)},
        lambda: {
            "src": randn(6, 2, 32),
            "src_key_padding_mask": padding(2, 6),
            "mask": torch.rand(6, 6) > 0.8,
        },
    ),
    "no bias": (encoder(bias=False, dropout=0.0), lambda: {"src": randn(2, 5, 32)}),
    "decoder": (
        lambda: nn.TransformerDecoder(
            nn.TransformerDecoderLayer(32, 4, 64, batch_first=True), 1
        ),
        lambda: {"tgt": randn(2, 5, 32), "memory": randn(2, 4, 32)},
        lambda: {
            "tgt": randn(2, 5, 32),
            "memory": randn(2, 4, 32),
            "tgt_mask": causal(5),
            "tgt_is_causal": True,
        },
    ),
    "encoder and decoder": (
        lambda: nn.Transformer(32, 4, 1, 1, 64, batch_first=True),
        lambda: {"src": randn(2, 5, 32), "tgt": randn(2, 4, 32)},
        lambda: {
            "src": randn(2, 5, 32),
            "tgt": randn(2, 4, 32),
            "tgt_mask": causal(4),
            # and no memory_key_padding_mask: what the padding becomes is read
            "src_key_padding_mask": padding(2, 5),
        },
    ),
}

ATTENTIONS = {
    "attention itself": (
        lambda: nn.MultiheadAttention(32, 4, batch_first=True),
        lambda: same(2, 5, 32),
        lambda: (randn(2, 5, 32), randn(2, 6, 32), randn(2, 6, 32)),
        lambda: {
            **dict(zip(("query", "key", "value"), same(2, 5, 32))),
            "average_attn_weights": False,
        },
    ),
    "attention over others": (
        lambda: nn.MultiheadAttention(32, 4, kdim=8, vdim=12, dropout=0.2),
        lambda: (randn(5, 2, 32), randn(6, 2, 8), randn(6, 2, 12)),
        lambda: (randn(5, 32), randn(6, 8), randn(6, 12)),
    ),
    "in a user's module": (
        lambda: Attention(dropout=0.2, add_bias_kv=True, add_zero_attn=True),
        lambda: (randn(5, 2, 32),),
        lambda: {
            "x": randn(5, 2, 32),
            "y": randn(6, 2, 32),
            "key_padding_mask": padding(2, 6),
        },
        lambda: {
            "x": randn(5, 2, 32),
            "y": randn(6, 2, 32),
            "z": randn(6, 2, 32),
            "need_weights": False,
        },
        lambda: {
            "x": randn(5, 32),
            "attn_mask": torch.rand(4, 5, 5) > 0.9,
            "average_attn_weights": False,
        },
    ),
    "masks": (
        lambda: Attention(dropout=0.2, batch_first=True, bias=False),
        lambda: {
            "x": randn(2, 5, 32),
            "attn_mask": randn(8, 5, 5),
            "need_weights": False,
        },
        lambda: {
            "x": randn(2, 5, 32),
            "attn_mask": causal(5),
            "is_causal": True,
            "need_weights": False,
        },
    ),
}


IGNORED = (
    "ignore:enable_nested_tensor",
    "ignore:The PyTorch API of nested",
    "ignore:Support for mismatched",
)


def every_second(cases, first):
    return dict(list(cases.items())[first::2])


@pytest.mark.parametrize(
    "cases",
    [every_second(TRANSFORMERS, 0), every_second(TRANSFORMERS, 1), ATTENTIONS],
    ids=["transformers", "other transformers", "attentions"],
)
@pytest.mark.filterwarnings(*IGNORED)
def test_attention(cases):
    check_all(cases, share=0.53)


@pytest.mark.filterwarnings(*IGNORED)
def test_attention_on_four_ranks():
    some = "encoder, padded, with a norm", "decoder", "attention over others"
    check_all(
        {k: v for k, v in {**TRANSFORMERS, **ATTENTIONS}.items() if k in some},
        4,
        share=0.28,
    )


@pytest.mark.filterwarnings(*IGNORED)
def test_padding_of_a_frozen_encoder():
    """Nothing needs gradients, so torch packs the input although they are enabled;
    padding becomes zeros, unless the fast path is off."""

    def ranks(rank):
        x = randn(
            2, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        given = {"src": x, "src_key_padding_mask": padding(2, 6)}
        build = lambda: encoder(2)().requires_grad_(False)
        sharded, whole = pair(build, 2, train=False, example_inputs=given)
        for model in (sharded, copy.deepcopy(sharded)):
            same_output(run(model, given), run(whole, given))
            assert not run(model, given)[1, 3:].any()
        torch.backends.mha.set_fastpath_enabled(False)
        same_output(run(sharded, given), run(whole, given))
        assert run(sharded, given)[1, 3:].all()

    run_ranks(ranks, 2)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_heads_that_ranks_do_not_divide():
    """The weights are split all the same."""
    cases = {
        "encoder": (
            encoder(width=36, heads=3),
            lambda: {"src": randn(2, 5, 36)},
            lambda: {"src": randn(2, 5, 36), "src_key_padding_mask": padding(2, 5)},
        ),
        "attention": (
            lambda: Attention(36, 3, batch_first=True),
            lambda: (randn(2, 5, 36),),
        ),
        "over others": (
            lambda: nn.MultiheadAttention(36, 3, kdim=8, vdim=8, add_bias_kv=True),
            lambda: (randn(5, 2, 36), randn(6, 2, 8), randn(6, 2, 8)),
        ),
    }
    check_all(cases, share=0.53)


class Collectives(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.names[func._schema.name] += 1
        return func(*args, **kwargs or {})


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_a_layer_of_a_transformer_sends_as_megatron_does():
    """Two all-reduces forward and two backward a layer, and nothing else; dropout
    too."""

    def ranks(rank):
        for options in (
            {},
            {"norm_first": True, "batch_first": False},
            {"activation": "gelu", "dropout": 0.0},
        ):
            x = randn(5, 2, 64, dtype=torch.float64, requires_grad=True)
            model, _ = pair(encoder(2, width=64, **options), 2, example_inputs=(x,))
            weights = [
                e
                for e in model.tensor_parallel_plan.entries.values()
                if len(e.shape) > 1
            ]
            assert all(
                e.dim is not None and e.how == "local" for e in weights
            ), model.tensor_parallel_plan
            model(x), model(x)  # in the first calls batches are compared
            with Collectives() as forward:
                loss = model(x).sum()
            with Collectives() as backward:
                loss.backward()
            # That the random state is compared before a forward that draws is none of
            # the model's own computation.
            assert forward.names == {"c10d::allreduce_": 4}, (options, forward.names)
            assert backward.names == {"c10d::allreduce_": 4}, (options, backward.names)

    run_ranks(ranks, 2)


def test_attention_weights_are_packed_thirds():
    plan = plan_tensor_parallel(
        nn.MultiheadAttention(64, 4).double(), 2, example_inputs=same(16, 2, 64)
    )
    entry = plan.entries["in_proj_weight"]
    assert (entry.dim, entry.pieces, entry.how) == (0, 3, "local")
    assert plan.entries["out_proj.weight"].dim == 1


class CausalSelfAttention(nn.Module):
    """A fused projection whose attention has a dropout of its own."""

    def __init__(self, kv_heads=4, dropout=0.3):
        super().__init__()
        self.kv_heads, self.dropout = kv_heads, dropout
        self.qkv, self.proj = nn.Linear(32, 32 + 16 * kv_heads), nn.Linear(32, 32)

    def forward(self, x, mask=None):
        sizes = [32, 8 * self.kv_heads, 8 * self.kv_heads]
        q, k, v = (
            y.unflatten(-1, (-1, 8)).transpose(1, 2)
            for y in self.qkv(x).split(sizes, -1)
        )
        dropout = self.dropout if self.training else 0.0
        grouped = self.kv_heads != 4
        y = F.scaled_dot_product_attention(
            q, k, v, mask, dropout, mask is None, enable_gqa=grouped
        )
        return F.dropout(self.proj(y.transpose(1, 2).flatten(2)), 0.3, self.training)


def test_dropout_within_attention():
    inputs = lambda: (randn(2, 45, 32),), lambda: (
        randn(2, 46, 32),
        torch.rand(46, 46) > 0.3,
    )
    cases = {kv: (lambda kv=kv: CausalSelfAttention(kv), *inputs) for kv in (4, 2)}
    check_all(cases, share=0.52)
    plan = plan_tensor_parallel(
        CausalSelfAttention(), 2, example_inputs=(randn(2, 45, 32),)
    )
    assert {plan.entries[f"{x}.weight"].how for x in ("qkv", "proj")} == {"local"}, plan
