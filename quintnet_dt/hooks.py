"""How a module computes on shards: the hooks that run its Program.

Parameters are DTensors; while a module's forward runs, the attributes that it reads give their local tensors instead, so that the forward computes on
plain tensors at their cost.
"""

from functools import partial

from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from .agreement import share_random_state
from .calls import calls
from .context import quiet
from .fsdp import quieten
from .ghost import hooks_of, put_last, user_hooks
from .private import in_backward
from .utils import SHARDS, lookup, tensors


class ModuleHooks:
    """The two hooks of one module. Those of the user's that were there before see what the forward's own code sees."""

    def __init__(self, context, path, owners):
        self.context, self.path, self.owners = context, path, owners
        self.count, self.known = 0, set()  # hooks that the module had when it was split: how many; the user's
        self.settled = False

    def before(self, module, args, kwargs):
        """Choose the programs for a call that the user makes; show the module the local tensors of its parameters, and apply the actions on
        its inputs. A forward that is recomputed in a backward keeps the programs that it had."""
        context = self.context
        if not context.running and context.paths is not None and not in_backward():
            if not self.settled:
                quieten(module)
                self.settled = True
            context.call, context.log = (self.path, self.owners, module, args, kwargs), []
            context.first_hook = RemovableHandle.next_id
            context.programs = context.paths.programs(*context.call)
            if context.mesh.size() > 1 and context.paths.random(self.path, module, context.programs):
                share_random_state(context.mesh)
        elif calls.frames and context.paths is not None:
            calls.start(context, self.path)
        program, shown = context.programs.get(self.path), []
        if program is not None and sum(map(len, hooks_of(module))) != self.count:
            self.check(module, program)
        counted = program is not None and bool(program.names)
        context.running.append((self, program, shown, counted))
        context.log.append(self.path)
        if program is None:
            return None
        if counted:
            calls.push(context, program, self.path)
        if program.params:
            with quiet:
                self.show_params(program.params, shown)
        return context.apply((args, kwargs), program.inputs)

    def check(self, module, program):
        """Refuse hooks that the user added since, where they would see shards. Those that the model adds while it runs are its own affair."""
        quieten(module)
        self.known |= {k for k in user_hooks(module) if k >= self.context.first_hook}
        new = user_hooks(module).keys() - self.known
        backward = new & {*module._backward_hooks, *module._backward_pre_hooks}  # torch calls view_as for these
        shards = program.inside or backward and (program.inputs or program.names or calls.frames)
        if self.context.mesh is not None and new and shards:
            raise RuntimeError(
                f"{self.path}: a hook was added to it since the model was split, and would see this rank's shards: register it before "
                "apply_tensor_parallel, which then keeps whole what it sees, or on a module further out"
            )

    def show_params(self, params, shown):
        for name, actions in params.items():
            for owner, attr in self.owners[name]:
                if attr not in owner.__dict__:
                    p = owner._parameters[attr]
                    if not isinstance(p, DTensor) and self.context.mesh is not None:
                        raise RuntimeError(
                            f"{name}: expected the DTensor that apply_tensor_parallel made, found a {type(p).__name__} (replaced, or loaded with "
                            "assign=True?): copy values into the DTensor, or change the model before it is split"
                        )
                    show(owner, attr, self.context.act(actions, p.to_local() if isinstance(p, DTensor) else p))
                    shown.append((owner, attr, p))

    def after(self, module, args, kwargs, output):
        """Undo what `before` did, also after an exception, and apply the actions on the outputs."""
        context = self.context
        if not context.running or context.running[-1][0] is not self:  # an exception came before `before`
            return None
        _, program, shown, counted = context.running.pop()
        try:
            if counted:
                calls.pop(failed=output is None)
        finally:
            context.log.append(output is not None)
            for owner, attr, p in shown:
                hide(owner, attr, p)
            if not context.running:
                context.call = None
                self.mark((args, kwargs, output))
        if program is None:
            return None
        if output is not None and program.outputs:
            output = context.apply(output, program.outputs)
        if not context.running and context.paths is not None and not in_backward():
            self.remember(output)
        return output if program.outputs else None

    def remember(self, output):
        """A checkpoint in this forward, which a backward will run again, is to find the programs of this forward."""
        resume = partial(setattr, self.context, "programs", self.context.programs)
        with quiet:
            for t in (t for _, t in tensors(output) if t.grad_fn is not None):
                t.register_hook(lambda grad: resume())

    def mark(self, objects):
        """Tell objects such as a key-value cache which of the tensors that they keep are shards."""
        program = self.context.programs.get(self.path)
        for path, shards in program.shards.items() if program is not None else ():
            if (holder := lookup(objects, path)) is not None:
                vars(holder)[SHARDS] = shards


def show(owner, attr, tensor):
    """Let `owner.attr` give `tensor` for now. The instance's dict hides the registered parameter and leaves it where it is."""
    if type(owner).__setattr__ is not nn.Module.__setattr__:  # keeps a list of its own, as nn.LSTM does
        if isinstance(tensor, nn.Parameter):  # a DTensor parameter's local tensor is marked as one
            tensor = tensor.view_as(tensor)
        del owner._parameters[attr]
        setattr(owner, attr, tensor)
    else:
        owner.__dict__[attr] = tensor


def hide(owner, attr, param):
    """End `show`."""
    owner.__dict__.pop(attr, None)
    if attr not in owner._parameters:
        setattr(owner, attr, param)


def hook(module, context, path, owners):
    """Register the hooks of one module."""
    hooks = ModuleHooks(context, path, owners)
    module.register_forward_pre_hook(hooks.before, with_kwargs=True, prepend=True)
    module.register_forward_hook(hooks.after, with_kwargs=True, always_call=True)
    put_last(module)
    hooks.count, hooks.known = sum(map(len, hooks_of(module))), set(user_hooks(module))


def install(model, context):
    """Register the hooks on every module of `model`."""
    owners = parameter_owners(model)
    for path, module in model.named_modules():
        hook(module, context, path, owners)


def parameter_owners(model):
    """Parameter name (the first of tied ones) -> [(module, attribute), ...] for every place that holds it."""
    names = {id(p): n for n, p in model.named_parameters()}
    owners = {}
    for module in model.modules():
        for attr, p in module._parameters.items():
            if p is not None:
                owners.setdefault(names[id(p)], []).append((module, attr))
    return owners
