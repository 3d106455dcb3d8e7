"""The modes and functional transforms around a call, which are not to see planning."""

import contextlib
from collections.abc import Iterator

import torch

try:
    from torch.overrides import _get_current_function_mode as function_mode
    from torch.overrides import _len_torch_function_stack
    from torch.overrides import _pop_mode as _pop_function_mode
    from torch.overrides import _push_mode as _push_function_mode
    from torch.utils._python_dispatch import _len_torch_dispatch_stack
    from torch.utils._python_dispatch import _pop_mode as _pop_dispatch_mode
    from torch.utils._python_dispatch import _push_mode as _push_dispatch_mode
except (
    ImportError
):  # a first call under a tool that counts is counted with its planning
    _len_torch_function_stack = _len_torch_dispatch_stack = int

    def function_mode() -> None:
        return None


try:
    from torch._C._functorch import (
        peek_interpreter_stack,
        pop_dynamic_layer_stack,
        push_dynamic_layer_stack,
    )
except ImportError:  # functional transforms of a split model raise what torch raises

    def peek_interpreter_stack() -> None:
        return None


@contextlib.contextmanager
def modes_aside() -> Iterator[None]:
    """The modes that are on, of torch functions and of operators, are off for a while;
    a default device stays, but for the meta device, on which nothing is computed."""
    functions, operators = _len_torch_function_stack(), _len_torch_dispatch_stack()
    if not functions and not operators:
        yield
        return
    device = torch.get_default_device()
    computes = device.type not in ("cpu", "meta")
    function_modes = [_pop_function_mode() for _ in range(functions)]
    operator_modes = [_pop_dispatch_mode() for _ in range(operators)]
    try:
        with device if computes else contextlib.nullcontext():
            yield
    finally:
        for mode in reversed(operator_modes):
            _push_dispatch_mode(mode)
        for mode in reversed(function_modes):
            _push_function_mode(mode)


def transform() -> str | None:
    """The innermost functional transform that is at work, as torch.func names its
    kinds."""
    interpreter = peek_interpreter_stack()
    return None if interpreter is None else interpreter.key().name.lower()


class transforms_aside:
    """What runs inside is no part of the functional transforms that are at work."""

    def __enter__(self) -> None:
        self.left = []
        while (
            not torch.compiler.is_compiling() and peek_interpreter_stack() is not None
        ):
            self.left.append(pop_dynamic_layer_stack())

    def __exit__(self, *_: object) -> None:
        while self.left:
            push_dynamic_layer_stack(self.left.pop())


def forward_mode() -> bool:
    """Whether forward-mode differentiation is on (torch.autograd.forward_ad)."""
    return getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0
