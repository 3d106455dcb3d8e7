"""How a module computes on shards: the hooks that run its Program.

Parameters are DTensors; while a module's forward runs, the attributes that it reads give their
local tensors instead, so that the forward computes on plain tensors at their cost.
"""

import sys
from functools import partial

import torch
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from ..ddp import is_local, take_local
from ..fsdp import quieten
from ..private import (
    as_parameter,
    compiling,
    in_backward,
    not_compiled,
    top_not_compiled,
    transforms_aside,
    within_compiled,
)
from ..tracing.ghost import SplitWithin, hooks_of, user_hooks
from ..tracing.trace import tracing
from ..utils import SHARDS, lookup, quiet, tensors
from .calls import calls
from .context import AGAIN
from .program import NOTHING
from .record import Ended, Running, Started, Starts, UserCall
from .shown import Shown, hide, keep_data, show, writable
from .structure import (  # noqa: F401  hooks_on: scripts that look at a split model read it here
    Hooks,
    hooks_on,
)


class ModuleHooks(Hooks):
    """The two hooks of one module. Those of the user's that were there before see what the
    forward's own code sees."""

    def __init__(self, context, path, owners):
        self.context, self.path, self.owners = context, path, owners
        self.count, self.known = (
            0,
            set(),
        )  # hooks that the module had when it was split: how many; the user's
        self.settled, self.hooked = (
            False,
            0,
        )  # the hooks of the module when its parameters were looked at
        self.take(context.programs)
        context.hooks.append(self)

    def __setstate__(self, state):  # of a copy
        vars(self).update(state)
        self.context.hooks.append(self)

    def take(self, programs):
        """Note what programs say of this module, so that torch.compile need guard no names: blocks
        that are alike then share what it compiles."""
        paths = self.context.paths
        self.program, self.reached = programs.get(self.path), paths is None or paths.reached(
            self.path, programs
        )
        params = self.program.params if self.program is not None else {}
        self.params = [
            (owner, attr, acts, name in self.program.written)
            for name, acts in params.items()
            for owner, attr in self.owners[name]
        ]

    @top_not_compiled
    def before(self, module, args, kwargs):
        """Choose the programs for a call that the user makes; show the module the local tensors of
        its parameters, and apply the actions on its inputs. A forward that is recomputed in a
        backward keeps the programs that it had."""
        if torch.compiler.is_compiling() or not within_compiled():
            return self.enter(module, args, kwargs)
        return not_compiled(self.enter, module, args, kwargs, within=True)

    def enter(self, module, args, kwargs, within=False):
        context, compiled = self.context, compiling(self.context)
        if not context.running and context.paths is not None:
            if not compiled:
                self.choose(module, args, kwargs, within)
            elif not context.recomputing:
                torch.compiler.disable(self.choose)(module, args, kwargs, True)
        elif calls.frames and not self.reached:
            calls.start(context, self.path)
        if self.program is not None and not self.program.fits(module):
            what = (
                f"{self.path or 'the model'} is set otherwise now (train or eval mode, an"
                " attribute)"
            )
            calls.change(context, Starts(self.path, module), what)
        program, shown = self.program, []
        if program is not None and sum(map(len, hooks_of(module))) != self.count:
            self.check(module, program)
        counted = bool(calls.frames) or program is not None and program.names is not None
        context.running.append(
            Running(self, program, shown, counted, [] if compiled else None, compiled or within)
        )
        if compiled:
            context.compiled = True
        else:
            context.log.append(Started(self.path, module))
            context.ran += 1
        if counted:
            calls.push(context, program or NOTHING, self, compiled or within)
        if program is None:
            return None
        if self.params:
            with (
                quiet(),
                transforms_aside(),
            ):  # gathered as they are, within torch.vmap and the like too
                self.show_params(shown)
        return context.apply((args, kwargs), program.inputs, program.unwritten, -2)

    def choose(self, module, args, kwargs, compiled):
        """The programs for a call that the user makes."""
        context = self.context
        context.check_hooks()
        context.forget()  # one that failed may have left some
        if tracing.depth:
            raise SplitWithin(module, self.path)
        if len(module._forward_pre_hooks) != self.hooked:  # DDP's among them?
            take_local(module)
            self.hooked = len(module._forward_pre_hooks)
        if not in_backward():
            context.call = UserCall(self.path, self.owners, module, args, kwargs, compiled)
            context.log = []
            context.first_hook, context.compiled, context.recomputing = (
                RemovableHandle.next_id,
                False,
                False,
            )
            context.ran = 0
            if not self.settled:
                quieten(module)
                self.settled = True
            context.structures.check(module, context, self.path)
            context.programs = context.paths.programs(*context.call)
            with context.paths.in_step.explained():
                if context.weights is not None and (
                    context.paths.fresh or context.paths.other_kind
                ):
                    context.weights.check_assigned()
                if context.weights is not None and context.paths.first_of_kind:
                    context.weights.check_shared()
                context.random_is_shared = False
                if context.paths.random(self.path, module, context.programs):
                    context.share_random()

    def check(self, module, program):
        """Refuse hooks that the user added since, where they would see shards. Those that the model
        adds while it runs are its own affair."""
        quieten(module)
        self.known |= {k for k in user_hooks(module) if k >= self.context.first_hook}
        new = user_hooks(module).keys() - self.known
        backward = new & {
            *module._backward_hooks,
            *module._backward_pre_hooks,
        }  # torch calls view_as for these
        shards = (
            program.inside
            or backward
            and (program.inputs or program.names is not None or calls.frames)
        )
        if self.context.mesh is not None and new and shards:
            raise RuntimeError(
                f"{self.path or 'the model'}: a hook was added to it since the model was split, and"
                " would see this rank's shards: register it before apply_tensor_parallel, which"
                " then keeps whole what it sees, or on a module further out"
            )

    def show_params(self, shown):
        """Show the module, and whoever looks while it runs, the local tensors of the parameters
        that it reads. One that a module around it shows too is shown as this one's program says,
        until it ends."""
        for owner, attr, actions, written in self.params:
            if attr not in owner._parameters:  # pruned, say
                self.replaced(owner, attr, vars(owner).get(attr))
                continue
            before = owner._parameters[attr]
            outer = None if isinstance(before, DTensor) else self.shown_around(owner, attr, before)
            if outer is not None:
                param, local = outer.param, outer.local
                if written:
                    keep_data(param, local)
            elif isinstance(before, DTensor) or is_local(before) or self.context.mesh is None:
                param, local = before, self.local(owner, attr, before, written)
            else:
                self.replaced(owner, attr, before)
                continue
            again = (
                outer is not None and outer.actions == actions
            )  # one tensor, to take gradients with respect to
            tensor = outer.tensor if again else self.context.act(actions, local)
            if not compiling(self.context):
                tensor = as_parameter(tensor)
            local = tensor if written else local  # what is assigned to its `.data` is found there
            show(owner, attr, tensor)
            shown.append(Shown(owner, attr, before, tensor, param, local, actions, written))

    def shown_around(self, owner, attr, tensor):
        """The Shown of a module around this one that shows this tensor there; None where none
        does."""
        for running in reversed(self.context.running):
            for s in running.shown:
                if s.owner is owner and s.attr == attr and s.tensor is tensor:
                    return s
        return None

    def local(self, owner, attr, p, written):
        """This rank's part of a parameter."""
        if not isinstance(p, DTensor):
            return p
        if p.device_mesh.ndim > 1:
            raise RuntimeError(
                f"{self.name_of(owner, attr)}: it is read while FSDP holds it sharded, outside of"
                " the module that fully_shard was called on: call fully_shard on a module that"
                " holds all that read it"
            )
        local = p.to_local()
        return writable(local) if written else local

    def replaced(self, owner, attr, p):
        """A parameter is another tensor than the one that was split. Within a forward that replaces
        it for some runs of this module only (torch.func.functional_call), this is one of those."""
        name = self.name_of(owner, attr)
        if name not in self.program.optional:
            raise RuntimeError(
                f"{name}: expected the DTensor that apply_tensor_parallel made, found a"
                f" {type(p).__name__} (replaced, pruned, or loaded with assign=True?): copy values"
                " into the DTensor, or change the model before it is split"
            )

    def name_of(self, owner, attr):
        return next(n for n, at in self.owners.items() if (owner, attr) in at)

    @top_not_compiled
    def after(self, module, args, kwargs, output):
        """Undo what `before` did, also after an exception, and apply the actions on the outputs."""
        if torch.compiler.is_compiling() or not within_compiled():
            return self.leave(module, args, kwargs, output)
        return not_compiled(self.leave, module, args, kwargs, output)

    def leave(self, module, args, kwargs, output):
        context = self.context
        if (
            not context.running or context.running[-1].hooks is not self
        ):  # an exception came before `before`
            return None
        run = context.running.pop()
        program = run.program
        try:
            if run.counted:
                calls.pop(failed=output is None)
        finally:
            if not compiling(context):
                context.log.append(Ended(failed=output is None))
            for s in reversed(run.shown):
                hide(s)
            if not context.running:
                context.call = None
                self.mark((args, kwargs, output))
                if not compiling(context) and context.paths is not None:
                    self.check_modules(module, program, failed=output is None)
        if program is not None and output is not None and program.outputs:
            output = context.apply(output, program.outputs)
        if not context.running:
            context.forget()
        if program is None:
            return None
        if not context.running and context.paths is not None:
            if not compiling(context):
                self.remember(output)
            elif not context.recomputing:
                torch.compiler.disable(self.remember)(output)
        return output if program.outputs else None

    def check_modules(self, module, program, failed):
        """Refuse modules that were added, removed or replaced since the split: what was done at
        their borders would be missing. They are looked at where another number of them ran than in
        the forward that was shown, or something failed."""
        context = self.context
        if failed and (error := sys.exc_info()[1]) is not None:
            context.paths.in_step.explain(error)
        if not failed and (
            context.compiled
            or program is None
            or context.ran in (program.forward.modules, *context.counts)
        ):
            return
        changed = context.structures.changed(module, context, self.path)
        if changed:
            text = (
                f"{', '.join(changed[:5])}: expected the modules that were split, found others or"
                f" none: {AGAIN}"
            )
            error = sys.exc_info()[1] if failed else None
            if error is None:
                raise RuntimeError(text)
            error.__notes__ = [
                *getattr(error, "__notes__", []),
                text,
            ]  # as add_note of Python 3.11 does
        context.counts.add(context.ran)

    def remember(self, output):
        """A checkpoint in this forward, which a backward will run again, is to find the programs of
        this forward."""
        if in_backward():
            return
        resume = partial(self.context.resume, self.context.programs)
        with quiet():
            for t in (t for _, t in tensors(output) if t.grad_fn is not None):
                t.register_hook(lambda grad: resume())

    def mark(self, objects):
        """Tell objects such as a key-value cache which of the tensors that they keep are shards."""
        program = self.context.programs.get(self.path)
        for path, shards in program.forward.shards.items() if program is not None else ():
            if (holder := lookup(objects, path)) is not None:
                vars(holder)[SHARDS] = shards
