"""A model's forward, recorded: one run on a ghost of the model gives the Graph that all
else is inferred from.

The ghost is a deep copy whose parameters and buffers are fake tensors, so nothing is
allocated or computed and the user's model, its buffers and its random state stay
untouched. Two levels are recorded at once: *calls*, the torch functions that Python
code called (`F.linear`, `x.view`), which are what can be intercepted later; and
*nodes*, the ATen operators inside them, few and regular, which are what the axis rules
read.
"""

import contextlib
import sys
import threading

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from ..around import tools_aside
from ..parts import named_parameters, parameters
from ..private import (
    FakeTensorMode,
    HigherOrderOperator,
    TorchDispatchMode,
    has_hooks,
    hidden_fakes,
    saves_by_hooks,
    silent_fakes,
)
from ..utils import STOPS, call_name, shard_kept, tensors_in_objects
from .caches import forgotten
from .composites import restated
from .escapes import let_go
from .fakes import fake_inputs, real_inputs
from .ghost import SplitWithin, StrayParameter, ghost
from .higher import higher_order
from .recorder import Recorder, TooManyCalls


class UnknownValues(RuntimeError):
    """A forward reads values that depend on parameters, which a model on the meta
    device does not have."""

    def __init__(self, call):
        super().__init__(
            "expected a forward that reads no values of its parameters, since the"
            f" model is on the meta device and has none; found that it does: {call}"
        )


def trace(model, args=(), kwargs=None, *, device=None, any_rank=bool, most_calls=None):
    """Run the model's forward once on a ghost and record it.

    Args: model, whole (its parameters have their whole shapes); `args`, `kwargs`:
    example inputs; `device`: where a model on the meta device is imagined to be;
    `any_rank`: of a model that is split, tells whether what is so here is so on any
    rank, since real parameters are gathered by all ranks or none; `most_calls`: raise
    TooManyCalls where there are more, or where it must run on the parameters themselves.
    Returns: Graph.

    What a forward reads of values that follow from its inputs alone (is there padding?)
    is known. One that reads values which depend on parameters (which expert is hit?),
    or asks what a fake tensor cannot answer, is run again on the parameters themselves.
    """
    kwargs = kwargs or {}
    # the copies, so that what they keep is found
    graph, *alive = _on_fakes(model, args, kwargs, device, most_calls)
    if graph is None and most_calls is not None:
        raise TooManyCalls("it must run on the parameters themselves")
    if any_rank(graph is None):
        alive = ghost(model, device=device), real_inputs(args, kwargs)
        graph = record(alive[0], *alive[1])
    read = {id(v.tensor) for v in graph.values}  # of the model itself, not of its copy
    if stray := [name for name, p in named_parameters(model) if id(p) in read]:
        raise StrayParameter(stray)
    _check_hooks(model, graph)
    let_go_of_graph(graph)
    return graph


def _on_fakes(model, args, kwargs, device, most_calls):
    """The Graph of a forward on fake tensors, and the copies that it ran on; None where
    it must run on real ones."""
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    recorder = Recorder(most_calls)
    compiles = "torch._dynamo" in sys.modules
    try:
        copied = ghost(model, fake_mode, device=device)
        fakes = fake_inputs(fake_mode, args, kwargs, recorder.known)
        return (
            record(copied, *fakes, modes=[fake_mode], recorder=recorder),
            copied,
            fakes,
        )
    except (StrayParameter, SplitWithin, TooManyCalls, *STOPS):
        raise
    except Exception as e:
        on_meta = any(p.device.type == "meta" for p in parameters(model))
        shards = any(
            shard_kept(holder, place) is not None
            for _, holder, place, _ in tensors_in_objects((args, kwargs))
        )
        # `record` knows now that it must not compile
        again = not compiles and "torch._dynamo" in sys.modules
        if not again and on_meta and recorder.asked is not None:
            raise UnknownValues(recorder.asked) from e
        if not again and (on_meta or shards):
            raise
    if not again:
        return None, None, None
    return _on_fakes(model, args, kwargs, device, most_calls)


def _check_hooks(model, graph):
    """Refuse hooks on the gradients of parameters in a forward that takes such
    gradients itself: they would run on the DTensor's gradient alone."""
    hooked = {name for name, p in named_parameters(model) if has_hooks(p)}
    for call in graph.calls if hooked else ():
        if call.name == "grad" and (
            taken := sorted({v.param for v in call.inputs.values()} & hooked)
        ):
            raise RuntimeError(
                f"{', '.join(taken[:5])}: expected no hook (register_hook) on a"
                " parameter whose gradient a forward takes itself, found one, and"
                f" {call}: apply in the forward what the hook does"
            )


def let_go_of_graph(graph):
    """A Graph keeps no tensors; the values that something else keeps are noted as
    stored."""
    given = {id(v.tensor) for v in graph.values if v.producer is None} | {
        id(v.tensor) for _, _, v in graph.in_objects if v
    }
    made = [v for v in graph.values if id(v.tensor) not in given]
    tensors = [v.tensor for v in made]
    for v in graph.values:
        v.tensor = None
    graph.left_in_modules += [made[i] for i in let_go(tensors)]


class _Tracing(threading.local):
    """Whether this thread runs a forward to record it."""

    depth = 0

    def __enter__(self):
        self.depth += 1

    def __exit__(self, *_):
        self.depth -= 1


tracing = _Tracing()
# The random state, a patch of torch's and the caches of model code are one for all
# threads. Nothing is communicated in it, so that ranks whose threads come in another
# order do not wait for each other.
_one_at_a_time = threading.RLock()


def record(model, args, kwargs, modes=(), recorder=None):
    """Run `model(*args, **kwargs)` under a Recorder and return its Graph."""
    recorder = recorder or Recorder()
    recorder.fake = bool(modes)
    recorder.attach(model)
    with _one_at_a_time, contextlib.ExitStack() as stack:
        stack.enter_context(tracing)
        gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        stack.enter_context(forgotten(model))
        stack.enter_context(torch.random.fork_rng(devices=gpus))
        torch.manual_seed(0)  # the same path on every rank
        if saves_by_hooks():  # a checkpoint around us must not see ours
            stack.enter_context(saved_tensors_hooks(lambda t: t, lambda t: t))
        # what a forward compiles is recorded as it was written
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        modes = (
            tools_aside(),
            hidden_fakes(),
            silent_fakes(),
            *modes,
            _Nodes(recorder),
            _Calls(recorder),
        )
        for mode in modes:
            stack.enter_context(mode)
        recorder.give((args, kwargs))
        with recorder.unwound():
            out = model(*args, **kwargs)
        recorder.returned(out)
    recorder.keep(model, (args, kwargs, out))
    recorder.end()
    return recorder.graph


class _Calls(TorchFunctionMode):
    def __init__(self, recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func, types, args=(), kwargs=None):
        r, kwargs = self.recorder, kwargs or {}
        name = (
            call_name(func) if r._stack and r._call is None and not r.paused else None
        )
        if name is None:
            return func(*args, **kwargs)
        if (inner := restated(func, args, kwargs)) is not None:
            with self:
                return inner(*args, **kwargs)
        return r.run_call(name, func, args, kwargs)


class _Nodes(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # asked several times an operator
            return args[0].device
        if isinstance(func, HigherOrderOperator):
            func = higher_order(func)
            for branch, operands in func.branches(args):  # for what they read besides
                with self:
                    branch(*operands)
        if func.namespace == "prim":
            return func(*args, **(kwargs or {}))
        return self.recorder.run_node(func, args, kwargs or {})
