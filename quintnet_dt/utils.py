"""Small helpers: walking nested arguments, telling the model's own calls from others,
and where they are."""

import dataclasses
import functools
import inspect
import os
import sys
import threading
from types import FrameType
from typing import NamedTuple

import torch

from .private import HigherOrderOperator, constant

# What ends the work from outside, a signal's handler say: it tells nothing of a model.
STOPS = (MemoryError, TimeoutError)

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(__file__) + os.sep
# the usual ones, so that they are told first
_LEAVES = (
    torch.Tensor,
    int,
    float,
    str,
    type(None),
)


def leaves(obj, path=()):
    """`[(path, leaf), ...]` for every leaf of nested tuples, lists, dicts, dataclasses
    and slices.

    A path is the tuple of indices, keys and field names that leads to the leaf.
    """
    if isinstance(obj, _LEAVES):
        return [(path, obj)]
    if isinstance(obj, (tuple, list)):
        items = enumerate(obj)
    elif isinstance(obj, dict):
        items = obj.items()
    elif isinstance(obj, slice):
        items = enumerate((obj.start, obj.stop, obj.step))
    elif dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        read = (
            vars(obj).get
            if hasattr(obj, "__dict__")
            else functools.partial(getattr, obj)
        )
        # not what a property makes up
        items = [(f.name, read(f.name)) for f in dataclasses.fields(obj)]
    else:
        return [(path, obj)]
    return [leaf for key, x in items for leaf in leaves(x, (*path, key))]


def has_state(x):
    """Whether a leaf is an object with a state of its own, such as a key-value
    cache."""
    return (
        hasattr(x, "__dict__")
        and not isinstance(x, (torch.Tensor, type))
        and not callable(x)
    )


def tensors_in_objects(obj, depth=0):
    """Yield `(path, object, place, tensor)` for every tensor within opaque objects: of
    the innermost one, and there."""
    for path, x in leaves(obj):
        if has_state(x) and depth < 5:
            yield from ((path, x, place, t) for place, t in tensors(vars(x)))
            yield from (
                ((*path, *inner), *rest)
                for inner, *rest in tensors_in_objects(vars(x), depth + 1)
            )


def shard_kept(holder, place):
    """The Action that would complete the tensor that an object keeps at a place, None
    where it is whole."""
    return vars(holder).get(SHARDS, {}).get(place)


SHARDS = (  # the attribute of such an object that says which of its tensors are shards
    "_tp_shards"
)


def lookup(obj, path):
    """The leaf at a path of a nested argument, None where there is none."""
    for key in path:
        if isinstance(obj, slice):
            obj = (obj.start, obj.stop, obj.step)
        try:
            obj = (
                obj[key] if isinstance(obj, (tuple, list, dict)) else getattr(obj, key)
            )
        except (LookupError, AttributeError, TypeError):
            return None
    return obj


def tensors(obj):
    """Yield `(path, tensor)` for every tensor in a nested argument."""
    return ((p, x) for p, x in leaves(obj) if isinstance(x, torch.Tensor))


def replace(obj, changes):
    """A copy of `obj` in which the leaf at each path of `changes` is `changes[path]`;
    what does not change is shared.

    Dataclasses and other mappings (a Hugging Face ModelOutput is both) keep their
    class.
    """
    if not changes:
        return obj
    if () in changes:
        return changes[()]
    at = {}
    for path, new in changes.items():
        at.setdefault(path[0], {})[path[1:]] = new
    if isinstance(obj, slice):
        return slice(*replace((obj.start, obj.stop, obj.step), changes))
    if isinstance(obj, (tuple, list)):
        items = [replace(x, at.get(i)) for i, x in enumerate(obj)]
        if hasattr(obj, "_fields"):
            return type(obj)(*items)
        return type(obj)(items) if type(obj) in (tuple, list) else tuple(items)
    if isinstance(obj, dict):
        new = {k: replace(x, at.get(k)) for k, x in obj.items()}
        return new if type(obj) is dict else type(obj)(**new)
    return dataclasses.replace(
        obj, **{k: replace(getattr(obj, k), c) for k, c in at.items()}
    )


