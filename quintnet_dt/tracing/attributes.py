"""What a forward changes of its modules' attributes: something kept at the first call,
say. The next call may then take another path."""

import torch
from torch import nn

from ..parts import named_modules

_OURS = {
    *vars(nn.Module()),
    "_tp_later",
    "tensor_parallel_plan",
    "tensor_parallel_mesh",
}


def attributes(model):
    """{(module path, attribute): kind} of what modules keep, but for parameters and
    what torch itself keeps."""
    found = {}
    for path, module in named_modules(model):
        for name, x in (*vars(module).items(), *module._buffers.items()):
            if name not in _OURS and name not in module._parameters:
                found[path, name] = kind_of(x)
    return found


def changed(before, after):
    """The attributes that are of another kind than before, in order."""
    return sorted(
        key for key in {**before, **after} if before.get(key) != after.get(key)
    )


def kinds_at(model, keys):
    """The kinds of some attributes now."""
    modules, found = dict(named_modules(model)), []
    for path, name in keys:
        module = modules.get(path)
        x = (
            None
            if module is None
            else vars(module).get(name, module._buffers.get(name))
        )
        found.append(kind_of(x))
    return tuple(found)


def kind_of(x):
    """What may decide a path through a forward: whether something is there, of what
    type; a number's value does not."""
    if isinstance(x, torch.Tensor):
        return "tensor", x.dtype, x.dim()
    if x is None or isinstance(x, (bool, str)):
        return x
    if isinstance(x, (tuple, list, dict)) and len(x):
        return type(x).__name__, kind_of(
            next(iter(x.values() if isinstance(x, dict) else x))
        )
    return type(x).__name__
