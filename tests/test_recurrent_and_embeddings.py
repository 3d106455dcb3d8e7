"""torch.nn's recurrent layers, and embeddings with options."""

import warnings

import pytest
import torch
from helpers import close, pair
from models.torch_modules import causal, check_all, encoder, randn
from ranks import run_ranks
from torch import nn

from quintnet_dt import plan_tensor_parallel

# ---- recurrent layers


class Recurrent(nn.Module):
    def __init__(self, layer, width=16, packed=False, **options):
        super().__init__()
        self.emb, self.rnn = nn.Embedding(20, 16, padding_idx=0), layer(
            16, 16, **options
        )
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
            x = nn.utils.rnn.pack_padded_sequence(
                x, lengths, self.first, enforce_sorted=False
            )
            out, state = self.rnn(x, state)
            out, _ = nn.utils.rnn.pad_packed_sequence(out, self.first)
        return self.fc(out), state


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.gru, self.rnn = (
            nn.LSTMCell(16, 16),
            nn.GRUCell(16, 12),
            nn.RNNCell(12, 16),
        )
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
            lambda: Recurrent(
                nn.GRU, 32, num_layers=2, bidirectional=True, batch_first=True
            ),
            lambda: (ids(3, 6),),
            lambda: (ids(3, 6), randn(4, 3, 16)),
            lengths,
        ),
        "packed lstm": (lambda: Recurrent(nn.LSTM, batch_first=True), lengths),
        "projected": (lambda: Recurrent(nn.LSTM, 4, proj_size=4), lambda: (ids(5, 3),)),
        "rnn": (
            lambda: Recurrent(nn.RNN, nonlinearity="relu", bias=False),
            lambda: (ids(5, 3),),
        ),
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
        return self.out(
            self.encoder(x, mask=causal(ids.shape[1], dtype=x.dtype), is_causal=True)
        )


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
        cases = {
            k: cases[k] for k in ("last row is padding", "odd", "tied", "bag", "model")
        }
    check_all(cases, n, modes=["train"], share=1 / n + 0.05)


def test_a_weight_that_the_lookup_writes_to_is_replicated():
    """nn.Embedding(max_norm=...) scales the rows that it is asked for, on every rank
    alike."""
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
                sharded.emb.weight.grad.full_tensor(),
                whole.emb.weight.grad.to_dense(),
                "gradient",
            )

    run_ranks(ranks, 2)
