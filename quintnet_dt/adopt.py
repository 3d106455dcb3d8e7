"""What a user hung on a model's parameters before it was split goes on with the
DTensors: gradient hooks, optimizers, lists.

A plain Parameter cannot become a DTensor itself (their classes lay out memory
otherwise, so `torch.utils.swap_tensors` refuses), so whatever holds one is given the
other.
"""

import gc
import sys
import types
from collections import deque
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from .private import share_hooks


class Replaced(NamedTuple):
    """A parameter, and the DTensor that took its place."""

    old: torch.Tensor
    new: DTensor


# References to a parameter that nothing else holds: from its Replaced, and from the
# question.
_REFERENCES = 2
_AT_ONCE = 8  # the time that Python takes to find what holds some objects grows with their number


def adopt(replaced: list[Replaced]) -> None:
    """Give what holds the old parameters the new ones: lists, dicts (optimizers' state
    is split along), attributes of objects. The hooks on their gradients run on the new
    ones' gradients.

    Raises RuntimeError where something holds one that cannot be given another: a tuple
    or a set that a list, a dict or an object keeps.
    """
    by_id = {id(r.old): r for r in replaced if r.new is not r.old}
    for r in by_id.values():
        share_hooks(r.old, r.new)
    ours = {id(replaced), id(by_id), *map(id, replaced)}
    todo, stuck = list(by_id.values()), set()
    while todo := [r for r in todo if sys.getrefcount(r.old) > _REFERENCES]:
        # What holds some of them most often holds the others too.
        some, todo = todo[:_AT_ONCE], todo[_AT_ONCE:]
        for holder in gc.get_referrers(*(r.old for r in some)):
            if (
                id(holder) not in ours
                and not _give(holder, by_id)
                and _kept_by_user(holder, ours)
            ):
                stuck.add(type(holder).__name__)
        del holder
    if stuck:
        raise RuntimeError(
            "apply_tensor_parallel: expected what holds the model's parameters to be"
            " lists, dicts or attributes, which are given the DTensors, found them in"
            f" a {' and a '.join(sorted(stuck))} too, which would keep the old ones:"
            " make it after the split"
        )


def _give(holder: Any, by_id: dict[int, Replaced]) -> bool:
    """Put the new parameters in the place of the old; whether that could be done, or
    need not."""
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


def _give_dict(holder: dict, by_id: dict[int, Replaced]) -> None:
    for key, x in list(holder.items()):
        if id(x) in by_id:
            holder[key] = by_id[id(x)].new
    if any(id(key) in by_id for key in holder):  # an optimizer's state
        items = list(holder.items())
        holder.clear()
        for key, x in items:
            if r := by_id.get(id(key)):
                key, x = r.new, _split_state(x, r)
            holder[key] = x


def _split_state(state: Any, replaced: Replaced) -> Any:
    """What an optimizer keeps for a parameter: tensors of its shape are split as it
    is."""
    if not isinstance(state, dict):
        return state
    new = replaced.new

    def split(x: Any) -> Any:
        if (
            not isinstance(x, torch.Tensor)
            or isinstance(x, DTensor)
            or x.shape != new.shape
        ):
            return x
        return distribute_tensor(x, new.device_mesh, new.placements, src_data_rank=None)

    return {name: split(x) for name, x in state.items()}


def _kept_by_user(holder: Any, ours: set[int]) -> bool:
    """Whether something that lasts keeps a tuple or a set, and not only code that
    runs."""
    keepers = (x for x in gc.get_referrers(holder) if id(x) not in ours)
    return any(isinstance(x, (list, dict)) or hasattr(x, "__dict__") for x in keepers)
