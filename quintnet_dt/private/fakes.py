"""Fake tensors: a forward on them gives every shape with no memory and no
arithmetic."""

import contextlib
import logging
from collections.abc import Iterator

import torch

from .absent import absent

try:
    from torch._subclasses.fake_tensor import (
        FakeCopyMode,
        FakeTensor,
        FakeTensorMode,
        unset_fake_temporarily,
    )
except ImportError:
    FakeCopyMode = FakeTensor = FakeTensorMode = absent("torch._subclasses.fake_tensor")
    unset_fake_temporarily = FakeTensor


@contextlib.contextmanager
def hidden_fakes() -> Iterator[None]:
    """Model code that asks whether a tensor is a FakeTensor is told no, and
    `x.tolist()` is one call, as of any tensor.

    transformers builds other attention masks when it believes that it is exported; the
    path to record is the one of a plain call.
    """
    namespace, tolist = torch._subclasses, FakeTensor.tolist
    namespace.FakeTensor = type("FakeTensor", (), {})
    FakeTensor.tolist = lambda x: torch.overrides.handle_torch_function(
        torch.Tensor.tolist, (x,), x
    )
    try:
        yield
    finally:
        namespace.FakeTensor, FakeTensor.tolist = FakeTensor, tolist


@contextlib.contextmanager
def silent_fakes() -> Iterator[None]:
    """A size that does not fit is expected here, and tried again: torch's log of it as
    an error would only alarm."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was
