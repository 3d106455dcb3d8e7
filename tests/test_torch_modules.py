"""torch.nn's own composite modules: attention, transformers and their fast paths, recurrent layers,
embeddings with options."""

import contextlib
import copy
import itertools
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from helpers import close, compare, double, pair, run, same_output, share_of
from ranks import own_process, run_ranks
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from quintnet_dt import plan_tensor_parallel
from quintnet_dt.tracing.composites import restated

randn = torch.randn
causal = nn.Transformer.generate_square_subsequent_mask


# ---- the restatement against torch's own


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
        apart = {f"{x}_proj_weight": make(e, e) if on["separate"] else None for x in "qkv"}
        packed = None if on["separate"] else make(3 * e, e)
        bias_kv = (make(1, 1, e), make(1, 1, e)) if on["bias_kv"] else (None, None)
        bias, out = make(3 * e) if on["bias"] else None, (make(e, e), make(e))
        attn_mask = MASKS[mask](batch, heads, length, source)
        padding = [None, torch.rand(batch, source) > 0.6, randn(batch, source).double()][i % 3]
        if padding is not None and padding.dtype == torch.bool and not on["need"]:
            padding[-1] = True  # no key at all
        padding = padding[0] if padding is not None and not on["batched"] else padding

        def function():
            return F.multi_head_attention_forward(
                *(query, key, value, e, heads, packed, bias, *bias_kv, bool(on["zero"]), 0.3, *out),
                training=bool(on["training"]),
                key_padding_mask=padding,
                need_weights=bool(on["need"]),
                attn_mask=attn_mask,
                use_separate_proj_weight=bool(on["separate"]),
                average_attn_weights=bool(on["average"]),
                is_causal=mask == "causal",
                **apart,
            )

        given = [query, key, value, packed, *apart.values(), bias, *bias_kv, *out, attn_mask]
        both(
            function, list({id(x): x for x in given if x is not None and x.requires_grad}.values())
        )


@own_process
def test_restated_dropout_in_attention():
    torch.manual_seed(0)
    q, k, v = (randn(2, h, 5, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    wide = k.repeat_interleave(2, 1).detach().requires_grad_()
    nothing = (torch.rand(5, 5) > 0.5) & (torch.arange(5) > 0).unsqueeze(
        1
    )  # the first query sees no key
    for options in (
        {"is_causal": True},
        {"attn_mask": nothing},
        {"attn_mask": randn(2, 1, 5, 5).double(), "scale": 0.3},
    ):
        both(
            lambda: [F.scaled_dot_product_attention(q, wide, wide, dropout_p=0.4, **options)],
            [q, wide],
        )
        both(
            lambda: [
                F.scaled_dot_product_attention(q, k, v, dropout_p=0.4, enable_gqa=True, **options)
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


# ---- on ranks


def check_all(cases, n=2, modes=("train", "eval"), share=None):
    """One launch for many models, (build, inputs of calls, ...): training with gradients; in eval
    mode under no_grad, the first call with gradients and under inference_mode too."""

    def ranks(rank):
        for name, (build, *calls) in cases.items():
            for mode in modes:
                torch.manual_seed(3)
                given = [double(f()) for f in calls]
                sharded = None
                try:
                    sharded, whole = pair(
                        build, n, mode == "train", example_inputs=copy.deepcopy(given[0])
                    )
                    assert (
                        share is None or share_of(sharded) <= share
                    ), f"holds {share_of(sharded):.1%}"
                    for i, x in enumerate(given):
                        if mode == "train" or i == 0:
                            compare(sharded, whole, x)
                        if mode == "eval":
                            compare(sharded, whole, x, grad=False)
                    if mode == "eval":
                        with torch.inference_mode():
                            same_output(run(sharded, given[0]), run(whole, given[0]))
                    for (p_name, p), q in zip(sharded.named_parameters(), whole.parameters()):
                        # a forward may write to it (max_norm)
                        close(p.detach().full_tensor(), q.detach(), p_name)
                except Exception as error:
                    error.add_note(
                        f"{name}, {mode}\n{getattr(sharded, 'tensor_parallel_plan', None)}"
                    )
                    raise

    run_ranks(ranks, n, timeout=120)


def encoder(layers=1, norm=None, width=32, heads=4, **options):
    layer = nn.TransformerEncoderLayer(width, heads, 2 * width, **{"batch_first": True, **options})
    return lambda: nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width) if norm else None)


def padding(batch, length):
    mask = torch.zeros(batch, length, dtype=torch.bool)
    mask[1, 3:] = True
    return mask


def left_padding(batch, length):
    return padding(batch, length).flip(1)


class Attention(nn.Module):
    """A user's module around nn.MultiheadAttention."""

    def __init__(self, width=32, heads=4, **options):
        super().__init__()
        self.attn, self.fc = nn.MultiheadAttention(width, heads, **options), nn.Linear(width, width)

    def forward(self, x, y=None, z=None, **options):
        y = x if y is None else y
        out, weights = self.attn(x, y, y if z is None else z, **options)
        return self.fc(out), weights


def same(*shape):
    """One tensor as query, key and value."""
    x = randn(*shape, dtype=torch.float64)
    return x, x, x


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
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, batch_first=True), 1),
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
            "src_key_padding_mask": padding(
                2, 5
            ),  # and no memory_key_padding_mask: what the padding becomes is read
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
        lambda: {"x": randn(5, 2, 32), "y": randn(6, 2, 32), "key_padding_mask": padding(2, 6)},
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
        lambda: {"x": randn(2, 5, 32), "attn_mask": randn(8, 5, 5), "need_weights": False},
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


