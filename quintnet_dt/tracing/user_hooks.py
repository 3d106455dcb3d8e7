"""Whose hooks are on a module: the user's, torch's, FSDP2's or this library's."""

from ..fsdp import is_fsdp
from ..parts import modules
from ..private import global_hooks
from .composites import plain

_OURS = __package__.partition(".")[0] + "."


def is_ours(hook):
    """Whether a module's hook is this library's, or FSDP2's."""
    return str(getattr(hook, "__module__", "")).startswith(_OURS) or is_fsdp(hook)


def user_hooks(module):
    """A module's hooks that are neither torch's nor this library's, by the ids of their
    handles."""
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
    """Take this library's hooks, and FSDP2's, off a copy of a model that they were
    applied to."""
    for module in modules(model):
        plain(module)
        # hooks that the user added since, which see what this library's have done
        module._tp_later = []
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            keys = list(hooks)
            ours = [i for i, key in enumerate(keys) if is_ours(hooks[key])]
            later = keys[ours[-1] + 1 :] if ours else []
            module._tp_later += later
            outside = (
                keys[: ours[-1]]
                if hooks is module._forward_pre_hooks and ours
                else later
            )
            # Of the copy itself the user's go too: they are for its caller.
            for key in {keys[i] for i in ours} | set(
                outside if module is model else ()
            ):
                del hooks[key]
    return model


PASSED = "_tp_passed"  # the attribute of a module that was added to a split model


def passed(module):
    """Whether a module was added since the split: what it calls is its caller's."""
    return PASSED in vars(module)


def put_last(module):
    """A forward hook was registered on a copy, in the place of this library's: what the
    user added later runs after it."""
    for key in vars(module).get("_tp_later", ()):
        if key in module._forward_hooks:
            module._forward_hooks.move_to_end(key)
