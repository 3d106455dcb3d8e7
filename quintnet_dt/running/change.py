"""The change of path in the middle of a forward.

A forward that was shown right may take another path than the one that was traced: a
branch on a value, a loop of another length, a module that is called under a condition.
It shows where a module starts, ends or makes a call that the programs in force do not
expect. What has run so far cannot be undone, so the forward may go on only by programs
which would have done the very same up to here. The context's log says what was done:
modules that started, the calls that were counted with what was done around each,
modules that ended.

`again` replays that log against other programs: of a path that was learned, then of one
that is learned from this call. Where each module would have been treated alike at its
borders, and each call been the same with the same actions around it, it gives the
frames of the modules that are running, each at the number of the call that it is at by
those programs. `go_on` puts them in force. Where no programs fit, the call raises.
"""

from ..utils import lookup
from .context import Context
from .program import NOTHING, Program, Programs
from .record import Called, Calls, Frame, Next, Started, Starts, watching


def is_next(
    frame: Frame, name: str, args: tuple, kwargs: dict, compiled: bool = False
) -> bool:
    """Whether a call is the one that was shown to come next."""
    program, number = frame.program, frame.number
    names = program.names or ()
    if number >= len(names) or names[number] != name:
        return False
    kind, call = program.kinds.get(number), program.calls.get(number)
    if kind is not None and not kind.fits(args, kwargs, compiled):
        return False
    if call is None or not call.bounds:
        return True
    group = frame.context.group
    return all(
        lookup((args, kwargs), p) == b.expected(group) for p, b in call.bounds.items()
    )


def difference(program: Program, number: int, name: str) -> str:
    """Why `is_next` says no."""
    names = program.names or ()
    was = names[number] if number < len(names) else "none"
    if was != name:
        return f"it was {was} then, and is {name} now"
    return (
        f"{name} has other arguments than then (one that was None, a flag, a dim, a"
        " number that indexes shards)"
    )


def other_programs(
    context: Context, event: Next
) -> tuple[Programs, list[Frame]] | None:
    """(Programs for the path that the forward takes, the frames of what runs by them);
    None where there are none. `event` is what comes next."""
    for programs in context.paths.variants(*context.call) if context.call else ():
        frames = again(context, programs, event)
        if frames is not None:
            return programs, frames
    return None


def again(context: Context, programs: Programs, event: Next) -> list[Frame] | None:
    """The frames of the modules that are running, had the call so far gone by other
    programs, and were `event` next; None where they would have done something else."""
    frames: list[Frame] = []
    for past in context.log:
        if isinstance(past, Started):
            old, new = (p.get(past.path, NOTHING) for p in (context.programs, programs))
            if not _same_borders(old, new) or not new.fits(past.module):
                return None
            frames.append(Frame(context, new, past))
        elif isinstance(past, Called):
            if not _same_call(frames, past):
                return None
        else:
            frame = frames.pop()
            if not past.failed and not _at_end(frame):
                return None
    return frames if _may_come(context, programs, frames, event) else None


def _same_borders(old: Program, new: Program) -> bool:
    """Whether two programs do the same where a module starts and ends."""
    return all(
        getattr(old, a) == getattr(new, a)
        for a in ("params", "inputs", "outputs", "numbers")
    )


def _same_call(frames: list[Frame], past: Called) -> bool:
    """Whether the frames' programs would have done the same with a call; it is
    counted."""
    frame = watching(frames)
    if frame is None:
        return past.program is None
    new, number = frame.program, frame.number
    names = new.names or []
    if number >= len(names) or names[number] != past.name:
        return False
    if new.calls.get(number) != past.program or new.kinds.get(number) != past.kind:
        return False
    frame.number += 1
    return True


def _at_end(frame: Frame) -> bool:
    """Whether a module makes no more calls, by its program."""
    names = frame.program.names
    return names is None or frame.number == len(names)


def _may_come(
    context: Context, programs: Programs, frames: list[Frame], event: Next
) -> bool:
    if isinstance(event, Starts):
        reached = context.paths.reached(event.path, programs)
        return reached and (
            event.module is None or programs[event.path].fits(event.module)
        )
    if isinstance(event, Calls):
        frame = watching(frames)
        return frame is None or is_next(frame, event.name, event.args, event.kwargs)
    return _at_end(frames[-1])


def go_on(context: Context, programs: Programs, frames: list[Frame]) -> list[Frame]:
    """Run on by other programs, from these frames of the running modules; returns those
    that stay on calls' stack."""
    context.programs = programs
    staying: list[Frame] = []
    # nothing was drawn so far, or they share one already
    if context.call and programs[context.call.path].forward.random:
        context.share_random()
    for i, frame in enumerate(frames):
        # One that ends is still to be popped.
        counted = (
            i == len(context.running)
            or bool(staying)
            or frame.program.names is not None
        )
        if i < len(context.running):
            running = context.running[i]
            counted |= running.counted
            running.program, running.counted = frame.program, counted
            frame.compiled = running.compiled
        staying += [frame] * counted
    return staying


def refuse(frame: Frame | None, what: str) -> None:
    """Raise RuntimeError for a path that has not been shown. `what`: the difference,
    `frame`: where it was met."""
    where = (
        "the model"
        if frame is None
        else f"{frame.path or 'the model'}: call {frame.number} of its forward"
    )
    raise RuntimeError(
        f"{where}: {what}: it took another path than when the forward was traced, which"
        " has not been shown right on shards. Give apply_tensor_parallel"
        " example_inputs that take this path"
    )
