"""Registering the hooks of a split model, and taking them off."""

import threading

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..keys import ModulePath
from ..parts import named_modules
from ..places import Owners, parameter_owners
from ..tracing.user_hooks import hooks_of, passed, put_last, user_hooks
from .context import Context
from .hooks import ModuleHooks
from .structure import hooks_on

OUR_ID = (
    -2
    # of the hooks' handles: the same in every module, for torch.compile guards it;
    # torch counts its own
    # from 0
)

_ids = threading.Lock()  # torch's counter is one for all threads


def hook(module: nn.Module, context: Context, path: ModulePath, owners: Owners) -> None:
    """Register the hooks of one module."""
    hooks = ModuleHooks(context, path, owners)
    with _ids:
        next_id, RemovableHandle.next_id = RemovableHandle.next_id, OUR_ID
        module.register_forward_pre_hook(hooks.before, with_kwargs=True, prepend=True)
        module.register_forward_hook(hooks.after, with_kwargs=True, always_call=True)
        RemovableHandle.next_id = next_id
    put_last(module)
    hooks.count, hooks.expected = sum(map(len, hooks_of(module))), set(
        user_hooks(module)
    )


def unhook(module: nn.Module) -> None:
    """Take the hooks of one module off."""
    h = hooks_on(module)
    for hooks in (
        (module._forward_pre_hooks, module._forward_hooks) if h is not None else ()
    ):
        for key in [
            key for key, hook in hooks.items() if getattr(hook, "__self__", None) is h
        ]:
            del hooks[key]


def install(model: nn.Module, context: Context) -> None:
    """Register the hooks on every module of `model`."""
    owners = parameter_owners(model)
    for path, module in named_modules(model):
        if not passed(module):
            hook(module, context, path, owners)
