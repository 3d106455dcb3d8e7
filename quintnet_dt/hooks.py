"""How a module computes on shards: the hooks that run its Program.

Parameters are DTensors; while a module's forward runs, the attributes that it reads give their local tensors instead, so that the forward computes on
plain tensors at their cost.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from . import comm_ops
from .private import in_backward
from .program import Program
from .utils import call_name, lookup, replace


class Context:
    """What the hooks of one model share: the mesh, and which programs are in force. Copying a model copies it, but not the mesh."""

    def __init__(self, mesh=None, group=None):
        self.mesh, self._group = mesh, group
        self.programs = {}
        self.paths, self.call = None, None  # Paths; the call that the user made, while it runs
        self.depth = 0  # how many of the model's forwards are running, one inside the other

    @property
    def group(self):
        if self._group is None:
            self._group = self.mesh.get_group()
        return self._group

    def __deepcopy__(self, memo):
        new = Context(self.mesh, self._group)
        new.programs, new.paths = self.programs, self.paths
        return new

    def __getstate__(self):
        return {**vars(self), "_group": None}

    def act(self, actions, x):
        """Apply actions to a tensor."""
        with _quiet:
            for a in actions:
                x = _ACTIONS[a.kind](x, a, self.group)
        return x

    def apply(self, obj, at):
        """Apply `at[path]` to the tensor at each path of a nested argument. A tensor that several calls read is communicated once:
        the result is kept with the tensor until it changes."""
        if not at:
            return obj
        with _quiet:
            changes = {}
            for path, actions in at.items():
                x = lookup(obj, path)
                if not isinstance(x, torch.Tensor):
                    raise RuntimeError(
                        f"expected a tensor at {path} of a module's inputs or outputs, as in the forward that was traced, found {type(x).__name__}"
                    )
                version = 0 if x.is_inference() else x._version
                key = (actions, version, torch.is_grad_enabled())
                kept = getattr(x, "_tp_kept", None)
                if kept is None or kept[0] != key or kept[1] is not self:
                    y = self.act(actions, x)
                    if y is not x:
                        x._tp_kept = kept = (key, self, y)
                    else:
                        kept = (key, self, x)
                changes[path] = kept[2]
            return replace(obj, changes)

    def drop_out(self, func, action, args, kwargs):
        """Dropout on a shard: this rank's part of the mask that the whole tensor would get, so that results and the ranks' random
        states are those of the whole model."""
        if isinstance(self.group, comm_ops.SimulatedGroup):
            return func(*args, **kwargs)  # as a call of the model's, which the proof compares
        x, *rest = args
        with _quiet, torch.no_grad():
            mine = comm_ops.chunk_sizes(action.units, comm_ops.group_size(self.group))[comm_ops.group_rank(self.group)]
            shape = list(x.shape)
            shape[action.dim] = shape[action.dim] // mine * action.units
            order = sorted(range(x.dim()), key=x.stride, reverse=True)  # a mask is drawn in the order of memory
            ones = x.new_ones([shape[d] for d in order]).permute([order.index(d) for d in range(x.dim())])
            mask = self.act([action], func(ones, *rest, **kwargs))
        inplace = kwargs.get("inplace", len(args) > 3 and args[3])
        return x.mul_(mask) if inplace else x * mask

    def gather_buffers(self, whole, parts, at):
        """Write what a call made of the parts of buffers back into the whole ones."""
        with _quiet, torch.no_grad():
            for p, a in at.items():
                lookup(whole, p).copy_(self.act([dataclasses.replace(a, kind="gather")], lookup(parts, p)))


class _AddOnce(torch.autograd.Function):
    """y = x on rank 0 and 0 elsewhere; dx = dy: an addend of a sum over ranks. dy is replicated, so dx is too."""

    @staticmethod
    def forward(ctx, x, first):
        return x.view_as(x) if first else torch.zeros_like(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _parts(x, a, group, whole):
    """View a dim as (outer, units, inner), where outer is not 1; give the dim of the units and every rank's length along it."""
    units = comm_ops.chunk_sizes(a.units, comm_ops.group_size(group))
    mine = a.units if whole else units[comm_ops.group_rank(group)]
    if a.outer == 1:
        inner = x.shape[a.dim] // mine if mine else a.inner
        return x, a.dim, [u * inner for u in units], None
    return x.unflatten(a.dim, (-1, mine, a.inner)), a.dim + 1, units, a.dim


def _gather(x, a, group):
    x, dim, sizes, outer = _parts(x, a, group, False)
    x = comm_ops.all_gather(x, dim, group, sizes)
    return x if outer is None else x.flatten(outer, outer + 2)


def _split(x, a, group):
    x, dim, sizes, outer = _parts(x, a, group, True)
    x = comm_ops.split(x, dim, group, sizes)
    return x if outer is None else x.flatten(outer, outer + 2)


_ACTIONS = {
    "enter": lambda x, a, group: comm_ops.copy_in(x, group) if x.requires_grad else x,
    "sum": lambda x, a, group: comm_ops.all_reduce(x, group),
    "gather": _gather,
    "split": _split,
    "once": lambda x, a, group: _AddOnce.apply(x, comm_ops.group_rank(group) == 0),
}


