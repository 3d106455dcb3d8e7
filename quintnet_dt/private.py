"""The private names of torch that the library cannot do without, each with its reason.

A release of torch that lacks one costs what needs it, told when it is used, and not the import.
Nothing of torch is changed by importing this.
"""

import contextlib
import inspect
import logging
import sys
import threading

import torch


def _absent(name):
    """What stands for a name that this release of torch lacks."""

    class Absent:
        def __init__(self, *args, **kwargs):
            raise RuntimeError(
                f"expected {name}, which torch {torch.__version__} does not have: this version of"
                " quintnet_dt needs another release of torch for what was asked of it"
            )

    return Absent


# one fake forward gives every shape with no memory and no arithmetic; torch has no public way to it
try:
    from torch._subclasses.fake_tensor import (
        FakeCopyMode,
        FakeTensor,
        FakeTensorMode,
        unset_fake_temporarily,
    )
except ImportError:
    FakeCopyMode, FakeTensor, FakeTensorMode, unset_fake_temporarily = [
        _absent("torch._subclasses.fake_tensor")
    ] * 4

# a dim that holds k fused pieces, each sharded ([q | k | v]): DTensor knows it, under a private
# name
try:
    from torch.distributed.tensor.placement_types import _StridedShard
except ImportError:
    _StridedShard = _absent("torch.distributed.tensor.placement_types._StridedShard")

# every operator of a forward as it is dispatched: documented, and used by many, under this name
try:
    from torch.utils._python_dispatch import TorchDispatchMode
except ImportError:
    TorchDispatchMode = _absent("torch.utils._python_dispatch.TorchDispatchMode")

# the softmax within F.scaled_dot_product_attention: a row of which every element is masked gives
# zeros
try:
    safe_softmax = torch.ops.aten._safe_softmax
except AttributeError:
    safe_softmax = _absent("torch.ops.aten._safe_softmax")

try:  # what the two functions on compiled code below ask
    eval_frame_callback = torch._C._dynamo.eval_frame.get_eval_frame_callback
except AttributeError:
    eval_frame_callback = None

# ends a forward that is recomputed as soon as its backward has all that it needs, within a call
try:
    from torch.utils.checkpoint import _StopRecomputationError as RecomputationEnds
except ImportError:
    RecomputationEnds = ()  # nothing is caught

try:
    graph_task_id = torch._C._current_graph_task_id
except AttributeError:
    graph_task_id = _absent("torch._C._current_graph_task_id")

# `replicate` over dp is FSDP2 with a state of its own, which has no public way to it.
try:
    from torch.distributed import _composable_state
except ImportError:  # then its mixed precision is not seen while calls are planned
    _composable_state = None


# Before it, DTensor cannot gather a _StridedShard of a 1-D mesh, and compiled collectives lose what
# they write.
SINCE_2_13 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


# the stacks of modes, and of functional transforms: torch has no public way to leave one for a
# while
try:
    from torch.overrides import _len_torch_function_stack
    from torch.overrides import _pop_mode as _pop_function_mode
    from torch.overrides import _push_mode as _push_function_mode
    from torch.utils._python_dispatch import _len_torch_dispatch_stack
    from torch.utils._python_dispatch import _pop_mode as _pop_dispatch_mode
    from torch.utils._python_dispatch import _push_mode as _push_dispatch_mode
except ImportError:  # a first call under a tool that counts is counted with its planning
    _len_torch_function_stack = _len_torch_dispatch_stack = int
    _pop_function_mode = _push_function_mode = _pop_dispatch_mode = _push_dispatch_mode = None
try:
    from torch._C._functorch import (
        peek_interpreter_stack,
        pop_dynamic_layer_stack,
        push_dynamic_layer_stack,
    )
except ImportError:  # functional transforms of a split model raise what torch raises

    def peek_interpreter_stack():
        return None


# operators that are given functions (torch.cond, flex_attention): torch knows them under this name
# alone
try:
    from torch._ops import HigherOrderOperator
except ImportError:

    class HigherOrderOperator:
        """None is known."""


# What torch.autograd.detect_anomaly asks of gradients.
is_any_true = getattr(torch.ops.aten, "_is_any_true", None) and torch.ops.aten._is_any_true.default


@contextlib.contextmanager
def hidden_fakes():
    """Model code that asks whether a tensor is a FakeTensor is told no, and `x.tolist()` is one
    call, as of any tensor.

    transformers builds other attention masks when it believes that it is exported; the path to
    record is the one of a plain call.
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
def silent_fakes():
    """A size that does not fit is expected here, and tried again: torch's log of it as an error
    would only alarm."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was


@contextlib.contextmanager
def modes_aside():
    """The modes that are on, of torch functions and of operators, are off for a while; a default
    device stays, but for the meta device, on which nothing is computed."""
    functions, operators = _len_torch_function_stack(), _len_torch_dispatch_stack()
    if not functions and not operators:
        yield
        return
    device = torch.get_default_device()
    computes = device.type not in ("cpu", "meta")
    functions = [_pop_function_mode() for _ in range(functions)]
    operators = [_pop_dispatch_mode() for _ in range(operators)]
    try:
        with device if computes else contextlib.nullcontext():
            yield
    finally:
        for mode in reversed(operators):
            _push_dispatch_mode(mode)
        for mode in reversed(functions):
            _push_function_mode(mode)


