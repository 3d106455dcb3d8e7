"""Convolutional networks: what is built of them in image and audio models gives,
sharded, the whole model's numbers, and its channels stay sharded."""

import contextlib
import copy
import unittest.mock
from collections import Counter
from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers import compare, double, pair, share_of
from models.conv import MODELS, ConvNeXt, basic, bottleneck, image, inverted
from ranks import run_ranks
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.utils.checkpoint import checkpoint

from quintnet_dt import apply_tensor_parallel, comm_ops, plan_tensor_parallel


@pytest.mark.parametrize("n, part", [(2, 0), (2, 1), (2, 2), (2, 3), (3, 0), (4, 1)])
def test_outputs_gradients_and_running_statistics(n, part):
    """On two ranks also a second call, which sees the statistics of the first, and then
    evaluation; half of them on three ranks, the others on four."""

    def ranks(rank):
        for name in list(MODELS)[part :: 4 if n == 2 else 2]:
            build, given, _ = MODELS[name]
            try:
                torch.manual_seed(3)
                inputs = [double(given()) for _ in range(2 if n == 2 else 1)]
                sharded, whole = pair(build, n, example_inputs=copy.deepcopy(inputs[0]))
                for x in inputs:
                    compare(sharded, whole, x)
                if n == 2:
                    sharded.eval(), whole.eval()
                    compare(sharded, whole, inputs[1])
                assert share_of(sharded) <= 1 / n + 0.1
            except BaseException as e:
                e.add_note(f"{name}, of\n{sharded.tensor_parallel_plan}")
                raise

    run_ranks(ranks, n)


IN_GROUPS = [
    "ResNeXt",
    "U-Net with groups",
    "transposed",
    "1-D and 3-D",
    "shuffled",
    "Swin",
    "pairs",
]


def test_weights_in_one_block():
    """Each rank holds one block of a weight, also where parts of groups or of pieces
    are its own; then by a plan that says otherwise of a bias than the weight's use
    would."""

    def ranks(rank):
        for name in IN_GROUPS:
            build, given, _ = MODELS[name]
            torch.manual_seed(3)
            inputs = double(given())
            models = pair(
                build, 2, example_inputs=copy.deepcopy(inputs), contiguous=True
            )
            plan = models[0].tensor_parallel_plan
            assert all(type(p) in (Shard, Replicate) for p in plan.placements.values())
            compare(*models, inputs)
            if name == "U-Net with groups":
                # together: parts of groups, and a block
                plan["up1.weight"], plan["up1.bias"] = Shard(1), Shard(0)
                compare(
                    *pair(build, 2, example_inputs=copy.deepcopy(inputs), plan=plan),
                    inputs,
                )

    run_ranks(ranks, 2)


@pytest.mark.parametrize(
    "name", [name for name, (_, _, local) in MODELS.items() if local]
)
def test_axes_run_through(name):
    build, given, local = MODELS[name]
    for n in (2, 3):
        plan = plan_tensor_parallel(build(), n, example_inputs=given())
        how = {
            m: {
                e.how
                for p, e in plan.entries.items()
                if p.startswith(f"{m}.") and len(e.shape) > 1
            }
            for m in local
        }
        # where two axes meet, one of the layers' results are completed at once
        assert all(x <= {"local", "gathered"} for x in how.values()), plan
        assert {"local"} in how.values(), plan


@contextlib.contextmanager
def counted():
    """The collectives that run within, by name."""
    counts = Counter()

    def count(owner, name):
        real = getattr(owner, name)
        return unittest.mock.patch.object(
            owner,
            name,
            lambda *a, **kw: (counts.update([name.strip("_")]), real(*a, **kw))[1],
        )

    with (
        count(dist, "all_reduce"),
        count(comm_ops, "_gather_flat"),
        count(comm_ops, "_scatter_flat"),
    ):
        yield counts


class Scaled(nn.Sequential):
    """Blocks whose input needs a gradient."""

    def __init__(self, *blocks):
        super().__init__(*blocks)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return super().forward(x * self.scale)


@pytest.mark.parametrize(
    "block, forward, backward",
    [
        (partial(basic, 48, 96), 1, 1),
        (partial(bottleneck, 48, 96, groups=6), 1, 1),
        (partial(inverted, 48, 192), 2, 2),
        (partial(ConvNeXt, 384), 1, 2),
        (partial(nn.Sequential, basic(48, 48), basic(48, 96)), 2, 2),
    ],
    ids=["basic", "grouped", "inverted with squeeze-excite", "ConvNeXt", "two"],
)
def test_collectives(block, forward, backward):
    """A column and row pair sums once forward, its input's gradient once backward;
    squeeze-excite sums its few channels once each way; a layer's scale, applied before
    the sum, has its gradient summed."""

    def ranks(rank):
        torch.manual_seed(0)
        model = Scaled(block()).double().eval()
        x = torch.randn(
            2, 384 if block.func is ConvNeXt else 48, 6, 6, dtype=torch.float64
        )
        apply_tensor_parallel(model, 2, example_inputs=(x,))
        for _ in range(2):  # in the first calls batches are compared
            model(x), model.train()(x), model.eval()
        with counted() as counts:
            y = model(x)
            assert counts == {"all_reduce": forward}, (
                counts,
                model.tensor_parallel_plan,
            )
            y.sum().backward()
        assert counts == {"all_reduce": forward + backward}, (
            counts,
            model.tensor_parallel_plan,
        )
        # the running statistics of a norm on shards are whole again: both in one
        # collective
        with counted() as counts:
            model.train()(x)
        norms = [
            p
            for p, e in model.tensor_parallel_plan.entries.items()
            if e.how == "local" and p.endswith("1.weight") and len(e.shape) == 1
        ]
        assert counts == Counter(all_reduce=forward, gather_flat=len(norms)), (
            counts,
            norms,
        )

    run_ranks(ranks, 2)


@pytest.mark.parametrize("n", [3, 4])
def test_no_channels_for_the_last_rank(n):
    """Convolutions and norms of nothing fail or crash: such a weight is gathered
    instead."""

    def ranks(rank):
        def build():
            return nn.Sequential(
                nn.Conv2d(3, n + 1, 3),
                nn.ReLU(),
                nn.Conv2d(n + 1, n + 1, 3),
                nn.GroupNorm(n + 1, n + 1),
                nn.Conv2d(n + 1, 3, 1),
            )

        sharded, whole = pair(
            build,
            n,
            plan={"0.weight": Shard(0), "2.weight": Shard(1), "4.weight": Shard(1)},
            example_inputs=double(image()()),
        )
        compare(sharded, whole, image()())

    run_ranks(ranks, n)


def test_statistics_in_a_checkpoint_that_ends_within_the_norm():
    """A forward that is recomputed ends as soon as its backward has what it needs: in
    the call that updates the running statistics, which have been by then."""

    def ranks(rank):
        build = lambda: nn.Sequential(
            nn.Conv1d(8, 12, 3, padding=1), nn.BatchNorm1d(12)
        )
        x = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(1)).double()
        models = pair(build, 2, example_inputs=(x,))
        for _ in range(2):
            for m in models:
                checkpoint(m, x, use_reentrant=False).square().sum().backward()
        for (name, a), (_, b) in zip(*(m.named_buffers() for m in models)):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)

    run_ranks(ranks, 2)
