"""What a model's code keeps by functools.lru_cache: no fake tensor must stay there, and
no copy share it."""

import contextlib
import functools
import inspect
import sys
from types import CellType, MethodType

from ..parts import modules

_Cache = type(functools.lru_cache(lambda: None))


def unshare(model, copied):
    """Methods with a cache that a deep copy's modules share with the original's: made
    its own, without a cache."""
    for module, twin in zip(modules(model), modules(copied)):
        for name, cached in vars(module).items():
            if isinstance(cached, _Cache) and inspect.ismethod(cached.__wrapped__):
                vars(twin)[name] = MethodType(cached.__wrapped__.__func__, twin)


@contextlib.contextmanager
def forgotten(model):
    """What runs inside adds nothing to the caches in the code of the model's classes
    and their
    files: those that it adds to are cleared."""
    before = {cache: cache.cache_info().misses for cache in _caches(model)}
    try:
        yield
    finally:
        for cache, misses in before.items():
            if cache.cache_info().misses != misses:
                cache.cache_clear()


def _caches(model):
    """The caches in the code of a model's classes and of their files: functions with
    one, methods, and what functions close over."""
    classes = {
        base
        for kind in {type(m) for m in modules(model)}
        for base in kind.__mro__
        if not base.__module__.startswith("torch.") and base is not object
    }
    files = {
        id(f): f
        for f in (sys.modules.get(c.__module__) for c in classes)
        if f is not None
    }
    for owner in (*classes, *files.values()):
        for x in list(vars(owner).values()):
            yield from _caches_of(x)


def _caches_of(x):
    if isinstance(x, (staticmethod, classmethod)):
        x = x.__func__
    if isinstance(x, _Cache):
        yield x
    elif inspect.isfunction(x):
        cells = (
            cell.cell_contents for cell in x.__closure__ or () if cell != CellType()
        )
        yield from (c for c in cells if isinstance(c, _Cache))
