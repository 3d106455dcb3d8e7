"""The private names of torch that the library cannot do without, each with its reason."""

import contextlib
import logging
import sys

import torch

# One fake forward gives every shape with no memory and no arithmetic; torch has no public way to it.
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode, unset_fake_temporarily  # noqa: F401

# `replicate` over dp is FSDP2 with a state of its own, which has no public way to it.
try:
    from torch.distributed import _composable_state
except ImportError:  # then its mixed precision is not seen while calls are planned
    _composable_state = None
from torch.distributed.fsdp import fully_shard

# A dim that holds k fused pieces, each sharded ([q | k | v]): DTensor knows it, under a private name.
from torch.distributed.tensor.placement_types import _StridedShard  # noqa: F401

# Before it, DTensor cannot gather a _StridedShard of a 1-D mesh, and compiled collectives lose what they write.
SINCE_2_13 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)

try:  # how DTensor runs fused Adam on lists of tensors, each as it is placed; it forgot fused SGD
    from torch.distributed.tensor._ops._pointwise_ops import _register_single_dim_pointwise
except ImportError:  # before 2.13: SGD(fused=True) raises
    pass
else:
    for _op in (torch.ops.aten._fused_sgd_.default, torch.ops.aten._fused_sgd_.tensor_lr):
        _register_single_dim_pointwise(_op)

# Every operator of a forward as it is dispatched: documented, and used by many, under this name.
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: F401

# The softmax within F.scaled_dot_product_attention: a row of which every element is masked gives zeros.
safe_softmax = torch.ops.aten._safe_softmax


@contextlib.contextmanager
def hidden_fakes():
    """Model code that asks whether a tensor is a FakeTensor is told no, and `x.tolist()` is one call, as of any tensor.

    transformers builds other attention masks when it believes that it is exported; the path to record is the one of a
    plain call.
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


def fsdp_state(module):
    """The state of a module that FSDP2, or `replicate`, which is made of it, manages; None where it cannot be found."""
    return fully_shard.state(module) or getattr(_composable_state, "_get_module_state", lambda m: None)(module)


DDP_SPEC = "_st_info"  # where DistributedDataParallel(device_mesh=...) notes of what a parameter is the local tensor


def compute_dtype(state):
    """The dtype that FSDP2 computes in, of a module's FSDP state, which alone has it; None for the parameters'."""
    return getattr(getattr(state, "_mp_policy", None), "param_dtype", None)


def compiling(context):
    """Whether torch.compile is tracing this; never where a model is planned."""
    return torch.compiler.is_compiling() and context.mesh is not None


def top_not_compiled(function):
    """torch.compile inlines calls of a function, but compiles none by itself, as it would the hooks of its module."""
    frames = torch._C._dynamo.eval_frame
    frames.set_code_exec_strategy(
        function.__code__, frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
    )
    return function


@top_not_compiled
def within_compiled():
    """Whether this is Python code that runs as it is in a function given to torch.compile, and not its graph."""
    return torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None


@top_not_compiled
def not_compiled(function, *args, **kwargs):
    """Call a function as it is within one given to torch.compile. torch.compiler.disable makes another, and imports
    much."""
    was = torch._C._dynamo.eval_frame.set_eval_frame(None)
    try:
        return function(*args, **kwargs)
    finally:
        torch._C._dynamo.eval_frame.set_eval_frame(was)


def at_end_of_backward(function):
    """Call a function when the backward that runs has ended, as torch's own DDP and FSDP2 do: there is no public
    way."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def in_backward():
    """Whether autograd is running a backward in this thread; torch has no public way to ask."""
    return torch._C._current_graph_task_id() != -1


@contextlib.contextmanager
def as_compiled(compiled):
    """Model code that asks whether torch.compile is tracing it is told yes; torch has no public way to say so."""
    was, ask = torch.compiler._is_compiling_flag, torch.compiler.is_dynamo_compiling
    if compiled:
        torch.compiler._is_compiling_flag, torch.compiler.is_dynamo_compiling = True, lambda: True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag, torch.compiler.is_dynamo_compiling = was, ask


def constant(function):
    """torch.compiler.assume_constant_result, which would import torch._dynamo (0.6 s) for all."""
    function._dynamo_marked_constant = True
    return function


def hooks_of_all_modules():
    """The hooks that run on every module of the process: torch has no public way to see them."""
    names = "_global_forward_pre_hooks _global_forward_hooks _global_backward_pre_hooks _global_backward_hooks".split()
    return [hook for name in names for hook in getattr(torch.nn.modules.module, name, {}).values()]


def share_hooks(old, new):
    """The hooks on one parameter's gradient become another's, with the handles that their user has: torch has no public
    way to either."""
    for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if getattr(old, name, None):
            setattr(new, name, getattr(old, name))


def broadcasts_state():
    """Whether the caller is torch's set_model_state_dict(broadcast_from_rank0=True), which fills `_StridedShard`
    parameters wrongly and tells nobody."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_load_model_state_dict":
        frame = frame.f_back
    return frame is not None and getattr(frame.f_locals.get("info"), "broadcast_from_rank0", False)