class _Calls(TorchFunctionMode):
    """Runs the programs of single calls. One mode for the process's thread; each module with such programs pushes a frame."""

    def __init__(self):
        super().__init__()
        self.frames, self.quiet = [], 0

    def push(self, context, program, path):
        if not self.frames:
            self.__enter__()
        self.frames.append([context, program, path, 0])

    def pop(self, failed):
        frame = self.frames[-1]
        try:
            if not failed and frame[3] != len(frame[1].names):
                self.change(frame, None)
        finally:
            self.frames.pop()
            if not self.frames:
                self.__exit__(None, None, None)

    def change(self, frame, name):
        """The forward takes another path than the one that was shown: its next call is `name` (None: it ends). Go on with programs
        shown for this path, if what has run so far is the same in them."""
        context, program, path, number = frame
        frames, self.frames, quiet, self.quiet = self.frames, [], self.quiet, 0
        try:
            for programs in context.paths.variants(*context.call) if context.call else ():
                other = programs.get(path, Program())
                same = all(programs.get(p, Program()).does_as(q) for p, q in context.programs.items() if p != path)
                if (
                    same
                    and other.goes_on(program, number)
                    and other.names[number : number + 1] == [name][: name is not None]
                ):
                    context.programs, frame[1] = programs, other
                    return
        finally:
            self.frames, self.quiet = frames, quiet
        was = program.names[number] if number < len(program.names) else "none"
        raise RuntimeError(
            f"{path or 'the model'}: call {number} of its forward was {was} when the forward was traced and is {name or 'none'} now: it took "
            "another path, which has not been shown right on shards. Give apply_tensor_parallel example_inputs that take this path"
        )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = None if self.quiet else call_name(func)
        if name is None:
            return func(*args, **kwargs)
        frame = self.frames[-1]
        number = frame[3]
        if frame[1].names[number : number + 1] != [name]:
            self.change(frame, name)
        context, program, path, _ = frame
        frame[3] += 1
        call = program.calls.get(number)
        if call is None:
            return func(*args, **kwargs)
        whole = (args, kwargs)
        if call.kept:
            args, kwargs = replace(whole, {p: context.act([a], lookup(whole, p)) for p, a in call.kept.items()})
        args, kwargs = context.apply((args, kwargs), call.inputs)
        if call.sizes:
            args, kwargs = divide((args, kwargs), call.sizes, comm_ops.group_size(context.group), path)
        if call.dropout is not None:
            out = context.drop_out(func, call.dropout, args, kwargs)
        elif call.rows is not None:
            out = _look_up(context, call.rows, *args, **kwargs)
        else:
            out = func(*args, **kwargs)
        if call.kept:
            context.gather_buffers(whole, (args, kwargs), call.kept)
        return context.apply(out, call.outputs)


_calls = _Calls()


class _Quiet:
    """Around what is not the model's own computation: its calls are not counted."""

    def __enter__(self):
        _calls.quiet += 1

    def __exit__(self, *_):
        _calls.quiet -= 1


_quiet = _Quiet()


def divide(obj, paths, n, where):
    """Divide the sizes at some paths by n; a negative one stands for what is left, and does already."""
    sizes = {p: lookup(obj, p) for p in paths}
    odd = [x for x in sizes.values() if not isinstance(x, int) or x > 0 and x % n]
    if odd:
        raise RuntimeError(f"{where}: expected sizes that {n} ranks divide, as when it was traced, found {odd}")
    return replace(obj, {p: x if x < 0 else x // n for p, x in sizes.items()})


def is_quiet():
    """Whether hooks are at work now, and not the model."""
    return _calls.quiet > 0


def _look_up(
    context, rows, input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False
):
    """An embedding of which this rank has some rows: zeros for the others, so that the ranks' results sum to the whole.

    input: ids of any shape, in [0, rows); weight: (this rank's rows, d); returns (*input.shape, d).
    """
    n, rank = comm_ops.group_size(context.group), comm_ops.group_rank(context.group)
    sizes = comm_ops.chunk_sizes(rows, n)
    first, count = sum(sizes[:rank]), sizes[rank]
    with _quiet:
        if padding_idx is not None:
            padding_idx = padding_idx % rows - first
            padding_idx = padding_idx if 0 <= padding_idx < count else None
        ids = input - first
        absent = (ids < 0) | (ids >= count)
        ids = ids.masked_fill(absent, 0)
        if count == 0:  # no row to look up: one of zeros, which gets no gradient
            weight = F.pad(weight, (0, 0, 0, 1))
    out = F.embedding(ids, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    with _quiet:
        return out.masked_fill(absent.unsqueeze(-1), 0)


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
            with _quiet:
                self.show_params(program.params, shown)
        if program.names:
            _calls.push(self.context, program, self.path)
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
        program, shown = self.running.pop() or (None, [])
        if program is None:
            return None
        try:
            if program.names:
                _calls.pop(failed=output is None)
        finally:
            for owner, attr, p in shown:
                hide(owner, attr, p)
        if output is None or not program.outputs:
            return None
        return self.context.apply(output, program.outputs)


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
