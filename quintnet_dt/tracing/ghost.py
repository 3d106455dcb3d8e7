"""A copy of a model that owns no memory, to plan on while the model itself stays untouched."""

import copy
from collections import Counter

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..ddp import as_dtensor, whole_shape
from ..fsdp import copyable, is_fsdp
from ..parts import modules, named_parameters, parameters, scripts
from ..private import FakeCopyMode, global_hooks
from ..utils import held, leaves, opaque, replace, shard_kept, tensors
from .caches import unshare
from .closures import rebind
from .composites import plain


class StrayParameter(ValueError):
    """Something other than its module holds a parameter, and would keep the old one when the model
    is split."""

    def __init__(self, names):
        super().__init__(
            f"{', '.join(names)}: expected every parameter to be read as an attribute of its"
            " module, found one that something else holds (a list, a partial, a lambda, an"
            " optimizer kept in the model; a global, or an object elsewhere, that holds its"
            " module), which would keep the old one: read it as self.name, and make optimizers"
            " afterwards"
        )


class SplitWithin(RuntimeError):
    """A model that was split by itself is called by one that is being planned."""

    def __init__(self, module, path):
        name = f"{type(module).__name__}{path and f' ({path})'}"
        super().__init__(
            f"{name}: expected a forward that calls no model which was split by itself, found one:"
            " make it a submodule and split the whole, or call it outside and pass on what it"
            " gives"
        )


class _Memo(dict):
    """Counts how often a copy meets each object."""

    def __init__(self):
        super().__init__()
        self.met = Counter()

    def get(self, key, default=None):
        self.met[key] += 1
        return super().get(key, default)


def ghost(model, fake_mode=None, local_shape=None, device=None):
    """A deep copy of `model` that owns no memory: parameters and buffers are fake tensors of
    `fake_mode`.

    `local_shape(name, param)` gives the shape of a parameter; its whole shape by default. Without
    `fake_mode` the copy shares the parameters (which a forward does not write to) and copies the
    buffers, for a forward that must see values.
    """
    memo = _Memo()
    with copyable(model, memo) as dtypes:
        return _ghost(model, fake_mode, local_shape, device, memo, dtypes)


def _ghost(model, fake_mode, local_shape, device, memo, dtypes):
    def fake(t, shape=None):
        shape, dtype = tuple(t.shape) if shape is None else tuple(shape), dtypes.get(id(t), t.dtype)
        on = device if device is not None and t.device.type == "meta" else t.device
        with fake_mode:
            if shape == tuple(t.shape) and t.layout == torch.strided:
                return torch.empty_strided(shape, t.stride(), dtype=dtype, device=on)
            return torch.empty(shape, dtype=dtype, device=on)

    for name, p in named_parameters(model):
        shape, real = local_shape(name, p) if local_shape else whole_shape(p), as_dtensor(p)
        if fake_mode is not None:
            memo[id(p)] = nn.Parameter(fake(p, shape), p.requires_grad)
        elif isinstance(real, DTensor):
            if (
                real.device_mesh.ndim
                > 1
                # the ranks of a dp group may be called in different ways, and would wait for each
                # other
            ):
                raise RuntimeError(
                    "this call takes a path that was not traced before, through a forward that"
                    " reads values; under FSDP it cannot be traced: call the model in this way once"
                    " (same arguments, same mode) before fully_shard"
                )
            memo[id(p)] = nn.Parameter(
                real.full_tensor().to(dtypes.get(id(p), p.dtype)), p.requires_grad
            )
        else:
            memo[id(p)] = nn.Parameter(p.detach(), p.requires_grad)
    own, free = Counter(), {id(p) for p in parameters(model) if not isinstance(p, DTensor)}
    for module in modules(model):
        own.update(map(id, module._parameters.values()))
        if (
            type(module).__setattr__ is not nn.Module.__setattr__
        ):  # keeps a list of its own, as nn.LSTM does
            free -= set(map(id, module._parameters.values()))
        for _, t in tensors(list(vars(module).values())):  # buffers, and what it keeps besides
            if id(t) not in memo:
                memo[id(t)] = fake(t) if fake_mode is not None else t.detach().clone()
        for hook in [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]:
            if is_ours(hook):  # to be stripped: not copied, with all that they hold
                memo[id(getattr(hook, "__self__", hook))] = getattr(hook, "__self__", hook)
    for script in scripts(model):  # shared: its forward changes nothing of it but buffers
        memo[id(script)] = script
    try:
        copied = strip(copy.deepcopy(model, memo))
        rebind(model, copied, memo)
    except Exception as e:
        raise RuntimeError(
            f"{type(model).__name__} cannot be deep-copied, which planning needs so that the model"
            f" itself stays untouched: {e}"
        ) from e
    if stray := [
        name
        for name, p in named_parameters(model)
        if id(p) in free and memo.met[id(p)] > own[id(p)]
    ]:
        raise StrayParameter(stray)
    unshare(model, copied)
    return copied


