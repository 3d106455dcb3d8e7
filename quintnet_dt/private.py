"""The private names of torch that the library cannot do without, each with its reason."""

import contextlib
import logging

import torch

# One fake forward gives every shape with no memory and no arithmetic; torch has no public way to it.
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode, unset_fake_temporarily  # noqa: F401

# A dim that holds k fused pieces, each sharded ([q | k | v]): DTensor knows it, under a private name.
from torch.distributed.tensor.placement_types import _StridedShard  # noqa: F401

# Every operator of a forward as it is dispatched: documented, and used by many, under this name.
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: F401

# The softmax within F.scaled_dot_product_attention: a row of which every element is masked gives zeros.
safe_softmax = torch._safe_softmax


@contextlib.contextmanager
def hidden_fakes():
    """Model code that asks whether a tensor is a FakeTensor is told no, and `x.tolist()` is one call, as of any tensor.

    transformers builds other attention masks when it believes that it is exported; the path to record is the one of a plain call.
    """
    namespace, tolist = torch._subclasses, FakeTensor.tolist
    namespace.FakeTensor = type("FakeTensor", (), {})
    FakeTensor.tolist = lambda x: torch.overrides.handle_torch_function(torch.Tensor.tolist, (x,), x)
    try:
        yield
    finally:
        namespace.FakeTensor, FakeTensor.tolist = FakeTensor, tolist


@contextlib.contextmanager
def silent_fakes():
    """A size that does not fit is expected here, and tried again: torch's log of it as an error would only alarm."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was


def compute_dtype(state):
    """The dtype that FSDP2 computes in, of a module's FSDP state; None for that of the parameters. It shows its policy nowhere else."""
    return state._mp_policy.param_dtype


def in_backward():
    """Whether autograd is running a backward in this thread; torch has no public way to ask."""
    return torch._C._current_graph_task_id() != -1
