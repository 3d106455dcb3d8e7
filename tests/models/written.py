"""Many small models to a launch, each against the whole model over several calls; and
parts to write them of."""

import copy

import torch
import torch.nn.functional as F
from helpers import compare, double, pair, share_of
from ranks import run_ranks
from torch import nn

CASES = {}  # group -> {name: (build, calls, options)}


def model(group, given, *calls, local=False):
    """Register a module class: `given` makes the example inputs, each of `calls` other
    ones, or (inputs, mode). `local`: some of it computes on shards."""

    def add(build):
        CASES.setdefault(group, {})[build.__name__] = (build, (given, *calls), local)
        return build

    return add


def run_models(group, n):
    """Every model of a group on n ranks: outputs, gradients and buffers of each
    call."""

    def ranks(rank):
        for name, (build, calls, local) in CASES[group].items():
            torch.manual_seed(3)
            calls = [c if isinstance(c, tuple) else (c, "train") for c in calls]
            calls = [(double(f()), mode) for f, mode in calls]
            at = "set-up"
            try:
                example = copy.deepcopy(calls[0][0])
                sharded, whole = pair(build, n, example_inputs=example, device="H100")
                assert (
                    share_of(sharded) <= 1 / n + 0.1
                ), f"holds {share_of(sharded):.1%}"
                hows = {e.how for e in sharded.tensor_parallel_plan.entries.values()}
                assert not local or any(
                    e.units for e in sharded.tensor_parallel_plan.entries.values()
                ), hows
                for i, (given, mode) in enumerate(calls):
                    at = f"call {i}, {mode}"
                    sharded.train(mode == "train"), whole.train(mode == "train")
                    compare(sharded, whole, given, grad=mode != "no_grad")
            except Exception as e:
                raise AssertionError(f"{name}, {at}: {type(e).__name__}: {e}") from e

    run_ranks(ranks, n, timeout=240)


def rows(*shape):
    return lambda: (torch.randn(*shape),)


def ids(rows, *shape):
    return lambda: (torch.randint(0, rows, shape),)


X, Y = rows(2, 6, 16), rows(3, 4, 16)
IDS, MORE_IDS = ids(48, 2, 7), ids(48, 3, 5)


def mlp(d=16, h=32, o=None):
    return nn.Sequential(nn.Linear(d, h), nn.GELU(), nn.Linear(h, o or d))


def heads(x):
    return x.unflatten(-1, (4, 4)).transpose(1, 2)


def attend(q, k, v, **options):
    return (
        F.scaled_dot_product_attention(heads(q), heads(k), heads(v), **options)
        .transpose(1, 2)
        .flatten(2)
    )


class Net(nn.Module):
    """Submodules and parameters by keyword."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if torch.is_tensor(part) else part)
