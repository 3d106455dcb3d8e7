"""What a user hung on a model's parameters before it was split goes on with the DTensors: gradient
hooks, optimizers, lists.

A plain Parameter cannot become a DTensor itself (their classes lay out memory otherwise, so
`torch.utils.swap_tensors` refuses), so whatever holds one is given the other.
"""

import gc
import sys
import types
from collections import deque
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from .private import share_hooks


class Replaced(NamedTuple):
    """A parameter, and the DTensor that it became."""

    old: torch.Tensor
    new: DTensor


def adopt(splits):
    """Give what holds the old parameters of [Replaced, ...] the new ones: lists, dicts (optimizers'
    state is split along), attributes of objects. The hooks on their gradients run on the new ones'
    gradients.

    Raises RuntimeError where something holds one that cannot be given another: a tuple or a set
    that a list, a dict or an object keeps.
    """
    by_id = {id(s.old): s for s in splits if s.new is not s.old}
    for s in by_id.values():
        share_hooks(s.old, s.new)
    ours = {id(splits), id(by_id), *map(id, splits)}
    todo, stuck = list(by_id.values()), []
    while todo := [s for s in todo if sys.getrefcount(s.old) > _REFERENCES]:
        some, todo = (
            todo[:_AT_ONCE],
            todo[_AT_ONCE:],
        )  # what holds one most often holds the others too
        for holder in gc.get_referrers(*(s.old for s in some)):
            if id(holder) not in ours and not _give(holder, by_id) and _kept_by_user(holder, ours):
                stuck.append(type(holder).__name__)
        del holder
    if stuck:
        raise RuntimeError(
            "apply_tensor_parallel: expected what holds the model's parameters to be lists, dicts"
            " or attributes, which are given the DTensors, found them in a"
            f" {' and a '.join(sorted(set(stuck)))} too, which would keep the old ones: make it"
            " after the split"
        )


# References to a parameter that nothing else holds: from its Replaced, and from the question.
_REFERENCES = 2
_AT_ONCE = 8  # the time that Python takes to find what holds some objects grows with their number


def _give(holder, by_id):
    """Put the new parameters in the place of the old; whether that could be done, or need not."""
    if isinstance(holder, (list, deque)):
        for i, x in enumerate(holder):
            if id(x) in by_id:
                holder[i] = by_id[id(x)].new
    elif isinstance(holder, types.CellType):
        holder.cell_contents = by_id[id(holder.cell_contents)].new
    elif isinstance(holder, dict):
        _give_dict(holder, by_id)
    elif isinstance(holder, (tuple, set, frozenset)):
        return False
    elif hasattr(holder, "__dict__") and not isinstance(
        holder, (torch.Tensor, type, types.ModuleType)
    ):
        _give_dict(vars(holder), by_id)
    return True


def _give_dict(held, by_id):
    for key, x in list(held.items()):
        if id(x) in by_id:
            held[key] = by_id[id(x)].new
    if any(id(key) in by_id for key in held):  # an optimizer's state
        items = [
            (by_id[id(k)].new, _split_state(x, by_id[id(k)])) if id(k) in by_id else (k, x)
            for k, x in held.items()
        ]
        held.clear()
        held.update(items)


def _split_state(state, split):
    """What an optimizer keeps for a parameter: tensors of its shape lie as it does."""
    if not isinstance(state, dict):
        return state
    old, new = split
    return {
        name: (
            distribute_tensor(x, new.device_mesh, new.placements, src_data_rank=None)
            if isinstance(x, torch.Tensor) and x.shape == old.shape and not isinstance(x, DTensor)
            else x
        )
        for name, x in state.items()
    }


def _kept_by_user(holder, ours):
    """Whether something that lasts keeps a tuple or a set, and not only code that runs."""
    keepers = (x for x in gc.get_referrers(holder) if id(x) not in ours)
    return any(isinstance(x, (list, dict)) or hasattr(x, "__dict__") for x in keepers)
