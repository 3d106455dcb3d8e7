"""Single calls within a module's forward: the mode that counts them and runs their
programs."""

import contextlib
import threading
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any, Callable

import torch
from torch.overrides import TorchFunctionMode

from ..keys import ModulePath
from ..private import (
    function_mode,
    in_backward,
    not_compiled,
    top_not_compiled,
    within_compiled,
)
from ..tracing.composites import RESTATED, restated
from ..utils import by_torch, call_name, silence
from .call_program import run_program
from .change import difference, go_on, is_next, other_programs, refuse
from .context import Context
from .program import CallProgram, Program
from .record import Called, Calls, Ends, Frame, Next, Starts, watching
from .shown import put_back

_BACKWARDS = {"grad", "backward"}
_SPECIAL = {"detach", *_BACKWARDS, *(func.__name__ for func in RESTATED)}


class _Calls(threading.local, TorchFunctionMode):
    """Runs the programs of single calls. One mode, of which every thread has its own;
    each module that has some pushes a frame. It is on while a watched module's own code
    runs, and off in the hooks and in modules whose calls nothing is done to; in
    compiled code, from the first frame to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[Frame] = []
        self.on: list[Frame] = []  # the frame for which it was turned on; or none
        self.backwards = 0  # that a forward runs now, one in the other

    def push(
        self, context: Context, program: Program, hooks: Any, compiled: bool
    ) -> None:
        self.frames.append(Frame(context, program, hooks, compiled))
        if compiled and not self.on:
            self.turn_on()

    def turn_on(self) -> None:
        self.__enter__()
        self.on.append(self.frames[-1])

    def turn_off(self) -> None:
        self.on.pop()
        self.__exit__(None, None, None)

    def rest(self) -> None:
        """A hook begins, which computes beside the model. (A mode that the model's own
        code has put on since is not to be taken off: then this one stays on too.)"""
        if self.on and function_mode() is self:
            self.turn_off()

    def wake(self) -> None:
        """A hook ends."""
        if self.frames and not self.on and watching(self.frames) is not None:
            self.turn_on()

    @contextlib.contextmanager
    def unwound(self) -> Iterator[None]:
        """Around a forward that may fail while code is told that it is compiled: torch
        then calls no hooks after an exception."""
        count, was_on = len(self.frames), bool(self.on)
        try:
            yield
        finally:
            del self.frames[count:]
            if self.on and not was_on:
                self.turn_off()

    def pop(self, failed: bool) -> None:
        frame = self.frames[-1]
        try:
            names = frame.program.names
            if not failed and names is not None and frame.number != len(names):
                self.change(
                    frame.context,
                    Ends(),
                    f"it was {names[frame.number]} then, and is none now",
                    frame,
                )
        finally:
            self.frames.pop()
            if self.on and (self.on[0] is frame or not self.frames):
                self.turn_off()

    def start(self, context: Context, path: ModulePath) -> None:
        """A module starts. If the forward that was shown did not reach it while calls
        are counted, this is another path."""
        frame = next(
            (f for f in reversed(self.frames) if f.program.names is not None), None
        )
        if frame is not None and frame.context is context:
            self.change(
                context, Starts(path), f"now {path} runs, which did not run then", frame
            )

    def change(
        self, context: Context, event: Next, what: str, frame: Frame | None = None
    ) -> None:
        """The forward takes another path than the one that was shown: `event` comes
        next. Go on with programs shown for this path, if what has run so far is the
        same in them. `what`: the difference, `frame`: where it was met."""
        # torch takes the mode off while it handles a call
        outside = bool(self.on) and not isinstance(event, Calls)
        if context.compiled or self.backwards or in_backward():
            refuse(frame, what)
        if outside:
            self.__exit__(None, None, None)
        frames, self.frames, depth, silence.depth = self.frames, [], silence.depth, 0
        on, self.on = self.on, []
        try:
            with put_back(context):
                other = other_programs(context, event)
            if other is not None:
                frames = [f for f in frames if f.context is not context] + go_on(
                    context, *other
                )
                return
        finally:
            self.frames, self.on, silence.depth = frames, on, depth
            if outside:
                self.__enter__()
        refuse(frame, what)

    def backward(self, func: Callable, *args: Any, **kwargs: Any) -> Any:
        """Run a backward within a forward. Checkpoints run modules again in it, by the
        programs in
        force: they have frames of their own, and are no part of the path that the
        forward takes."""
        logs = [(frame.context.log, len(frame.context.log)) for frame in self.frames]
        frames, self.frames = self.frames, []
        on, self.on = self.on, []
        self.backwards += 1
        try:
            return func(*args, **kwargs)
        finally:
            self.backwards -= 1
            self.frames, self.on = frames, on
            for log, length in logs:
                del log[length:]

    @top_not_compiled
    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        frame, kwargs = self.frames[-1], kwargs or {}
        if torch.compiler.is_compiling():
            return self.run(call_name(func), func, args, kwargs, compiled=True)
        if not frame.compiled:
            return self.run(known_name(func), func, args, kwargs)
        if not within_compiled():  # a graph that was compiled, not the model's own code
            return func(*args, **kwargs)
        frame.compiled = False
        try:
            return not_compiled(self.run, known_name(func), func, args, kwargs)
        finally:
            frame.compiled = True

    def run(
        self,
        name: str | None,
        func: Callable,
        args: tuple,
        kwargs: dict,
        compiled: bool = False,
    ) -> Any:
        if name is None or silence.depth:
            return func(*args, **kwargs)
        if name in _SPECIAL:
            if (inner := restated(func, args, kwargs)) is not None:
                with self:
                    return inner(*args, **kwargs)
            if name in _BACKWARDS and not compiled:
                func = partial(self.backward, func)
            if name == "detach" and by_torch():
                return func(*args, **kwargs)
        return self.watched(name, func, args, kwargs, compiled)

    def watched(
        self, name: str, func: Callable, args: tuple, kwargs: dict, compiled: bool
    ) -> Any:
        """Make a call of the model's own, as the program of its module says."""
        frame = watching(self.frames)
        if frame is None:
            return func(*args, **kwargs)
        compiled = compiled and frame.context.mesh is not None
        if not is_next(frame, name, args, kwargs, compiled):
            if name == "view_as" and by_torch():  # for a tool that was started since
                return func(*args, **kwargs)
            what = difference(frame.program, frame.number, name)
            self.change(frame.context, Calls(name, args, kwargs), what, frame)
            frame = watching(self.frames)
            if frame is None:
                return func(*args, **kwargs)
        call = _count(frame, name, compiled)
        if call is None:
            return func(*args, **kwargs)
        return run_program(call, frame, func, args, kwargs)


calls = _Calls()
known_name = lru_cache(1024)(call_name)


def _count(frame: Frame, name: str, compiled: bool) -> CallProgram | None:
    """Note that a call is made; its CallProgram, None where it has none."""
    number = frame.number
    frame.number += 1
    call = frame.program.calls.get(number)
    if compiled:
        frame.context.compiled = True
    else:
        frame.context.log.append(Called(name, call, frame.program.kinds.get(number)))
    return call
