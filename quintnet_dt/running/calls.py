"""Single calls within a module's forward: the mode that counts them and runs their programs."""

import dataclasses
import threading
from typing import NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from .. import comm_ops
from ..private import RecomputationEnds, compiling, not_compiled, top_not_compiled, within_compiled
from ..tracing.composites import restated
from ..utils import call_name, for_backward_hook, lookup, quiet, replace, silence, tensors
from .memory import laid_out
from .on_shard import on_shard
from .program import NOTHING
from .shown import put_back


class _Calls(threading.local, TorchFunctionMode):
    """Runs the programs of single calls. One mode, of which every thread has its own; each module that has some pushes
    a frame."""

    def __init__(self):
        super().__init__()
        self.frames = []

    def push(self, context, program, path, compiled):
        if not self.frames:
            self.__enter__()
        self.frames.append([context, program, path, 0, compiled])

    def pop(self, failed):
        frame = self.frames[-1]
        try:
            names = frame[1].names
            if not failed and names is not None and frame[3] != len(names):
                self.change(frame[0], Ends(), f"it was {names[frame[3]]} then, and is none now", frame)
        finally:
            self.frames.pop()
            if not self.frames:
                self.__exit__(None, None, None)

    def start(self, context, path):
        """A module starts. If the forward that was shown did not reach it while calls are counted, this is another
        path."""
        frame = next((f for f in reversed(self.frames) if f[1].names is not None), None)
        if frame is not None and frame[0] is context:
            self.change(context, Starts(path), f"now {path} runs, which did not run then", frame)

    def change(self, context, event, what, frame=None):
        """The forward takes another path than the one that was shown: `event` comes next. Go on with programs shown for
        this path, if what has run so far is the same in them. `what`: the difference, `frame`: where it was met."""
        outside = not isinstance(event, Calls)  # torch takes the mode off while it handles a call
        if context.compiled:
            self.refuse(frame, what)
        if outside and self.frames:
            self.__exit__(None, None, None)
        frames, self.frames, depth, silence.depth = self.frames, [], silence.depth, 0
        try:
            with put_back(context):
                programs, stack = self.other(context, event)
            if stack is not None:
                frames = [f for f in frames if f[0] is not context] + context.go_on(programs, stack)
                return
        finally:
            self.frames, silence.depth = frames, depth
            if outside and self.frames:
                self.__enter__()
        self.refuse(frame, what)

    def other(self, context, event):
        """(Programs for the path that the forward takes, the frames of what runs by them); (None, None) where there are
        none."""
        for programs in context.paths.variants(*context.call) if context.call else ():
            stack = again(context, programs, event)
            if stack is not None:
                return programs, stack
        return None, None

    def refuse(self, frame, what):
        where = "the model" if frame is None else f"{frame[2] or 'the model'}: call {frame[3]} of its forward"
        raise RuntimeError(
            f"{where}: {what}: it took another path than when the forward was traced, which has not been shown right "
            "on shards. Give apply_tensor_parallel example_inputs that take this path"
        )

    @top_not_compiled
    def __torch_function__(self, func, types, args=(), kwargs=None):
        frame = self.frames[-1]
        if torch.compiler.is_compiling() or not frame[4]:
            return self.run(func, args, kwargs or {})
        if not within_compiled():  # a graph that was compiled, not the model's own code
            return func(*args, **kwargs or {})
        frame[4] = False
        try:
            return not_compiled(self.run, func, args, kwargs or {})
        finally:
            frame[4] = True

    def run(self, func, args, kwargs):
        name = None if silence.depth else call_name(func)
        if name is None:
            return func(*args, **kwargs)
        if (inner := restated(func, args, kwargs)) is not None:
            with self:
                return inner(*args, **kwargs)
        frame = watching(self.frames)
        if frame is not None and not is_next(frame[1], frame[3], name, args, kwargs, compiling(frame[0])):
            if name == "view_as" and for_backward_hook():  # of a tool that was started since
                return func(*args, **kwargs)
            self.change(frame[0], Calls(name, args, kwargs), difference(frame[1], frame[3], name), frame)
            frame = watching(self.frames)
        if frame is None:
            return func(*args, **kwargs)
        context, program, path, number, _ = frame
        frame[3] += 1
        call = program.calls.get(number)
        if compiling(context):
            context.compiled = True
        else:
            context.log.append((name, call, program.kinds.get(number)))
        if call is None:
            return func(*args, **kwargs)
        whole = (args, kwargs)
        if call.kept:
            args, kwargs = replace(whole, {p: context.act([a], lookup(whole, p)) for p, a in call.kept.items()})
        args, kwargs = context.apply((args, kwargs), call.inputs, call.fixed)
        if call.divided or call.multiplied:
            n = comm_ops.group_size(context.group)
            args, kwargs = resize((args, kwargs), call.divided, call.multiplied, n, path)
        if call.bounds:
            args, kwargs = replace((args, kwargs), {p: b.local for p, b in call.bounds.items()})
        if call.order is not None:
            args, kwargs = _in_order(args, kwargs, call.order)
        try:
            if call.instead is None or isinstance(context.group, comm_ops.SimulatedGroup):
                out = func(*args, **kwargs)  # in the proof a call of the model's, which it compares
            else:
                with quiet():
                    out = on_shard(context, call.instead, func, args, kwargs, call.order)
        except RecomputationEnds:
            if call.kept:  # the call has written to them by then
                _gather_buffers(context, whole, (args, kwargs), call.kept)
            raise
        if call.kept:
            _gather_buffers(context, whole, (args, kwargs), call.kept)
        return context.apply(out, call.outputs)