_OURS = __package__.partition(".")[0] + "."


def is_ours(hook):
    """Whether a module's hook is this library's, or FSDP2's."""
    return str(getattr(hook, "__module__", "")).startswith(_OURS) or is_fsdp(hook)


def user_hooks(module):
    """A module's hooks that are neither torch's nor this library's, by the ids of their handles."""
    found = [item for hooks in hooks_of(module) for item in hooks.items()]
    return {k: h for k, h in found if _is_users(h)}


def user_hooks_of_all():
    """Those that the user registered for every module."""
    return [h for hooks in global_hooks() for h in hooks.values() if _is_users(h)]


def _is_users(hook):
    return not str(getattr(hook, "__module__", "")).startswith(("torch.", _OURS))


def hooks_of(module):
    return (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )


def strip(model):
    """Take this library's hooks, and FSDP2's, off a copy of a model that they were applied to."""
    for module in modules(model):
        plain(module)
        module._tp_later = (
            []
        )  # hooks that the user added since, which see what this library's have done
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            keys = list(hooks)
            ours = [i for i, key in enumerate(keys) if is_ours(hooks[key])]
            later = keys[ours[-1] + 1 :] if ours else []
            module._tp_later += later
            outside = keys[: ours[-1]] if hooks is module._forward_pre_hooks and ours else later
            # Of the copy itself the user's go too: they are for its caller.
            for key in {keys[i] for i in ours} | set(outside if module is model else ()):
                del hooks[key]
    return model


PASSED = "_tp_passed"  # the attribute of a module that was added to a split model


def passed(module):
    """Whether a module was added since the split: what it calls is its caller's."""
    return PASSED in vars(module)


def put_last(module):
    """A forward hook was registered on a copy, in the place of this library's: what the user added
    later runs after it."""
    for key in vars(module).get("_tp_later", ()):
        if key in module._forward_hooks:
            module._forward_hooks.move_to_end(key)


def fake_inputs(fake_mode, args, kwargs, known=None):
    """The inputs with a fake tensor for each tensor, and copies of objects that hold tensors (a
    cache, which the forward may fill). With `known`, which is told the real tensor behind each fake
    one, a shard that an object keeps gets its whole shape; else it stays one.
    """
    memo = {}
    for _, holder, place, t in held((args, kwargs)) if known is not None else ():
        if (action := shard_kept(holder, place)) is not None:
            shape = list(t.shape)
            shape[action.split.dim] = action.split.length
            with fake_mode:
                memo[id(t)] = torch.empty(shape, dtype=t.dtype, device=t.device)

    given = {id(t): t for _, t in tensors((args, kwargs))}  # one that is given twice stays one
    fakes = {
        i: fake_mode.from_tensor(t.detach()).requires_grad_(t.requires_grad)
        for i, t in given.items()
    }
    if known is not None:
        for i, t in given.items():
            known.give(fakes[i], t)
    with FakeCopyMode(fake_mode):
        return _instead((tuple(args), dict(kwargs)), fakes, memo)


def real_inputs(args, kwargs):
    """Copies of the inputs: a forward that runs on them cannot change the user's."""
    given = {id(t): t for _, t in tensors((args, kwargs))}
    copies = {i: t.detach().clone().requires_grad_(t.requires_grad) for i, t in given.items()}
    return _instead((tuple(args), dict(kwargs)), copies)


def _instead(obj, copies, memo=None):
    """A nested argument with the copies of its tensors, by id, and with copies of objects."""
    changes = {p: copies[id(t)] for p, t in tensors(obj)}
    return replace(obj, changes | {p: copy.deepcopy(x, memo) for p, x in leaves(obj) if opaque(x)})