def transform():
    """The innermost functional transform that is at work, as torch.func names its kinds; None where
    none is."""
    if (interpreter := peek_interpreter_stack()) is not None:
        return interpreter.key().name.lower()
    return None


def forward_mode():
    """Whether forward-mode differentiation is on (torch.autograd.forward_ad)."""
    return getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0


class transforms_aside:
    """What runs inside is no part of the functional transforms that are at work."""

    def __enter__(self):
        self.left = []
        while not torch.compiler.is_compiling() and peek_interpreter_stack() is not None:
            self.left.append(pop_dynamic_layer_stack())

    def __exit__(self, *_):
        while self.left:
            push_dynamic_layer_stack(self.left.pop())


def global_hooks():
    """The hooks that run for every module, in the dicts that torch keeps them in: it has no public
    way to see them."""
    names = (
        "_global_forward_pre_hooks _global_forward_hooks _global_backward_pre_hooks"
        " _global_backward_hooks".split()
    )
    return [getattr(torch.nn.modules.module, name, {}) for name in names]


def saves_by_hooks():
    """Whether hooks for saved tensors are on, say a checkpoint's; as if they were where torch
    cannot tell."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None


def fsdp_state(module):
    """The state of a module that FSDP2, or `replicate`, which is made of it, manages; None where it
    cannot be found."""
    from torch.distributed.fsdp import fully_shard

    return fully_shard.state(module) or getattr(
        _composable_state, "_get_module_state", lambda m: None
    )(module)


# where DistributedDataParallel(device_mesh=...) notes of what a parameter is the local tensor
DDP_SPEC = "_st_info"


def compute_dtype(state):
    """The dtype that FSDP2 computes in, of a module's FSDP state, which alone has it; None for the
    parameters'."""
    return getattr(getattr(state, "_mp_policy", None), "param_dtype", None)


def compiling(context):
    """Whether torch.compile is tracing this; never where a model is planned."""
    return torch.compiler.is_compiling() and context.mesh is not None


def top_not_compiled(function):
    """torch.compile inlines calls of a function, but compiles none by itself, as it would the hooks
    of its module."""
    try:
        frames = torch._C._dynamo.eval_frame
        skipped = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
        frames.set_code_exec_strategy(function.__code__, skipped)
    except (AttributeError, TypeError):  # it is compiled too: slower
        pass
    return function


@top_not_compiled
def within_compiled():
    """Whether this is Python code that runs as it is in a function given to torch.compile, and not
    its graph."""
    return eval_frame_callback is not None and eval_frame_callback() is not None


@top_not_compiled
def not_compiled(function, *args, **kwargs):
    """Call a function as it is within one given to torch.compile. torch.compiler.disable makes
    another, and imports much."""
    was = torch._C._dynamo.eval_frame.set_eval_frame(None)
    try:
        return function(*args, **kwargs)
    finally:
        torch._C._dynamo.eval_frame.set_eval_frame(was)


def at_end_of_backward(function):
    """Call a function when the backward that runs has ended, as torch's own DDP and FSDP2 do: there
    is no public way."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def in_backward():
    """Whether autograd is running a backward in this thread; torch has no public way to ask."""
    return graph_task_id() != -1


_asked = threading.RLock()  # a flag of torch's is one for all threads


@contextlib.contextmanager
def as_compiled(compiled):
    """Model code that asks whether torch.compile is tracing it is told yes; torch has no public way
    to say so."""
    if not compiled:
        yield
        return
    with _asked:
        was, ask = torch.compiler._is_compiling_flag, torch.compiler.is_dynamo_compiling
        torch.compiler._is_compiling_flag, torch.compiler.is_dynamo_compiling = True, lambda: True
        try:
            yield
        finally:
            torch.compiler._is_compiling_flag, torch.compiler.is_dynamo_compiling = was, ask


def constant(function):
    """torch.compiler.assume_constant_result, which would import torch._dynamo (0.6 s) for all."""
    function._dynamo_marked_constant = True
    return function


def has_hooks(tensor):
    """Whether hooks run on a tensor's gradient."""
    return bool(getattr(tensor, "_backward_hooks", None))


def as_parameter(tensor):
    """A tensor that `isinstance(tensor, nn.Parameter)` holds of, as of what it stands for."""
    if isinstance(tensor, torch.nn.Parameter):
        return tensor
    if not tensor.requires_grad:  # it may be what a DTensor holds
        tensor = tensor.detach()
    tensor._is_param = True
    return tensor


def share_hooks(old, new):
    """The hooks on one parameter's gradient become another's, with the handles that their user has:
    torch has no public way to either."""
    for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if getattr(old, name, None):
            setattr(new, name, getattr(old, name))


def broadcasting():
    """Whether torch's set_model_state_dict or set_state_dict runs in this thread with
    broadcast_from_rank0=True. It is told by the public functions' own code and their public
    argument; what they call is not looked at."""
    from torch.distributed.checkpoint import state_dict

    setters = {
        inspect.unwrap(f).__code__
        for f in (state_dict.set_model_state_dict, state_dict.set_state_dict)
    }
    frame = sys._getframe(1)
    while frame is not None and frame.f_code not in setters:
        frame = frame.f_back
    options = None if frame is None else frame.f_locals.get("options")
    return getattr(options, "broadcast_from_rank0", False)