calls = _Calls()


def watching(frames):
    """The frame in which a call is counted: of the innermost module whose calls are its own, if they are watched."""
    for frame in reversed(frames):
        if not frame[1].aside:
            return frame if frame[1].names is not None else None
    return None


@dataclasses.dataclass(frozen=True)
class Calls:
    """What comes next in a forward: a call."""

    name: str
    args: tuple
    kwargs: dict


class Starts(NamedTuple):
    """What comes next, or came: a module starts, set as it is now."""

    path: str
    module: object = None


@dataclasses.dataclass(frozen=True)
class Ends:
    """What comes next: the innermost module ends."""


def is_next(program, number, name, args, kwargs, compiled=False):
    """Whether a call is the one that was shown under this number."""
    names = program.names
    if number >= len(names) or names[number] != name:
        return False
    kind, call = program.kinds.get(number), program.calls.get(number)
    if kind is not None and not kind.fits(args, kwargs, compiled):
        return False
    if call is None or not call.bounds:
        return True
    return all(lookup((args, kwargs), p) == b.given for p, b in call.bounds.items())


def difference(program, number, name):
    """Why `is_next` says no."""
    was = program.names[number] if number < len(program.names) else "none"
    if was != name:
        return f"it was {was} then, and is {name} now"
    return f"{name} has other arguments than then (one that was None, a flag, a dim, a number that indexes shards)"


def again(context, programs, event):
    """The frames of the modules that are running, had the call so far gone by other programs, and were `event` next;
    None where they would have done something else."""
    stack = []
    for past in context.log:
        if isinstance(past, Starts):
            old, new = (p.get(past.path, NOTHING) for p in (context.programs, programs))
            if not _same_borders(old, new) or not new.fits(past.module):
                return None
            stack.append([context, new, past.path, 0, False])
        elif isinstance(past, bool):
            _, new, _, number, _ = stack.pop()
            if past and new.names is not None and number != len(new.names):
                return None
        elif not _same_call(stack, *past):
            return None
    return stack if _may_come(context, programs, stack, event) else None


def _same_borders(old, new):
    """Whether two programs do the same where a module starts and ends."""
    return all(getattr(old, a) == getattr(new, a) for a in ("params", "inputs", "outputs"))


def _same_call(stack, name, call, kind):
    """Whether the frames' programs would have done the same with a call; it is counted."""
    frame = watching(stack)
    if frame is None:
        return call is None
    _, new, _, number, _ = frame
    if new.names[number : number + 1] != [name] or new.calls.get(number) != call or new.kinds.get(number) != kind:
        return False
    frame[3] += 1
    return True


def _may_come(context, programs, stack, event):
    if isinstance(event, Starts):
        reached = context.paths.reached(event.path, programs)
        return reached and (event.module is None or programs[event.path].fits(event.module))
    if isinstance(event, Calls):
        frame = watching(stack)
        return frame is None or is_next(frame[1], frame[3], event.name, event.args, event.kwargs)
    names = stack[-1][1].names
    return names is None or stack[-1][3] == len(names)


def _in_order(args, kwargs, order):
    """The first tensor that a call is given, laid out in this order in memory."""
    path, x = next(tensors((args, kwargs)))
    with quiet():
        return replace((args, kwargs), {path: laid_out(x, order)})


def resize(obj, divided, multiplied, n, where):
    """Divide the sizes at some paths by n, and multiply those at others; a negative one stands for what is left, and
    does already."""
    sizes = {p: lookup(obj, p) for p in divided}
    odd = [x for x in sizes.values() if not isinstance(x, int) or x > 0 and x % n]
    if odd:
        raise RuntimeError(f"{where}: expected sizes that {n} ranks divide, as when it was traced, found {odd}")
    new = {p: x if x < 0 else x // n for p, x in sizes.items()}
    new |= {p: lookup(obj, p) * n for p in multiplied}
    return replace(obj, new)


def _gather_buffers(context, whole, parts, at):
    """Write what a call made of the parts of buffers into the whole ones: those that are alike in one collective."""
    with quiet(), torch.no_grad():
        alike = {}
        for p, a in at.items():
            x = lookup(parts, p)
            alike.setdefault((a, x.shape, x.dtype), {})[p] = x
        for (a, _, _), made in alike.items():
            gather = dataclasses.replace(a, kind="gather", dim=a.dim + 1)
            for p, x in zip(made, context.act([gather], torch.stack([*made.values()]))):
                lookup(whole, p).copy_(x)