@pytest.mark.parametrize("cases", [TRANSFORMERS, ATTENTIONS], ids=["transformers", "attentions"])
@pytest.mark.filterwarnings(*IGNORED)
def test_attention(cases):
    check_all(cases, share=0.53)


@pytest.mark.filterwarnings(*IGNORED)
def test_attention_on_four_ranks():
    some = "encoder, padded, with a norm", "decoder", "attention over others"
    check_all({k: v for k, v in {**TRANSFORMERS, **ATTENTIONS}.items() if k in some}, 4, share=0.28)


@pytest.mark.filterwarnings(*IGNORED)
def test_padding_of_a_frozen_encoder():
    """Nothing needs gradients, so torch packs the input although they are enabled; padding becomes
    zeros, unless the fast path is off."""

    def ranks(rank):
        x = randn(2, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
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
        "attention": (lambda: Attention(36, 3, batch_first=True), lambda: (randn(2, 5, 36),)),
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
    """Two all-reduces forward and two backward a layer, and nothing else; dropout too."""

    def ranks(rank):
        for options in (
            {},
            {"norm_first": True, "batch_first": False},
            {"activation": "gelu", "dropout": 0.0},
        ):
            x = randn(5, 2, 64, dtype=torch.float64, requires_grad=True)
            model, _ = pair(encoder(2, width=64, **options), 2, example_inputs=(x,))
            weights = [e for e in model.tensor_parallel_plan.entries.values() if len(e.shape) > 1]
            assert all(
                e.dim is not None and e.how == "local" for e in weights
            ), model.tensor_parallel_plan
            model(x), model(x)  # in the first calls batches are compared
            with Collectives() as forward:
                loss = model(x).sum()
            with Collectives() as backward:
                loss.backward()
            # That the random state is compared before a forward that draws is none of the model's
            # own computation.
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
        q, k, v = (y.unflatten(-1, (-1, 8)).transpose(1, 2) for y in self.qkv(x).split(sizes, -1))
        dropout = self.dropout if self.training else 0.0
        grouped = self.kv_heads != 4
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, mask is None, enable_gqa=grouped)
        return F.dropout(self.proj(y.transpose(1, 2).flatten(2)), 0.3, self.training)


def test_dropout_within_attention():
    inputs = lambda: (randn(2, 45, 32),), lambda: (randn(2, 46, 32), torch.rand(46, 46) > 0.3)
    cases = {kv: (lambda kv=kv: CausalSelfAttention(kv), *inputs) for kv in (4, 2)}
    check_all(cases, share=0.52)
    plan = plan_tensor_parallel(CausalSelfAttention(), 2, example_inputs=(randn(2, 45, 32),))
    assert {plan.entries[f"{x}.weight"].how for x in ("qkv", "proj")} == {"local"}, plan


# ---- recurrent layers


class Recurrent(nn.Module):
    def __init__(self, layer, width=16, packed=False, **options):
        super().__init__()
        self.emb, self.rnn = nn.Embedding(20, 16, padding_idx=0), layer(16, 16, **options)
        self.fc, self.packed, self.first = (
            nn.Linear(width, 8),
            packed,
            options.get("batch_first", False),
        )

    def forward(self, ids, state=None, lengths=None):
        x = self.emb(ids)
        if lengths is None:
            out, state = self.rnn(x, state)
        else:
            x = nn.utils.rnn.pack_padded_sequence(x, lengths, self.first, enforce_sorted=False)
            out, state = self.rnn(x, state)
            out, _ = nn.utils.rnn.pad_packed_sequence(out, self.first)
        return self.fc(out), state


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(16, 16), nn.GRUCell(16, 12), nn.RNNCell(12, 16)
        self.fc = nn.Linear(16, 8)

    def forward(self, x):
        state, g, r, outs = None, None, None, []
        for step in x.unbind(1):
            state = self.lstm(step, state)
            g = self.gru(state[0], g)
            r = self.rnn(g, r)
            outs.append(r)
        return self.fc(torch.stack(outs, 1)), state