def is_float(x):
    """Whether a tensor's (or Value's) elements are real or complex numbers, which
    gradients are taken of."""
    return x.dtype.is_floating_point or x.dtype.is_complex


class quiet:
    """Around what is not the model's own computation: its calls are not counted. One
    object a use, which torch.compile can trace."""

    def __enter__(self):
        silence.depth += 1

    def __exit__(self, *_):
        silence.depth -= 1


class Quietly:
    """A hook that computes beside the model: its calls are not the model's."""

    def __init__(self, hook):
        self.hook = hook

    def __call__(self, *args, **kwargs):
        with quiet():
            return self.hook(*args, **kwargs)


class _Depth(threading.local):
    """How deep in something this thread is."""

    depth = 0


silence = _Depth()


def source_line():
    """`file:line` of the innermost frame that is neither torch's nor ours: the user's
    code that called the operator."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_TORCH, _HERE, "<")):
            return f"{os.path.basename(name)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


_CHECKPOINT = os.path.join(_TORCH, "utils", "checkpoint.py")


class Callers(NamedTuple):
    """What calls the code that runs. `function`: the frame of the forward of an
    autograd.Function that is not torch's own, which has a backward of its own;
    `checkpoints`: how many frames of torch.utils.checkpoint, which run it again."""

    function: FrameType | None
    checkpoints: int


def callers():
    frame, function, checkpoints = sys._getframe(1), None, 0
    while frame is not None:
        if functions_of(frame.f_code):
            function = (
                frame  # of those within each other the first, whose backward runs
            )
        checkpoints += frame.f_code.co_filename == _CHECKPOINT
        frame = frame.f_back
    return Callers(function, checkpoints)


_HIGHER_ORDER = os.path.join(_TORCH, "_higher_order_ops") + os.sep


def within_higher_order():
    """Whether the code that runs was given to an operator such as torch.cond, which
    runs it itself."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(_HIGHER_ORDER):
        frame = frame.f_back
    return frame is not None


@functools.cache
def functions_of(code):
    """The autograd.Functions, but torch's own, whose forward, undecorated, is this
    code."""
    kinds, found = [torch.autograd.Function], []
    for kind in kinds:  # grows as it is read
        kinds += kind.__subclasses__()
        forward = inspect.unwrap(kind.forward)
        if getattr(forward, "__code__", None) is code:
            found.append(kind)
    return [kind for kind in found if not kind.__module__.startswith("torch.")]


_BACKWARD_HOOKS = os.path.join(_TORCH, "utils", "hooks.py")
_CHECKPOINT = os.path.join(_TORCH, "utils", "checkpoint.py")
_FUNCTION = os.path.join(_TORCH, "autograd", "function.py")


def by_torch():
    """Whether torch makes this call itself: for a backward hook of a module, which sees
    views of its inputs and outputs; for a checkpoint within one that is run again,
    whose inputs it detaches."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((_HERE, _FUNCTION)):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename in (
        _BACKWARD_HOOKS,
        _CHECKPOINT,
    )


OPERATORS = type(torch.ops.aten.add), type(torch.ops.aten.add.Tensor)
_TENSOR_PROPERTIES = {"T", "mT", "H", "mH", "real", "imag", "data", "grad"}


@constant
def call_name(func):
    """The name of a torch function, None for a read of `.shape`, `.dtype` and the like,
    which computes nothing, and for operators that are given functions, which torch
    compiles (torch.cond, flex_attention)."""
    if isinstance(func, HigherOrderOperator):
        return None
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        name = getattr(getattr(func, "__self__", None), "__name__", name)
        return name if name in _TENSOR_PROPERTIES else None
    # mylib.view is not view
    if isinstance(func, OPERATORS) and not str(func).startswith("aten."):
        name = str(func)
    return None if name in _QUERIES or name.startswith(("prim.", "prims.")) else name


_QUERIES = set(
    "size dim numel stride is_grad_enabled _set_grad_enabled is_inference"
    " is_floating_point ndimension nelement __len__ is_contiguous is_complex get_device"
    " storage_offset is_tensor data_ptr element_size is_inference_mode_enabled"
    " is_autocast_enabled get_autocast_dtype promote_types requires_grad_ device".split()
)
