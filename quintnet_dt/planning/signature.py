"""What tells one path through a forward from another before it runs."""

from itertools import combinations
from typing import NamedTuple

import torch
from torch import nn

from ..parts import modules, parameters
from ..utils import leaves, opaque

# What computes otherwise in training, of torch's modules. Of others' it shows when they run.
_DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    nn.RReLU,
)
_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm
_INSTANCE_NORMS = nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d
_MODED = (*_DROPOUTS, *_NORMS, *_INSTANCE_NORMS, nn.MultiheadAttention, nn.RNNBase)


def moded(model):
    """The modules within that compute otherwise in training."""
    return [m for m in modules(model) if isinstance(m, _MODED)]


def modes(model, modules):
    """How the modules in a list compute otherwise than the rest, as their places: those that are
    not in the model's own mode (dropout that is on for sampling, batch norms that are frozen), and
    dropouts that drop nothing, of which no operator tells."""
    odd = tuple(i for i, m in enumerate(modules) if m.training is not model.training)
    return odd, tuple(i for i, m in enumerate(modules) if getattr(m, "p", 1) == 0)


def device_of(model):
    """Where a model's forward runs; a model on the meta device is imagined on the CPU."""
    device = next((p.device for p in parameters(model)), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


class Signature(NamedTuple):
    """What tells one path through a forward from another. `kind`: the mode, which arguments are
    there, their kinds, dtypes, ranks and dims of size 1. `numbers`: the ints and floats among them,
    which may vary; `shapes`: of tensors.
    """

    kind: tuple
    numbers: tuple
    shapes: tuple


def signature(model, args, kwargs):
    """The Signature of a call. The order of keyword arguments is none of it: each rank may have its
    own."""
    numbers, shapes = [], []
    ordered = dict(sorted(kwargs.items())) if len(kwargs) > 1 else kwargs
    kinds = tuple(_kinds((args, ordered), 0, {}, numbers, shapes))
    method = getattr(
        vars(model).get("forward"), "__name__", "forward"
    )  # see register_forward_method
    return Signature(
        (model.training, torch.is_grad_enabled(), method, *kinds), tuple(numbers), tuple(shapes)
    )


def _kinds(obj, depth, seen, numbers, shapes):
    for path, x in leaves(obj):
        if isinstance(x, torch.Tensor):
            same = seen.setdefault(id(x), len(seen))  # query, key and value may be one tensor
            if depth == 0:
                shapes.append(x.shape)
            yield path, same, x.dtype, x.requires_grad, tuple(s == 1 for s in x.shape)
        elif isinstance(x, (bool, str, type(None))):
            yield path, x
        elif isinstance(x, (int, float)):
            numbers.append(x)
            yield path, type(x)
        elif opaque(x) and depth < 4:  # a cache: empty or filled
            sizes = [v for v in vars(x).values() if type(v) in (int, float)]
            yield path, type(x), tuple(
                (a > b) - (a < b) for a, b in combinations(sizes, 2)
            )  # of lengths: is it full?
            others = [v for v in vars(x).values() if type(v) not in (int, float)]
            yield from _kinds(others, depth + 1, seen, numbers, shapes)
        else:
            yield path, type(x)
