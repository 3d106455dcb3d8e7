"""Every kind of layer gives, sharded, the outputs and gradients of the whole one; so do
sizes that ranks do not divide."""

import pytest
import torch
import torch.nn.functional as F
from helpers import check
from models.gpt import GPT, ConvNet, FusedAttention, GatedMLP, features, ids, mlp
from torch import nn

# ---- layers


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_mlp(n, bias):
    def local(sharded, whole):
        assert {
            e.how
            for e in sharded.tensor_parallel_plan.entries.values()
            if len(e.shape) == 2
        } == {"local"}

    check(lambda: mlp(bias=bias), features(3, 16), n, share=1 / n + 0.05, then=local)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_gpt(n):
    check(GPT, ids(64, 2, 6), n, share=1 / n + 0.05)


@pytest.mark.parametrize(
    "options, n",
    [
        (dict(style="written"), 2),
        (dict(style="written"), 4),
        (dict(kv_heads=2), 2),
        (dict(kv_heads=2, style="written"), 2),
        (dict(kv_heads=2), 4),
        (dict(kv_heads=1), 2),
        (dict(kv_heads=2, style="written"), 4),
        (dict(norm=True), 2),
        (dict(norm=True, style="written"), 4),
        (dict(parallel=True), 2),
        (dict(parallel=True, style="written", bias=False), 4),
        (dict(tied=True), 2),
        (dict(tied=True), 4),
        (dict(heads=8, kv_heads=4), 4),
    ],
    ids=str,
)
def test_variants_of_attention(options, n):
    def then(sharded, whole):
        if options.get("tied"):
            assert sharded.head.weight is sharded.wte.weight
            assert sharded.wte.weight.placements[0].is_shard()

    check(lambda: GPT(**options), ids(64, 2, 6), n, share=1 / n + 0.08, then=then)


@pytest.mark.parametrize(
    "how, n",
    [("chunk", 2), ("chunk", 4), ("split", 2), ("slice", 2), ("interleaved", 2)],
)
def test_fused_gate_up(how, n):
    check(lambda: GatedMLP(how=how), features(2, 3, 16), n, share=1 / n + 0.05)


@pytest.mark.parametrize(
    "kind, kv, n",
    [
        ("split", 4, 2),
        ("split", 4, 4),
        ("split", 2, 2),
        ("width", 4, 2),
        ("timm", 4, 4),
        ("interleaved", 4, 2),
    ],
)
def test_fused_qkv(kind, kv, n):
    check(
        lambda: FusedAttention(kind=kind, kv_heads=kv),
        features(2, 5, 32),
        n,
        share=1 / n + 0.05,
    )


@pytest.mark.parametrize("train", [True, False])
def test_convolutions_with_batch_norm(train):
    check(ConvNet, features(2, 3, 8, 8), 2, train=train, calls=[features(3, 3, 10, 10)])


def test_group_norm():
    check(lambda: ConvNet(lambda c: nn.GroupNorm(4, c)), features(2, 3, 8, 8), 2)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_recurrent(layer):
    check(
        lambda: layer(8, 16, num_layers=2, batch_first=True),
        features(2, 5, 8),
        2,
        share=0.6,
    )


def test_multihead_attention():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.fc = nn.MultiheadAttention(
                16, 4, batch_first=True
            ), nn.Linear(16, 16)

        def forward(self, x):
            out, weights = self.attn(x, x, x)
            return self.fc(out), weights

    check(Net, features(2, 5, 16), 2, share=0.65)


@pytest.mark.parametrize("train, grad", [(True, True), (False, True), (False, False)])
def test_transformer_encoder_layer(train, grad):
    """In eval mode without gradients torch takes a fused path that reads the weights of
    its children."""
    build = lambda: nn.TransformerEncoderLayer(
        16, 4, 32, batch_first=True
    )  # noqa: E731
    check(build, features(2, 5, 16), 2, train=train, grad=grad)


def test_vocabulary_loss_inside():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.fc = nn.Embedding(32, 16, padding_idx=0), nn.Linear(16, 32)

        def forward(self, ids, labels=None):
            logits = self.fc(self.emb(ids))
            loss = (
                F.cross_entropy(logits.flatten(0, 1), labels.flatten())
                if labels is not None
                else None
            )
            return {"loss": loss, "logits": logits}

    def both():
        return torch.randint(0, 32, (2, 5)), torch.randint(0, 32, (2, 5))

    check(Net, both, 4, calls=[ids(32, 3, 4)])


def test_norms_inside_a_region():
    """A norm over the sharded dim needs all of it; one over heads does not."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = (
                nn.Linear(8, 32),
                nn.LayerNorm(32),
                nn.Linear(32, 8),
            )
            self.slope = nn.PReLU()
            self.scale = nn.Parameter(torch.rand(1))

        def forward(self, x):
            return self.b(self.slope(self.norm(self.a(x))) * self.scale)

    check(Net, features(3, 8), 2)


def test_scalar_weights_inside_a_region():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)
            self.slope, self.scale = nn.PReLU(), nn.Parameter(torch.rand(1))
            self.shift = nn.Parameter(torch.rand(32))

        def forward(self, x):
            return self.b(self.slope(self.a(x) * self.scale) + self.shift)

    check(Net, features(3, 8), 4, share=0.4)


def test_a_scale_computed_from_a_width():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x):
            x = self.a(x)
            return self.b(x / x.shape[-1] ** 0.5 + x.size(-1))

    check(Net, features(3, 8), 2)


# ---- sizes that tp does not divide


@pytest.mark.parametrize(
    "build, given, n",
    [
        (lambda: mlp(5, 6), features(3, 5), 4),
        (lambda: mlp(3, 2), features(3, 3), 4),
        (lambda: GPT(vocab=13, d=12, h=7, heads=3), ids(13, 2, 5), 2),
        (
            lambda: GPT(vocab=13, d=12, h=7, heads=3, style="written", tied=True),
            ids(13, 2, 5),
            4,
        ),
        (lambda: GatedMLP(5, 7), features(2, 5), 2),
        (lambda: FusedAttention(12, 3, 3, kind="timm"), features(2, 4, 12), 2),
        (lambda: nn.Linear(1, 1), features(2, 1), 2),
        (lambda: nn.Embedding(13, 3), ids(13, 2, 3), 4),
    ],
    ids="units-fewer-heads-written-gated-fused-one-rows".split("-"),
)
def test_sizes_that_tp_does_not_divide(build, given, n):
    check(build, given, n)
