"""A model that was split before, and whose modules have changed since: what of it
stays."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .keys import ParamName
from .parts import modules, named_modules, named_parameters
from .plan import Entry
from .running.context import Context
from .running.structure import changed_modules, hooks_on
from .tracing.user_hooks import PASSED


def entries_of_split(model: nn.Module, mesh: DeviceMesh) -> dict[ParamName, Entry]:
    """The Entries of the parameters that this library has split already, by their names
    of now.

    Raises ValueError where nothing has changed since, or where modules are shared with
    another model that was split.
    """
    # One of the hooks for each split that there was: of the model, or of parts of it.
    splits: dict[int, Any] = {}
    for module in modules(model):
        hooks = hooks_on(module)
        if hooks is not None and hooks.context.paths is not None:
            splits[id(hooks.context)] = hooks
    params = dict(named_parameters(model))
    ours = {
        n: p
        for n, p in params.items()
        if isinstance(p, DTensor) and p.device_mesh == mesh
    }
    contexts = [hooks.context for hooks in splits.values()]
    for context in contexts:
        _check_shared(model, context)
    all_split = len(contexts) == 1 and len(ours) == len(params)
    if all_split and not changed_modules(model, contexts[0]):
        raise ValueError(
            "the model was split already, and not changed since: apply tensor"
            " parallelism once"
        )
    for module in modules(model):
        vars(module).pop(PASSED, None)
    entries = _entries_by_id(splits.values())
    return {
        n: replace(entries[id(p)], name=n) for n, p in ours.items() if id(p) in entries
    }


def _entries_by_id(splits: Collection[Any]) -> dict[int, Entry]:
    """id of a parameter -> its Entry in the plan by which it was split."""
    return {
        id(module._parameters.get(attr)): hooks.context.paths.plan[name]
        for hooks in splits
        for name, places in hooks.owners.items()
        for module, attr in places
    }


def _check_shared(model: nn.Module, context: Context) -> None:
    """Refuse to split a module again as a part of a model that neither holds the one it
    was split in nor is a part of it: its hooks can serve one of them."""
    root = context.paths.root and context.paths.root()
    if root is None or root is model:
        return
    mine, theirs = {m: path for path, m in named_modules(model)}, set(modules(root))
    shared = [path for m, path in mine.items() if m in theirs]
    if root not in mine and model not in theirs and shared:
        raise ValueError(
            f"{shared[0]}: expected modules of one model, found one that is a part of a"
            f" {type(root).__name__} too, which was split before: make one module that"
            f" holds it and this {type(model).__name__}, split that, and call its parts"
        )