def test_recurrent_layers():
    ids = lambda *shape: torch.randint(1, 20, shape)
    lengths = lambda: {"ids": ids(3, 6), "lengths": torch.tensor([2, 6, 5])}
    cases = {
        "lstm": (
            lambda: nn.LSTM(8, 16, 2, bidirectional=True, dropout=0.2),
            lambda: (randn(5, 3, 8),),
            lambda: (randn(4, 2, 8), (randn(4, 2, 16), randn(4, 2, 16))),
            lambda: (randn(4, 8),),
        ),
        "gru": (
            lambda: Recurrent(nn.GRU, 32, num_layers=2, bidirectional=True, batch_first=True),
            lambda: (ids(3, 6),),
            lambda: (ids(3, 6), randn(4, 3, 16)),
            lengths,
        ),
        "packed lstm": (lambda: Recurrent(nn.LSTM, batch_first=True), lengths),
        "projected": (lambda: Recurrent(nn.LSTM, 4, proj_size=4), lambda: (ids(5, 3),)),
        "rnn": (lambda: Recurrent(nn.RNN, nonlinearity="relu", bias=False), lambda: (ids(5, 3),)),
        "cells": (Cells, lambda: (randn(2, 3, 16),), lambda: (randn(1, 4, 16),)),
    }
    check_all(cases, share=0.53)


# ---- embeddings


class Lookup(nn.Module):
    def __init__(self, rows=24, tied=False, kind=nn.Embedding, **options):
        super().__init__()
        self.emb, self.fc = kind(rows, 16, **options), nn.Linear(16, rows)
        if tied:
            self.fc.weight = self.emb.weight

    def forward(self, ids):
        return self.fc(self.emb(ids))


class LanguageModel(nn.Module):
    """An encoder between tied weights."""

    def __init__(self, **options):
        super().__init__()
        self.emb, self.pos, self.encoder = (
            nn.Embedding(64, 32, **options),
            nn.Embedding(16, 32),
            encoder(norm=True)(),
        )
        self.out = nn.Linear(32, 64, bias=False)
        self.out.weight = self.emb.weight

    def forward(self, ids):
        x = self.emb(ids) + self.pos(torch.arange(ids.shape[1]))
        return self.out(self.encoder(x, mask=causal(ids.shape[1], dtype=x.dtype), is_causal=True))


@pytest.mark.parametrize("n", [2, 4])
def test_embeddings(n):
    ids = lambda rows=24: lambda: (torch.randint(0, rows, (2, 5)),)
    options = {
        "padding": {"padding_idx": 3},
        "last row is padding": {"padding_idx": -1},
        "by frequency": {"scale_grad_by_freq": True},
        "odd": {"rows": 25, "padding_idx": 1, "scale_grad_by_freq": True},
        "tied": {"tied": True, "padding_idx": 2},
        "bag": {"kind": nn.EmbeddingBag},
    }
    cases = {k: (lambda o=o: Lookup(**o), ids(), ids()) for k, o in options.items()}
    cases |= {
        k: (lambda o=o: LanguageModel(**o), ids(64))
        for k, o in {"model": {}, "padded": {"padding_idx": 0}}.items()
    }
    if n == 4:
        cases = {k: cases[k] for k in ("last row is padding", "odd", "tied", "bag", "model")}
    check_all(cases, n, modes=["train"], share=1 / n + 0.05)


def test_a_weight_that_the_lookup_writes_to_is_replicated():
    """nn.Embedding(max_norm=...) scales the rows that it is asked for, on every rank alike."""
    ids = lambda: (torch.randint(0, 24, (2, 5)),)
    options = {
        "plain": {"max_norm": 1.0},
        "tied": {"max_norm": 1.0, "norm_type": 1.0, "tied": True},
        "bag": {"kind": nn.EmbeddingBag, "mode": "sum", "max_norm": 1.0},
    }
    for o in options.values():
        plan = plan_tensor_parallel(Lookup(**o), 2, example_inputs=ids())
        assert plan["emb.weight"].dim is None
    check_all({k: (lambda o=o: Lookup(**o), ids, ids) for k, o in options.items()})


def test_sparse_gradients_become_dense():
    """A DTensor cannot have sparse ones; the user is told."""

    def ranks(rank):
        ids = torch.tensor([[1, 2, 2], [0, 23, 1]])
        for kind in (nn.Embedding, nn.EmbeddingBag):
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                sharded, whole = pair(
                    lambda: Lookup(kind=kind, sparse=True), 2, example_inputs=(ids,)
                )
            assert any("emb: sparse=True" in str(w.message) for w in told)
            for model in (sharded, whole):
                model(ids).square().sum().backward()
            close(
                sharded.emb.weight.grad.full_tensor(), whole.emb.weight.grad.to_dense(), "gradient"
            )

    run_ranks(ranks, 2)
