"""Copies of the inputs of a forward: fake ones, and real ones that it may change."""

import copy

import torch

from ..private import FakeCopyMode
from ..utils import has_state, leaves, replace, shard_kept, tensors, tensors_in_objects


def fake_inputs(fake_mode, args, kwargs, known=None):
    """The inputs with a fake tensor for each tensor, and copies of objects that hold
    tensors (a cache, which the forward may fill). With `known`, which is told the real
    tensor behind each fake one, a shard that an object keeps gets its whole shape; else
    it stays one.
    """
    memo = {}
    for _, holder, place, t in (
        tensors_in_objects((args, kwargs)) if known is not None else ()
    ):
        if (action := shard_kept(holder, place)) is not None:
            shape = list(t.shape)
            shape[action.split.dim] = action.split.length
            with fake_mode:
                memo[id(t)] = torch.empty(shape, dtype=t.dtype, device=t.device)

    # one that is given twice stays one
    given = {id(t): t for _, t in tensors((args, kwargs))}
    fakes = {
        i: fake_mode.from_tensor(t.detach()).requires_grad_(t.requires_grad)
        for i, t in given.items()
    }
    if known is not None:
        for i, t in given.items():
            known.give(fakes[i], t)
    with FakeCopyMode(fake_mode):
        return _instead((tuple(args), dict(kwargs)), fakes, memo)


def real_inputs(args, kwargs):
    """Copies of the inputs: a forward that runs on them cannot change the user's."""
    given = {id(t): t for _, t in tensors((args, kwargs))}
    copies = {
        i: t.detach().clone().requires_grad_(t.requires_grad) for i, t in given.items()
    }
    return _instead((tuple(args), dict(kwargs)), copies)


def _instead(obj, copies, memo=None):
    """A nested argument with the copies of its tensors, by id, and with copies of
    objects."""
    changes = {p: copies[id(t)] for p, t in tensors(obj)}
    return replace(
        obj,
        changes | {p: copy.deepcopy(x, memo) for p, x in leaves(obj) if has_state(x)},
    )
