"""Which autograd.Functions, written in Python, do the same at each element: forward and
backward may then run on any shard, as they are.

Both are tried on fake tensors of the shape that is given, and of two others. All that
they call must be pointwise, on tensors of that shape and numbers, and the same each
time: a backward that divides by a size is not.
"""

import inspect
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from ..around import undisturbed
from ..private import FakeTensorMode, TorchDispatchMode
from ..utils import STOPS, functions_of, replace, tensors

# These too do the same at each place, where what they make has the shape of their input.
_SAME_PLACE = {"detach", "alias", "clone", "_to_copy", "view", "_unsafe_view"}
_MADE_LIKE = {"zeros_like", "ones_like", "full_like", "empty_like"}
_OTHER_SIZES = 4, 6  # of every dim


def pointwise_function(frame: FrameType, trainable: Callable[[Any], bool]) -> bool:
    """Whether the autograd.Function does the same at each element.

    Args: `frame`: of its forward, which has just begun; `trainable`: tells of a tensor
    whether it may need a gradient.
    """
    functions = functions_of(frame.f_code)  # more than one, where one inherits it
    return all(_is_pointwise(f, _given(frame, f), trainable) for f in functions)


def _is_pointwise(
    function: type[torch.autograd.Function],
    args: list[Any],
    trainable: Callable[[Any], bool],
) -> bool:
    given = [t for _, t in tensors(args)]
    shapes = {tuple(t.shape) for t in given if t.numel() != 1}
    numbers = [t for t in given if t.numel() == 1]
    if len(shapes) != 1 or any(map(trainable, numbers)):
        return False
    (shape,) = shapes
    other_shapes = [(size,) * len(shape) for size in _OTHER_SIZES]
    called = _called(function, args, shape)
    return called is not None and all(
        _called(function, args, other) == called for other in other_shapes
    )


def _given(frame: FrameType, function: type[torch.autograd.Function]) -> list[Any]:
    """What `function.apply` was called with."""
    code, given = frame.f_code, frame.f_locals
    names = code.co_varnames[: code.co_argcount]
    takes_context = function.setup_context is torch.autograd.Function.setup_context
    args = [given[name] for name in names[1 if takes_context else 0 :]]
    if code.co_flags & inspect.CO_VARARGS:
        args += given[code.co_varnames[code.co_argcount + code.co_kwonlyargcount]]
    return args


@undisturbed
def _called(
    function: type[torch.autograd.Function], args: list[Any], shape: tuple[int, ...]
) -> list[Any] | None:
    """What forward and backward call on tensors of a shape; None where that is not
    pointwise, or raises."""
    log = _Log(shape)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            made = {
                path: torch.empty(
                    shape if t.numel() != 1 else t.shape,
                    dtype=t.dtype,
                    device=t.device,
                    requires_grad=t.is_floating_point() and t.numel() != 1,
                )
                for path, t in tensors(args)
            }
            with torch.enable_grad(), log:
                _forward_and_backward(function, replace(args, made), made.values())
    except STOPS:
        raise
    except Exception:  # of the user's code
        return None
    return log.called if log.pointwise else None


def _forward_and_backward(
    function: type[torch.autograd.Function], args: list[Any], given: Any
) -> None:
    outputs = [t for _, t in tensors(function.apply(*args)) if t.requires_grad]
    inputs = [t for t in given if t.requires_grad]
    torch.autograd.grad(
        outputs, inputs, [torch.empty_like(t) for t in outputs], allow_unused=True
    )


class _Log(TorchDispatchMode):
    """What is called, and whether all of it is pointwise on tensors of one shape."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape = shape
        self.called: list[Any] = []
        self.pointwise = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # asks for a device
            return out
        given, made = dict(tensors((args, kwargs or {}))), tensors(out)
        shapes = [tuple(t.shape) for t in given.values() if t.numel() != 1]
        shapes += [tuple(t.shape) for _, t in made]
        self.pointwise &= _operator_is_pointwise(func) and set(shapes) <= {self.shape}
        # What is compared are the numbers beside the tensors; not a view's sizes.
        numbers = replace((args, kwargs or {}), dict.fromkeys(given))
        same_place = func.overloadpacket.__name__ in _SAME_PLACE
        self.called.append((func, "" if same_place else repr(numbers)))
        return out


def _operator_is_pointwise(func: Any) -> bool:
    if func.overloadpacket.__name__ in _SAME_PLACE | _MADE_LIKE:
        return True
    random = torch.Tag.nondeterministic_seeded in func.tags
    writes = func._schema.is_mutable
    return torch.Tag.pointwise in func.tags and not random and not writes
