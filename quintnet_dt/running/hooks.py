"""How a module computes on shards: the hooks that run its Program.

Parameters are DTensors; while a module's forward runs, the attributes that it reads
give their local tensors instead, so that the forward computes on plain tensors at their
cost.
"""

from typing import Any

import torch
from torch import nn

from ..fsdp import quieten
from ..keys import ModulePath
from ..places import Owners
from ..private import (
    compiling,
    not_compiled,
    top_not_compiled,
    transforms_aside,
    within_compiled,
)
from ..tracing.user_hooks import hooks_of, user_hooks
from ..utils import quiet
from .calls import calls
from .context import Context
from .numbers import Numbers
from .params import Params
from .program import NOTHING, Program
from .record import Ended, Running, Started, Starts
from .shown import Shown, hide
from .structure import (  # noqa: F401  hooks_on: scripts that look at a split model read it here
    Hooks,
    hooks_on,
)
from .user_call import begin as begin_call
from .user_call import end as end_call
from .user_call import remember


class ModuleHooks(Hooks):
    """The two hooks of one module. Those of the user's that were there before see what
    the forward's own code sees."""

    def __init__(self, context: Context, path: ModulePath, owners: Owners):
        self.context, self.path, self.owners = context, path, owners
        self.params = Params(context, owners)
        # Hooks that the module had when it was split: how many; the user's.
        self.count = 0
        self.expected: set[int] = set()
        self.quieted, self.pre_hooks = False, 0
        self.take(context.programs)
        context.hooks.append(self)

    def __setstate__(self, state: dict) -> None:  # of a copy
        vars(self).update(state)
        self.context.hooks.append(self)

    def take(self, programs: dict[ModulePath, Program]) -> None:
        """Note what programs say of this module, so that torch.compile need guard no
        names: blocks that are alike then share what it compiles."""
        paths = self.context.paths
        self.program = programs.get(self.path)
        self.reached = paths is None or paths.reached(self.path, programs)
        self.params.take(self.program)

    @top_not_compiled
    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Choose the programs for a call that the user makes; show the module the local
        tensors of its parameters, and apply the actions on its inputs. A forward that
        is recomputed in a backward keeps the programs that it had."""
        if torch.compiler.is_compiling() or not within_compiled():
            return self.enter(module, args, kwargs)
        return not_compiled(self.enter, module, args, kwargs, within=True)

    def enter(
        self, module: nn.Module, args: tuple, kwargs: dict, within: bool = False
    ) -> Any:
        compiled = compiling(self.context)
        if compiled or within:
            return self.begin(module, args, kwargs, compiled, within)
        calls.rest()
        try:
            return self.begin(module, args, kwargs)
        finally:
            calls.wake()

    def begin(
        self,
        module: nn.Module,
        args: tuple,
        kwargs: dict,
        compiled: bool = False,
        within: bool = False,
    ) -> Any:
        context = self.context
        self.choose_program(module, args, kwargs, compiled, within)
        program = self.program
        shown: list[Shown] = []
        if program is not None and sum(map(len, hooks_of(module))) != self.count:
            self.check(module, program)
        counted = (
            bool(calls.frames) or program is not None and program.names is not None
        )
        kept: list | None = [] if compiled else None
        context.running.append(
            Running(self, program, shown, counted, kept, compiled or within)
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
        if self.params.places:
            # Gathered as they are, within torch.vmap and the like too.
            with quiet(), transforms_aside():
                self.params.show(shown, compiled)
        if program.numbers:
            self.show_numbers(module, program)
        if not program.inputs:
            return None
        return context.apply((args, kwargs), program.inputs, program.unwritten, -2)

    def show_numbers(self, module: nn.Module, program: Program) -> None:
        *around, running = self.context.running
        if not any(r.hooks is self for r in around):  # it may call itself
            running.numbers = Numbers(module, program.numbers, self.context.group)
            running.numbers.show()

    def choose_program(
        self, module: nn.Module, args: tuple, kwargs: dict, compiled: bool, within: bool
    ) -> None:
        """See to it that the program in force is one for what runs now."""
        context = self.context
        if not context.running and context.paths is not None:
            if not compiled:
                begin_call(self, module, args, kwargs, within)
            elif not context.recomputing:
                torch.compiler.disable(begin_call)(self, module, args, kwargs, True)
        elif calls.frames and not self.reached:
            calls.start(context, self.path)
        if self.program is not None and not self.program.fits(module):
            name = self.path or "the model"
            what = f"{name} is set otherwise now (train or eval mode, an attribute)"
            calls.change(context, Starts(self.path, module), what)

    def check(self, module: nn.Module, program: Program) -> None:
        """Refuse hooks that the user added since, where they would see shards. Those
        that the model adds while it runs are its own affair."""
        quieten(module)
        self.expected |= {k for k in user_hooks(module) if k >= self.context.first_hook}
        new = user_hooks(module).keys() - self.expected
        if (
            self.context.mesh is not None
            and new
            and self.would_see_shards(module, program, new)
        ):
            raise RuntimeError(
                f"{self.path or 'the model'}: a hook was added to it since the model"
                " was split, and would see this rank's shards: register it before"
                " apply_tensor_parallel, which then keeps whole what it sees, or on a"
                " module further out"
            )

    def would_see_shards(
        self, module: nn.Module, program: Program, new: set[int]
    ) -> bool:
        if program.inside:
            return True
        # Torch calls view_as for hooks on gradients.
        on_gradients = new & {*module._backward_hooks, *module._backward_pre_hooks}
        watched = program.names is not None or bool(calls.frames)
        return bool(on_gradients and (program.inputs or watched))

    @top_not_compiled
    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Undo what `before` did, also after an exception, and apply the actions on the
        outputs."""
        if torch.compiler.is_compiling() or not within_compiled():
            return self.leave(module, args, kwargs, output)
        return not_compiled(self.leave, module, args, kwargs, output)

    def leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        running = self.context.running
        if not running or running[-1].hooks is not self:
            return None  # an exception came before `before`
        run = running.pop()
        if run.compiled:
            return self.end(run, module, args, kwargs, output)
        calls.rest()
        try:
            return self.end(run, module, args, kwargs, output)
        finally:
            calls.wake()

    def end(
        self, run: Running, module: nn.Module, args: tuple, kwargs: dict, output: Any
    ) -> Any:
        context, program, failed = self.context, run.program, output is None
        is_whole_call = not context.running
        try:
            if run.counted:
                calls.pop(failed)
        finally:
            if run.kept is None:
                context.log.append(Ended(failed))
            if run.numbers is not None:
                run.numbers.hide()
            for s in reversed(run.shown):
                hide(s)
            if is_whole_call:
                end_call(self, module, program, (args, kwargs, output))
        outputs = {} if program is None or failed else program.outputs
        if outputs:
            output = context.apply(output, outputs)
        if is_whole_call:
            context.forget()
            if program is not None and context.paths is not None:
                self.remember_program(output)
        return output if outputs else None

    def remember_program(self, output: Any) -> None:
        if not compiling(self.context):
            remember(self.context, output)
        elif not self.context.recomputing:
            torch.compiler.disable(remember)(self.context, output)
