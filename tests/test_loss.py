"""Losses on sharded logits: inside the model's own labels path always, outside with
loss_parallel=True."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import close, make, run, same_grads, same_output
from ranks import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel

from quintnet_dt import apply_tensor_parallel, comm_ops, plan_tensor_parallel

ROWS, VOCABULARY = (2, 6), 48


class Labels(nn.Module):
    """A head with a loss of its own, as Hugging Face models have."""

    def __init__(self, size=VOCABULARY, **options):
        super().__init__()
        self.embed, self.head = nn.Embedding(size, 16), nn.Linear(16, size)
        self.size, self.options = size, options

    def forward(self, ids, labels=None):
        logits = self.head(torch.tanh(self.embed(ids)))
        if labels is None:
            return {"logits": logits}
        return {
            "loss": F.cross_entropy(
                logits.view(-1, self.size), labels.view(-1), **self.options
            ),
            "logits": logits,
        }


def batch(size=VOCABULARY, ignored=-100):
    gen = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(0, size, ROWS, generator=gen) for _ in range(2))
    labels[0, :2] = ignored
    return ids, labels


def wide(n):
    """Placements that split the head over its vocabulary."""
    return {"head.weight": Shard(0), "head.bias": Shard(0)}


class Sent:
    """Elements of every tensor that a rank puts into a collective."""

    def __enter__(self):
        self.sizes, self.kept = [], (dist.all_reduce, comm_ops._gather_flat)
        dist.all_reduce = lambda x, **group: self.count(x) or self.kept[0](x, **group)
        comm_ops._gather_flat = lambda y, x, **group: self.count(x) or self.kept[1](
            y, x, **group
        )
        return self

    def count(self, x):
        self.sizes.append(x.numel())

    def __exit__(self, *_):
        dist.all_reduce, comm_ops._gather_flat = self.kept


OPTIONS = [
    dict(),
    dict(reduction="sum"),
    dict(reduction="none"),
    dict(label_smoothing=0.1),
    dict(ignore_index=3),
]


@pytest.mark.parametrize("n", [2, 4])
def test_a_loss_inside_the_model(n):
    def ranks(rank):
        for options in OPTIONS:
            whole = make(lambda: Labels(**options))
            sharded = apply_tensor_parallel(copy.deepcopy(whole), n, plan=wide(n))
            ids, labels = batch(ignored=options.get("ignore_index", -100))
            for given in ((ids,), (ids, labels)):
                found, expected = sharded(*given), whole(*given)
                same_output(found, expected)
            found["loss"].sum().backward(), expected["loss"].sum().backward()
            same_grads(sharded, whole)

    run_ranks(ranks, n)


@pytest.mark.parametrize("n", [2, 4])
def test_logits_stay_sharded(n):
    """Three reductions of a number a row, and no gather of the logits."""

    def ranks(rank):
        whole = make(Labels)
        sharded = apply_tensor_parallel(
            copy.deepcopy(whole), n, plan=wide(n), loss_parallel=True
        )
        assert sharded.tensor_parallel_plan.loss_parallel
        ids, labels = batch()
        sharded(ids, labels)
        with Sent() as sent:
            found = sharded(ids, labels)
        rows = labels.numel()
        assert sent.sizes[-3:] == [rows] * 3, sent.sizes
        assert (
            max(sent.sizes) <= rows * 16
        ), sent.sizes  # the embedding's; nothing of the logits
        expected = whole(ids, labels)
        assert isinstance(found["logits"], DTensor) and found["logits"].placements == (
            Shard(2),
        )
        assert found["logits"].to_local().shape == (*ROWS, VOCABULARY // n)
        close(found["loss"], expected["loss"], "loss")
        close(found["logits"].full_tensor(), expected["logits"], "logits")
        found["loss"].backward(), expected["loss"].backward()
        same_grads(sharded, whole)

        sharded.zero_grad(), whole.zero_grad()  # outside, by torch's own
        with loss_parallel():
            F.cross_entropy(
                sharded(ids)["logits"].flatten(0, 1), labels.flatten()
            ).backward()
        F.cross_entropy(whole(ids)["logits"].flatten(0, 1), labels.flatten()).backward()
        same_grads(sharded, whole)

    run_ranks(ranks, n)


@pytest.mark.parametrize("n", [2, 4])
def test_an_odd_vocabulary(n):
    """Logits of which the ranks have unequal parts, inside and outside."""

    def ranks(rank):
        whole = make(lambda: Labels(47))
        sharded = apply_tensor_parallel(
            copy.deepcopy(whole), n, plan=wide(n), loss_parallel=True
        )
        ids, labels = batch(47)
        found, expected = sharded(ids, labels), whole(ids, labels)
        assert found["logits"].placements == (Shard(2),)
        close(found["loss"], expected["loss"], "loss")
        close(found["logits"].full_tensor(), expected["logits"], "logits")
        found["loss"].backward(), expected["loss"].backward()
        same_grads(sharded, whole)
        sharded.zero_grad(), whole.zero_grad()
        with loss_parallel():
            logits = sharded(ids)["logits"].flatten(0, 1)
            loss = F.cross_entropy(logits, labels.flatten())
            loss.backward()
        again = F.cross_entropy(whole(ids)["logits"].flatten(0, 1), labels.flatten())
        again.backward()
        close(loss.full_tensor(), again, "loss")
        same_grads(sharded, whole)

    run_ranks(ranks, n)


def test_what_the_shards_cannot_do_is_gathered():
    """Class weights."""
    weights = torch.rand(VOCABULARY).double()

    def ranks(rank):
        whole = make(lambda: Labels(weight=weights))
        sharded = apply_tensor_parallel(copy.deepcopy(whole), 2, plan=wide(2))
        ids, labels = batch()
        found, expected = sharded(ids, labels), whole(ids, labels)
        same_output(found, expected)
        found["loss"].backward(), expected["loss"].backward()
        same_grads(sharded, whole)

    run_ranks(ranks, 2)


def test_the_plan_counts_no_gather_of_the_logits():
    kept, gathered = (
        plan_tensor_parallel(
            Labels(4800), 2, example_inputs=batch()[:1], loss_parallel=flag
        )
        for flag in (True, False)
    )
    assert kept.bytes_per_step < gathered.bytes_per_step
    assert type(kept).from_json(kept.to_json()) == kept


class Dropping(nn.Module):
    """Layers that are left out by chance (LayerDrop, https://arxiv.org/abs/1909.11556)
    between an embedding and the head that it is tied to, as M2M-100 has them."""

    def __init__(self, size=VOCABULARY * 32, width=16):
        super().__init__()
        self.embed, self.head = Scaled(size, width), nn.Linear(width, size, bias=False)
        self.head.weight = self.embed.weight
        self.body = Body(width)

    def forward(self, ids):
        return self.head(self.body(self.embed(ids)))


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 4


class Body(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))
            for _ in range(3)
        )

    def forward(self, x):
        for layer in self.layers:
            if torch.rand([]) > 0.5:
                x = x + layer(x)
        return x


@pytest.mark.parametrize("n", [2, 3])
def test_logits_stay_sharded_where_layers_are_dropped(n):
    """What reads values between them hands no shards on."""

    def ranks(rank):
        ids = (torch.randint(0, VOCABULARY, (4, 64)),)
        whole = make(Dropping)
        sharded = apply_tensor_parallel(
            copy.deepcopy(whole), n, example_inputs=ids, loss_parallel=True
        )
        assert sharded.tensor_parallel_plan["embed.weight"].how == "local"
        for seed in range(4):
            sharded.zero_grad(), whole.zero_grad()
            found, expected = run(sharded, ids, seed), run(whole, ids, seed)
            assert isinstance(found, DTensor)
            same_output(found.full_tensor(), expected)
            found.full_tensor().square().sum().backward()
            expected.square().sum().backward()
            same_grads(sharded, whole)

    run_ranks(ranks, n)
