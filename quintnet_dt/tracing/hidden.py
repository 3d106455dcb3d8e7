"""Calls whose operators do not tell all that they do."""

from typing import Any

UNSEEN = {"tolist", "numpy"}  # these read values with no operator


# Why a call must get whole tensors.
OPAQUE = (
    "it reads tensors or gradients in ways that operators do not show (an"
    " autograd.Function, a hook, torch.vmap)"
)


HIDDEN = (
    "its operators are not called by Python code that can be intercepted (TorchScript,"
    " torch.vmap)"
)


def sets_data(func: Any) -> bool:
    """Whether a call is `x.data = y`."""
    return getattr(func, "__name__", "") == "__set__"


def hides_gradients(name: str, func: Any) -> bool:
    """Whether a call changes what its operators show of gradients."""
    return sets_data(func) or name in ("register_hook", "retain_grad")
