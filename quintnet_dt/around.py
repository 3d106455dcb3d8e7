"""What may be around a call of a split model: modes and hooks of tools that watch it,
and functional transforms."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch.autograd.forward_ad import unpack_dual
from torch.distributed.tensor import Replicate

from .keys import ModulePath
from .private import forward_mode, global_hooks, is_any_true, modes_aside, transform
from .utils import Quietly, tensors

_NOTHING = contextlib.nullcontext()
_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def undisturbed(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Of a function that computes beside the model: no mode that is on around the call
    sees it (one that counts operators or collectives, a selective checkpoint, the meta
    device as the default). Nor is it in inference mode, in which operators are seen as
    they are called (linear, reshape), and not the ones that they are made of."""

    @functools.wraps(function)
    def run(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        with (
            modes_aside(),
            (
                torch.inference_mode(False)
                if torch.is_inference_mode_enabled()
                else _NOTHING
            ),
        ):
            return function(*args, **kwargs)

    return run


def let_anomalies_be_found() -> None:
    """torch.autograd.detect_anomaly asks whether any element of a gradient is NaN, for
    which a DTensor has no rule: it is asked of the whole gradient, so that all ranks
    find the same."""
    if torch.is_anomaly_check_nan_enabled():
        _rule_of_any_true()


@functools.cache
def _rule_of_any_true():
    from torch.distributed.tensor.experimental import (  # which imports much
        register_sharding,
    )

    if is_any_true is not None:
        register_sharding(is_any_true)(lambda x: [([Replicate()], [Replicate()])])


def is_tools(hook: Any) -> bool:
    """Whether a hook for every module is that of a tool of torch's, which watches and
    changes nothing."""
    return str(getattr(hook, "__module__", "")).startswith("torch.")


def quieten_tools() -> None:
    """The hooks that torch's tools put on every module compute beside the model: their
    calls are not the model's."""
    for hooks in filter(None, global_hooks()):
        hooks.update(
            {key: Quietly(hook) for key, hook in hooks.items() if is_tools(hook)}
        )


@contextlib.contextmanager
def tools_aside() -> Iterator[None]:
    """For a while, the hooks that torch's tools put on every module are off."""
    kept = [(hooks, dict(hooks)) for hooks in global_hooks()]
    for hooks, all_hooks in kept:
        for key in [
            key
            for key, hook in all_hooks.items()
            if is_tools(getattr(hook, "hook", hook))
        ]:
            del hooks[key]
    try:
        yield
    finally:
        for hooks, all_hooks in kept:
            hooks.clear()
            hooks.update(all_hooks)


NAMES = {
    "grad": "torch.func.grad (or vjp, jacrev, hessian)",
    "jvp": "torch.func.jvp (or jacfwd, hessian)",
}


def look_around(path: ModulePath, args: tuple, kwargs: dict) -> None:
    """Before a call of a split model, or of a part of it: come to terms with what is
    around it, or raise RuntimeError."""
    refuse_transforms(path, args, kwargs)
    quieten_tools()
    let_anomalies_be_found()


def refuse_transforms(path: ModulePath, args: tuple, kwargs: dict) -> None:
    """Raise RuntimeError where a functional transform, or forward-mode differentiation,
    is around a call."""
    found = transform()
    if found is None and forward_mode():
        dual = any(
            unpack_dual(t).tangent is not None for _, t in tensors((args, kwargs))
        )
        found = "forward_ad" if dual else None
    if found is None:
        return
    name = NAMES.get(
        found, f"torch.{'autograd' if found == 'forward_ad' else 'func'}.{found}"
    )
    raise RuntimeError(
        f"{path or 'the model'}: expected a plain call of a model that is split, found"
        f" it called within {name}, which cannot differentiate or batch the collectives"
        " between ranks: use torch.autograd (backward, grad, functional.jvp,"
        " functional.vhp) around the model, or apply the transform inside the forward"
        " of a module that holds it, before that module is split"
    )
