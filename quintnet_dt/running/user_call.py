"""The outermost run of a split model: what the user called. Before it, the programs for
such a call are chosen; after it, it is seen whether the model is still the one that was
split."""

import sys
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..ddp import take_local
from ..fsdp import quieten
from ..private import compiling, in_backward
from ..tracing.ghost import SplitWithin
from ..tracing.trace import tracing
from ..utils import SHARDS, lookup, quiet, tensors
from .context import AGAIN, Context
from .program import Program
from .record import UserCall
from .structure import Hooks


def begin(
    hooks: Hooks, module: nn.Module, args: tuple, kwargs: dict, compiled: bool
) -> None:
    """Choose the programs for a call that the user makes."""
    context = hooks.context
    context.check_hooks()
    context.forget()  # one that failed may have left some
    if tracing.depth:
        raise SplitWithin(module, hooks.path)
    if len(module._forward_pre_hooks) != hooks.pre_hooks:  # DDP's among them?
        take_local(module)
        hooks.pre_hooks = len(module._forward_pre_hooks)
    if in_backward():
        return
    context.call = UserCall(hooks.path, hooks.owners, module, args, kwargs, compiled)
    context.log, context.ran = [], 0
    context.compiled = context.recomputing = False
    context.first_hook = RemovableHandle.next_id
    if not hooks.quieted:
        quieten(module)
        hooks.quieted = True
    context.structures.check(module, context, hooks.path)
    context.programs = context.paths.programs(*context.call)
    with context.paths.in_step.explained():
        _check_weights(context)
        context.random_is_shared = False
        if context.paths.random(hooks.path, module, context.programs):
            context.share_random()


def _check_weights(context: Context) -> None:
    if context.weights is None:
        return
    if context.paths.fresh or context.paths.other_kind:
        context.weights.check_assigned()
    if context.paths.first_of_kind:
        context.weights.check_shared()


def end(
    hooks: Hooks, module: nn.Module, program: Program | None, objects: tuple
) -> None:
    """A call that the user made is over, or failed. `objects`: (args, kwargs,
    output)."""
    context = hooks.context
    context.call = None
    _mark_shards(context.programs.get(hooks.path), objects)
    if not compiling(context) and context.paths is not None:
        _check_modules(hooks, module, program, failed=objects[2] is None)


def _mark_shards(program: Program | None, objects: tuple) -> None:
    """Tell objects such as a key-value cache which of the tensors that they keep are
    shards."""
    for path, shards in program.forward.shards.items() if program is not None else ():
        if (holder := lookup(objects, path)) is not None:
            vars(holder)[SHARDS] = shards


def _check_modules(
    hooks: Hooks, module: nn.Module, program: Program | None, failed: bool
) -> None:
    """Refuse modules that were added, removed or replaced since the split: what was
    done at their borders would be missing. They are looked at where another number of
    them ran than in the forward that was shown, or something failed."""
    context = hooks.context
    error = sys.exc_info()[1] if failed else None
    if error is not None:
        context.paths.in_step.explain(error)
    if not failed:
        if context.compiled or program is None:
            return
        if context.ran in (program.forward.modules, *context.counts):
            return
    changed = context.structures.changed(module, context, hooks.path)
    if changed:
        text = (
            f"{', '.join(changed[:5])}: expected the modules that were split, found"
            f" others or none: {AGAIN}"
        )
        if error is None:
            raise RuntimeError(text)
        # add_note, since Python 3.11
        error.__notes__ = [
            *getattr(error, "__notes__", []),
            text,
        ]
    context.counts.add(context.ran)


def remember(context: Context, output: Any) -> None:
    """A checkpoint in this forward, which a backward will run again, is to find the
    programs of this forward."""
    if in_backward():
        return
    resume = partial(context.resume, context.programs)
    with quiet():
        for t in (t for _, t in tensors(output) if t.grad_fn is not None):
            t.register_hook(lambda grad: resume())
