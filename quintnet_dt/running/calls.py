"""Single calls within a module's forward: the mode that counts them and runs their programs."""

import dataclasses

import torch
from torch.overrides import TorchFunctionMode

from .. import comm_ops
from ..private import compiling, not_compiled, top_not_compiled, within_compiled
from ..tracing.composites import restated
from ..utils import call_name, lookup, quiet, replace, silence
from .on_shard import on_shard
from .program import NOTHING


class _Calls(TorchFunctionMode):
    """Runs the programs of single calls. One mode for the process's thread; each module that has some pushes a
    frame."""

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
            if not failed and frame[1].names is not None and frame[3] != len(frame[1].names):
                self.change(frame, None)
        finally:
            self.frames.pop()
            if not self.frames:
                self.__exit__(None, None, None)

    def start(self, context, module):
        """A module starts. If the forward that was shown did not reach it while calls are counted, this is another
        path."""
        frame = next((f for f in reversed(self.frames) if f[1].names is not None), None)
        if frame is not None and frame[0] is context:
            self.change(frame, None, module)

    def change(self, frame, name, module=None):
        """The forward takes another path than the one that was shown: its next call is `name`, or this module starts,
        or else it ends. Go on with programs shown for this path, if what has run so far is the same in them."""
        context = frame[0]
        outside = name is None  # not while torch handles a call, for which it takes the mode off
        if context.compiled:
            self.refuse(frame, name, module)
        if outside:
            self.__exit__(None, None, None)
        frames, self.frames, depth, silence.depth = self.frames, [], silence.depth, 0
        try:
            for programs in context.paths.variants(*context.call) if context.call else ():
                stack = again(context, programs, name, module)
                if stack is not None:
                    frames = [f for f in frames if f[0] is not context] + context.go_on(programs, stack)
                    return
        finally:
            self.frames, silence.depth = frames, depth
            if outside:
                self.__enter__()
        self.refuse(frame, name, module)

    def refuse(self, frame, name, module):
        _, program, path, number, _ = frame
        was = program.names[number] if number < len(program.names) else "none"
        found = f"is {name or 'none'} now" if module is None else f"now {module} runs, which did not run then"
        raise RuntimeError(
            f"{path or 'the model'}: call {number} of its forward was {was} when the forward was traced and {found}: "
            "it took another path, which has not been shown right on shards. Give apply_tensor_parallel "
            "example_inputs that take this path"
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
        if frame is not None and frame[1].names[frame[3] : frame[3] + 1] != [name]:
            self.change(frame, name)
            frame = watching(self.frames)
        if frame is None:
            return func(*args, **kwargs)
        context, program, path, number, _ = frame
        frame[3] += 1
        call = program.calls.get(number)
        if compiling(context):
            context.compiled = True
        else:
            context.log.append((name, call))
        if call is None:
            return func(*args, **kwargs)
        whole = (args, kwargs)
        if call.kept:
            args, kwargs = replace(whole, {p: context.act([a], lookup(whole, p)) for p, a in call.kept.items()})
        args, kwargs = context.apply((args, kwargs), call.inputs, call.fixed)
        if call.sizes:
            args, kwargs = divide((args, kwargs), call.sizes, comm_ops.group_size(context.group), path)
        if call.instead is None or isinstance(context.group, comm_ops.SimulatedGroup):
            out = func(*args, **kwargs)  # in the proof a call of the model's, which it compares
        else:
            with quiet():
                out = on_shard(context, call.instead, func, args, kwargs)
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


def again(context, programs, name, module):
    """The frames of the modules that are running, had the call so far gone by other programs, and were `name` the next
    call, or this module to start, or else the innermost one to end; None where they would have done something else."""
    stack, alike = [], ("params", "inputs", "outputs")
    for event in context.log:
        if isinstance(event, str):
            old, new = (p.get(event, NOTHING) for p in (context.programs, programs))
            if any(getattr(old, a) != getattr(new, a) for a in alike):
                return None
            stack.append([context, new, event, 0, False])
        elif isinstance(event, bool):
            _, new, _, number, _ = stack.pop()
            if event and new.names is not None and number != len(new.names):
                return None
        else:
            (next_name, call), frame = event, watching(stack)
            if frame is None and call is not None:
                return None
            if frame is not None:
                _, new, _, number, _ = frame
                if new.names[number : number + 1] != [next_name] or new.calls.get(number) != call:
                    return None
                frame[3] += 1
    if module is not None:
        return stack if context.paths.reached(module, programs) else None
    frame = stack[-1] if name is None else watching(stack)
    ends = (
        frame is None or frame[1].names is None or frame[1].names[frame[3] : frame[3] + 1] == [name][: name is not None]
    )
    return stack if ends else None


def divide(obj, paths, n, where):
    """Divide the sizes at some paths by n; a negative one stands for what is left, and does already."""
    sizes = {p: lookup(obj, p) for p in paths}
    odd = [x for x in sizes.values() if not isinstance(x, int) or x > 0 and x % n]
    if odd:
        raise RuntimeError(f"{where}: expected sizes that {n} ranks divide, as when it was traced, found {odd}")
    return replace(obj, {p: x if x < 0 else x // n for p, x in sizes.items()})


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
