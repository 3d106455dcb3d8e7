"""How a module computes on shards: the hooks that run its Program.

Parameters are DTensors; while a module's forward runs, the attributes that it reads give their local tensors instead, so that the forward computes on
plain tensors at their cost.
"""

from torch import nn
from torch.distributed.tensor import DTensor

from .calls import calls
from .context import quiet
from .private import in_backward
from .utils import SHARDS, lookup


class ModuleHooks:
    """The two hooks of one module, and what they must undo when its forward ends."""

    tensor_parallel_hook = True  # so that a copy for planning can be stripped of it

    def __init__(self, context, path, owners, early):
        self.context, self.path, self.owners = context, path, owners
        self.early = early  # whether `start` is a hook of its own, before those of the user
        self.running = []  # (program, parameters shown) of each forward that is under way

    def start(self, module, args, kwargs):
        """Choose the programs for a call that the user makes. A forward that is recomputed in a backward keeps those that it had."""
        context = self.context
        if context.depth == 0 and context.paths is not None and not in_backward():
            context.call = (self.path, self.owners, module, args, kwargs)
            context.programs = context.paths.programs(*context.call)
        context.depth += 1
        self.running.append(None)

    def before(self, module, args, kwargs):
        """Show the module the local tensors of its parameters, and apply the actions on its inputs."""
        if not self.early:
            self.start(module, args, kwargs)
        program, shown = self.context.programs.get(self.path), []
        self.running[-1] = (program, shown)
        if program is None:
            return None
        if program.params:
            with quiet:
                self.show_params(program.params, shown)
        if program.names:
            calls.push(self.context, program, self.path)
        return self.context.apply((args, kwargs), program.inputs)

    def show_params(self, params, shown):
        for name, actions in params.items():
            for owner, attr in self.owners[name]:
                if attr not in owner.__dict__:
                    p = owner._parameters[attr]
                    show(owner, attr, self.context.act(actions, p.to_local() if isinstance(p, DTensor) else p))
                    shown.append((owner, attr, p))

    def after(self, module, args, kwargs, output):
        """Undo what `before` did, also after an exception, and apply the actions on the outputs."""
        if not self.running:
            return None
        self.context.depth -= 1
        if self.context.depth == 0:
            self.context.call = None
            self.mark((args, kwargs, output))
        program, shown = self.running.pop() or (None, [])
        if program is None:
            return None
        try:
            if program.names:
                calls.pop(failed=output is None)
        finally:
            for owner, attr, p in shown:
                hide(owner, attr, p)
        if output is None or not program.outputs:
            return None
        return self.context.apply(output, program.outputs)


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
    early = bool(module._forward_pre_hooks)
    hooks = ModuleHooks(context, path, owners, early)
    if early:
        module.register_forward_pre_hook(hooks.start, with_kwargs=True, prepend=True)
    module.register_forward_pre_hook(hooks.before, with_kwargs=True)
    module.register_forward_hook(hooks.after, with_kwargs=True, always_call=True)


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
