"""Whether a split model still has the modules that were split, and which it was given
since."""

from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..keys import ModulePath
from ..parts import modules
from ..places import Owners
from ..tracing.user_hooks import PASSED


class Hooks:
    """What is known of one module that was split: its `path` then, and where the
    model's parameters are."""

    context: Any  # the Context of the model
    path: ModulePath
    owners: Owners
    quieted: bool  # whether FSDP2's hooks on it were told to run uncounted
    pre_hooks: int  # how many it had when its parameters were looked at


class _Registrations:
    """How many modules have become those of one that is in a split model: where it is
    the same, no such model has changed. (A slice `self.layers[:4]` is a ModuleList, made
    anew in each forward, that is in none.)"""

    def __init__(self) -> None:
        self.count, self.handle = 0, None

    def __call__(self, module: nn.Module, name: str, child: nn.Module | None) -> None:
        self.count += PASSED in vars(module) or hooks_on(module) is not None

    def watch(self) -> None:
        if self.handle is None:
            self.handle = register_module_module_registration_hook(self)


registrations = _Registrations()


def hooks_on(module: nn.Module) -> Any:
    """The Hooks of a module, None where it has none."""
    mine = (getattr(hook, "__self__", None) for hook in module._forward_hooks.values())
    return next((h for h in mine if isinstance(h, Hooks)), None)


def changed_modules(
    module: nn.Module, context: Any, prefix: ModulePath = ""
) -> list[ModulePath]:
    """Paths of the modules that were added, removed or replaced since the split, in a
    model or its part at `prefix`. One that was moved, into a wrapper say, is still
    there."""
    now = {path: hooks_on(m) for path, m in module.named_modules(prefix=prefix)}
    changed = [path for path, h in now.items() if h is None or h.context is not context]
    there = set(map(id, now.values()))
    for h in context.hooks:
        within = not prefix or h.path == prefix or h.path.startswith(f"{prefix}.")
        if within and id(h) not in there and h.path not in changed:
            changed.append(h.path)
    return changed


def structure_of(module: nn.Module, prefix: ModulePath = "") -> tuple:
    """Which modules there are, and where they were when they were split."""
    now = ((path, m, hooks_on(m)) for path, m in module.named_modules(prefix=prefix))
    return tuple((path, id(m) if h is None else h.path) for path, m, h in now)


class Structures:
    """The modules of a split model and of those of its parts that were called, as its
    calls were shown right with."""

    def __init__(self, model: nn.Module):
        registrations.watch()
        self.split_at = registrations.count
        self.looked_at: dict[ModulePath, int] = {}  # the count of registrations then
        self.expected = {"": structure_of(model)}

    def check(self, module: nn.Module, context: Any, prefix: ModulePath) -> None:
        """Before a call of the user's: if modules have become others' since the last,
        each kind of call is shown right anew before it runs."""
        if self.looked_at.get(prefix, self.split_at) == registrations.count:
            return
        self.looked_at[prefix] = registrations.count
        now = structure_of(module, prefix)
        if now != self.expected.get(prefix):
            self.expected[prefix] = now
            context.paths.forget_all()

    def changed(
        self, module: nn.Module, context: Any, prefix: ModulePath
    ) -> list[ModulePath]:
        """Paths of the modules that were changed since the last `check`: within a
        forward, or taken off unseen."""
        if structure_of(module, prefix) == self.expected.get(prefix):
            return []
        return changed_modules(module, context, prefix)


def pass_added(module: nn.Module) -> None:
    """Mark the modules that were added since the split and have no hooks: what they
    call is their caller's."""
    for m in modules(module):
        if hooks_on(m) is None:
            vars(m)[PASSED] = True
