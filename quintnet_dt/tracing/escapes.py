"""Tensors that a forward leaves where others look: in a list of the user's, an object,
a variable of a file.

What is traced is let go of, and what is alive then is kept by someone.
"""

import gc
import weakref
from collections import deque

import torch


def let_go(tensors):
    """Empty a list of the tensors that a forward made, of which nothing else of this
    library's holds one any more.

    Returns the indices of those that something still holds. Lists, sets and dicts of
    the user's are rid of them: they are no tensors that a call of the user's made.
    """
    left = [weakref.ref(t) for t in tensors]
    tensors.clear()
    if all(ref() is None for ref in left):
        return []
    gc.collect()  # cycles of Python objects
    alive = {id(ref()): ref() for ref in left if ref() is not None}
    if not alive:
        return []
    kept = _held(alive)
    return [i for i, ref in enumerate(left) if id(ref()) in kept]


def _held(alive):
    """The ids of those tensors that something holds; containers are rid of them."""
    holders = [h for h in gc.get_referrers(*alive.values()) if h is not alive]
    held = {id(x) for h in holders for x in gc.get_referents(h) if id(x) in alive}
    namespaces = _namespaces([h for h in holders if isinstance(h, dict)])
    for holder in holders:
        if id(holder) not in namespaces:
            _rid(holder, alive)
    return held


def _rid(holder, alive):
    """Take the tensors out of a container."""
    if isinstance(holder, (list, deque)):
        left = [x for x in holder if id(x) not in alive]
        holder.clear()
        holder.extend(left)
    elif isinstance(holder, set):
        holder.difference_update([x for x in holder if id(x) in alive])
    elif isinstance(holder, dict):
        for key in [key for key, x in holder.items() if id(x) in alive]:
            del holder[key]


def _namespaces(dicts):
    """The ids of those dicts that hold the attributes of an object or the names of a
    file. (One search through memory for all: it takes a second where a graph is
    large.)"""
    found = {id(d) for d in dicts if "__name__" in d}
    searched = {id(d) for d in dicts} - found
    for x in gc.get_referrers(*dicts) if searched else ():
        attributes = getattr(x, "__dict__", None)
        if id(attributes) in searched and not isinstance(x, torch.Tensor):
            found.add(id(attributes))
    return found
