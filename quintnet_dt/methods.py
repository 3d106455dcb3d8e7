"""Methods beside `forward` that compute with a split model's parameters."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from .running.structure import hooks_on


def register_forward_method(module: nn.Module, name: str) -> None:
    """Make a method of a split model, or of a part of it, a forward of its own: CLIP's
    `encode_text`, say. As `torch.distributed.fsdp.register_fsdp_forward_method` does
    for FSDP2.

    A call of it from outside is traced and shown before it runs, once for each kind of
    call; within a forward of the model it is a part of that. Hooks of the user's on the
    module do not run.

    Args:
        module: an nn.Module, before or after `apply_tensor_parallel`.
        name: of a method of its class.

    Raises: TypeError, ValueError where there is no such module or method.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            "register_forward_method: expected an nn.Module, found"
            f" {type(module).__name__}"
        )
    found = getattr(type(module), name, None) if isinstance(name, str) else None
    if not isinstance(found, FunctionType) or name == "forward":
        raise ValueError(
            "register_forward_method: expected the name of a method of"
            f" {type(module).__name__} beside forward, found {name!r}"
        )

    @functools.wraps(found)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hooks = hooks_on(self)
        if hooks is None or hooks.context.running:
            return found(self, *args, **kwargs)
        return _as_forward(self, hooks, found, args, kwargs)

    setattr(module, name, MethodType(method, module))


def _as_forward(
    module: nn.Module,
    hooks: Any,
    function: Callable,
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    """Run a method as the module's forward, within this library's hooks."""
    with _forward_is(module, function):
        args, kwargs = hooks.before(module, args, kwargs) or (args, kwargs)
        output = None
        try:
            output = function(module, *args, **kwargs)
        finally:
            completed = hooks.after(module, args, kwargs, output)
    return output if completed is None else completed


@contextlib.contextmanager
def _forward_is(module: nn.Module, function: Callable) -> Iterator[None]:
    """For a while, what a copy of the module runs as its forward."""
    own = vars(module).get("forward")
    vars(module)["forward"] = MethodType(function, module)
    try:
        yield
    finally:
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own
