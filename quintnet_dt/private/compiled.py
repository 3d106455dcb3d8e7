"""What torch.compile is doing, and what it is to leave alone."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

try:
    eval_frame_callback = torch._C._dynamo.eval_frame.get_eval_frame_callback
except AttributeError:
    eval_frame_callback = None
_asked = threading.RLock()  # a flag of torch's is one for all threads


def compiling(context: Any) -> bool:
    """Whether torch.compile is tracing this; never where a model is planned."""
    return torch.compiler.is_compiling() and context.mesh is not None


def top_not_compiled(function: Callable) -> Callable:
    """torch.compile inlines calls of a function, but compiles none by itself, as it
    would the hooks of its module."""
    try:
        frames = torch._C._dynamo.eval_frame
        skipped = frames._FrameExecStrategy(
            frames._FrameAction.SKIP, frames._FrameAction.DEFAULT
        )
        frames.set_code_exec_strategy(function.__code__, skipped)
    except (AttributeError, TypeError):  # it is compiled too: slower
        pass
    return function


@top_not_compiled
def within_compiled() -> bool:
    """Whether this is Python code that runs as it is in a function given to
    torch.compile, and not its graph."""
    return eval_frame_callback is not None and eval_frame_callback() is not None


@top_not_compiled
def not_compiled(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call a function as it is within one given to torch.compile.
    torch.compiler.disable makes another, and imports much."""
    was = torch._C._dynamo.eval_frame.set_eval_frame(None)
    try:
        return function(*args, **kwargs)
    finally:
        torch._C._dynamo.eval_frame.set_eval_frame(was)


@contextlib.contextmanager
def as_compiled(compiled: bool) -> Iterator[None]:
    """Model code that asks whether torch.compile is tracing it is told yes."""
    if not compiled:
        yield
        return
    with _asked:
        was, ask = torch.compiler._is_compiling_flag, torch.compiler.is_dynamo_compiling
        torch.compiler._is_compiling_flag, torch.compiler.is_dynamo_compiling = (
            True,
            lambda: True,
        )
        try:
            yield
        finally:
            torch.compiler._is_compiling_flag, torch.compiler.is_dynamo_compiling = (
                was,
                ask,
            )


def constant(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result, which would import torch._dynamo (0.6 s)
    for all."""
    setattr(function, "_dynamo_marked_constant", True)
    return function
