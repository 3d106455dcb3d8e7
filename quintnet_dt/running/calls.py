"""Single calls within a module's forward: the mode that counts them and runs their
programs."""

import threading
from functools import partial
from typing import Any, Callable

import torch
from torch.overrides import TorchFunctionMode

from ..keys import ModulePath
from ..private import compiling, not_compiled, top_not_compiled, within_compiled
from ..tracing.composites import restated
from ..utils import by_torch, call_name, silence
from .call_program import run_program
from .change import difference, go_on, is_next, other_programs, refuse
from .context import Context
from .program import CallProgram, Program
from .record import Called, Calls, Ends, Frame, Next, Starts, watching
from .shown import put_back

_BACKWARDS = {"grad", "backward"}


class _Calls(threading.local, TorchFunctionMode):
    """Runs the programs of single calls. One mode, of which every thread has its own;
    each module that has some pushes a frame."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[Frame] = []
        self.backwards = 0  # that a forward runs now, one in the other

    def push(
        self, context: Context, program: Program, hooks: Any, compiled: bool
    ) -> None:
        if not self.frames:
            self.__enter__()
        self.frames.append(Frame(context, program, hooks, compiled))

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
            if not self.frames:
                self.__exit__(None, None, None)

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
        outside = not isinstance(event, Calls)
        if context.compiled or self.backwards:
            refuse(frame, what)
        if outside and self.frames:
            self.__exit__(None, None, None)
        frames, self.frames, depth, silence.depth = self.frames, [], silence.depth, 0
        try:
            with put_back(context):
                other = other_programs(context, event)
            if other is not None:
                frames = [f for f in frames if f.context is not context] + go_on(
                    context, *other
                )
                return
        finally:
            self.frames, silence.depth = frames, depth
            if outside and self.frames:
                self.__enter__()
        refuse(frame, what)

    def backward(self, func: Callable, *args: Any, **kwargs: Any) -> Any:
        """Run a backward within a forward. Checkpoints run modules again in it, by the
        programs in
        force: they have frames of their own, and are no part of the path that the
        forward takes."""
        logs = [(frame.context.log, len(frame.context.log)) for frame in self.frames]
        frames, self.frames = self.frames, []
        self.backwards += 1
        try:
            return func(*args, **kwargs)
        finally:
            self.backwards -= 1
            self.frames = frames
            for log, length in logs:
                del log[length:]

    @top_not_compiled
    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        frame = self.frames[-1]
        if torch.compiler.is_compiling() or not frame.compiled:
            return self.run(func, args, kwargs or {})
        if not within_compiled():  # a graph that was compiled, not the model's own code
            return func(*args, **kwargs or {})
        frame.compiled = False
        try:
            return not_compiled(self.run, func, args, kwargs or {})
        finally:
            frame.compiled = True

    def run(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        name = None if silence.depth else call_name(func)
        if name is None:
            return func(*args, **kwargs)
        if (inner := restated(func, args, kwargs)) is not None:
            with self:
                return inner(*args, **kwargs)
        if name in _BACKWARDS and not torch.compiler.is_compiling():
            func = partial(self.backward, func)
        if name == "detach" and by_torch():
            return func(*args, **kwargs)
        frame = watching(self.frames)
        if frame is not None and not _expected(frame, name, args, kwargs):
            if name == "view_as" and by_torch():  # for a tool that was started since
                return func(*args, **kwargs)
            what = difference(frame.program, frame.number, name)
            self.change(frame.context, Calls(name, args, kwargs), what, frame)
            frame = watching(self.frames)
        if frame is None:
            return func(*args, **kwargs)
        call = _count(frame, name)
        if call is None:
            return func(*args, **kwargs)
        return run_program(call, frame, func, args, kwargs)


calls = _Calls()


def _expected(frame: Frame, name: str, args: tuple, kwargs: dict) -> bool:
    """Whether a call is the one that comes next in the forward that was shown."""
    compiled = compiling(frame.context)
    return is_next(frame.program, frame.number, name, args, kwargs, compiled)


def _count(frame: Frame, name: str) -> CallProgram | None:
    """Note that a call is made; its CallProgram, None where it has none."""
    number = frame.number
    frame.number += 1
    call = frame.program.calls.get(number)
    if compiling(frame.context):
        frame.context.compiled = True
    else:
        frame.context.log.append(Called(name, call, frame.program.kinds.get(number)))
    return call
