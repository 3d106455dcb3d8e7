"""A model's forward, recorded: one run on a ghost of the model gives the Graph that all else is inferred from.

The ghost is a deep copy whose parameters and buffers are fake tensors, so nothing is allocated or computed and the
user's model, its buffers and its random state stay untouched. Two levels are recorded at once: *calls*, the torch
functions that Python code called (`F.linear`, `x.view`), which are what can be intercepted later; and *nodes*, the ATen
operators inside them, few and regular, which are what the axis rules read.
"""

import contextlib
import sys
import threading
from functools import partial
from types import NoneType

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from ..around import tools_aside
from ..private import (
    FakeTensor,
    FakeTensorMode,
    HigherOrderOperator,
    TorchDispatchMode,
    hidden_fakes,
    saves_by_hooks,
    silent_fakes,
    transform,
    unset_fake_temporarily,
)
from ..utils import call_name, callers, held, is_float, replace, shard_kept, source_line, tensors
from .attributes import attributes, changed
from .caches import forgotten
from .composites import restated
from .escapes import let_go
from .ghost import (
    SplitWithin,
    StrayParameter,
    fake_inputs,
    ghost,
    passed,
    put_last,
    real_inputs,
    user_hooks,
    user_hooks_of_all,
)
from .graph import Call, Graph, ModuleCall, Node, Value
from .higher import HigherOrder, higher_order
from .known import Known
from .operators import aliased, draws, reads_values, written_by

UNSEEN = {"tolist", "numpy"}  # these read values with no operator

# Forwards that make the same calls each time, so that nothing need watch them.
STEADY = {
    c.forward
    for c in (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
    + (nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Identity, nn.Dropout, nn.Softmax, nn.Sequential, nn.Bilinear)
}

# Why a call must get whole tensors.
OPAQUE = "it reads tensors or gradients in ways that operators do not show (an autograd.Function, a hook, torch.vmap)"
HIDDEN = "its operators are not called by Python code that can be intercepted (TorchScript, torch.vmap)"


class UnknownValues(RuntimeError):
    """A forward reads values that depend on parameters, which a model on the meta device does not have."""

    def __init__(self, call):
        super().__init__(
            f"expected a forward that reads no values of its parameters, since the model is on "
            f"the meta device and has none; found that it does: {call}"
        )


def trace(model, args=(), kwargs=None, *, device=None, any_rank=bool):
    """Run the model's forward once on a ghost and record it.

    Args: model, whole (its parameters have their whole shapes); `args`, `kwargs`: example inputs; `device`: where a
    model on the meta device is imagined to be; `any_rank`: of a model that is split, tells whether what is so here is
    so on any rank, since real parameters are gathered by all ranks or none. Returns: Graph.

    What a forward reads of values that follow from its inputs alone (is there padding?) is known. One that reads values
    which depend on parameters (which expert is hit?), or asks what a fake tensor cannot answer, is run again on the
    parameters themselves.
    """
    kwargs = kwargs or {}
    graph, *alive = _on_fakes(model, args, kwargs, device)  # the copies, so that what they keep is found
    if any_rank(graph is None):
        alive = ghost(model, device=device), real_inputs(args, kwargs)
        graph = record(alive[0], *alive[1])
    read = {id(v.tensor) for v in graph.values}  # of the model itself, not of its copy
    if stray := [name for name, p in model.named_parameters() if id(p) in read]:
        raise StrayParameter(stray)
    let_go_of_graph(graph)
    return graph


def _on_fakes(model, args, kwargs, device):
    """The Graph of a forward on fake tensors, and the copies that it ran on; None where it must run on real ones."""
    fake_mode, recorder = FakeTensorMode(allow_non_fake_inputs=True), Recorder()
    compiles = "torch._dynamo" in sys.modules
    try:
        copied = ghost(model, fake_mode, device=device)
        fakes = fake_inputs(fake_mode, args, kwargs, recorder.known)
        return record(copied, *fakes, modes=[fake_mode], recorder=recorder), copied, fakes
    except (StrayParameter, SplitWithin):
        raise
    except Exception as e:
        on_meta = any(p.device.type == "meta" for p in model.parameters())
        shards = any(shard_kept(holder, place) is not None for _, holder, place, _ in held((args, kwargs)))
        again = not compiles and "torch._dynamo" in sys.modules  # `record` knows now that it must not compile
        if not again and on_meta and recorder.asked is not None:
            raise UnknownValues(recorder.asked) from e
        if not again and (on_meta or shards):
            raise
    return _on_fakes(model, args, kwargs, device) if again else (None, None, None)


def let_go_of_graph(graph):
    """A Graph keeps no tensors; the values that something else keeps are noted as stored."""
    given = {id(v.tensor) for v in graph.values if v.producer is None} | {id(v.tensor) for _, _, v in graph.held if v}
    made = [v for v in graph.values if id(v.tensor) not in given]
    tensors = [v.tensor for v in made]
    for v in graph.values:
        v.tensor = None
    graph.stored += [made[i] for i in let_go(tensors)]


class _Tracing(threading.local):
    """Whether this thread runs a forward to record it."""

    depth = 0

    def __enter__(self):
        self.depth += 1

    def __exit__(self, *_):
        self.depth -= 1


tracing = _Tracing()
# The random state, a patch of torch's and the caches of model code are one for all threads. Nothing is communicated in
# it, so that ranks whose threads come in another order do not wait for each other.
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
        if "torch._dynamo" in sys.modules:  # what a forward compiles is recorded as it was written
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        modes = tools_aside(), hidden_fakes(), silent_fakes(), *modes, _Nodes(recorder), _Calls(recorder)
        for mode in modes:
            stack.enter_context(mode)
        recorder.give((args, kwargs))
        out = model(*args, **kwargs)
    recorder.keep(model, (args, kwargs, out))
    recorder.end()
    return recorder.graph


class Recorder:
    """Builds a Graph. Subclasses watch or steer single calls through `run_call`."""

    def __init__(self):
        self.graph = Graph([], [], [], {})
        self._values = {}  # id(tensor) -> its present Value
        self._stack = []  # module calls that are running
        self._call = None
        self.fake = False
        self.known = Known()
        self.asked = None  # the last call that read values which do not follow from the inputs

    @property
    def paused(self):
        """Whether what runs now is not the model's own computation."""
        return False

    def attach(self, model):
        """Hooks that tell when each module starts and ends; parameters get their names."""
        self.before = attributes(model)
        for path, module in model.named_modules():
            for name, p in module.named_parameters(path, recurse=False):
                if id(p) not in self._values:
                    v = self.graph.params[name] = self.value(p)
                    v.param, v.trainable = name, is_float(v)
            if passed(module):
                continue
            steady = type(module).forward in STEADY
            seen = user_hooks(module).keys() - vars(module).get("_tp_later", [])
            watched = bool(seen or user_hooks_of_all())
            module.register_forward_pre_hook(partial(self.enter, path, steady, watched), with_kwargs=True, prepend=True)
            module.register_forward_hook(self.leave, with_kwargs=True, always_call=True)
            put_last(module)

    def give(self, inputs):
        """Note the shards that objects among the inputs keep."""
        for _, holder, place, t in held(inputs):
            if (action := shard_kept(holder, place)) is not None:
                self.graph.given[self.value(t).id] = action

    def keep(self, model, objects):
        """Note the values that the forward left in buffers, in attributes, and in objects among its inputs and
        outputs."""
        inside = [x for m in model.modules() for x in [*m._buffers.values(), *vars(m).values()]]
        values = [self._values.get(id(t)) for _, t in tensors(inside)]
        self.graph.stored = [v for v in values if v is not None and v.producer is not None]
        self.graph.changes = changed(self.before, attributes(model))
        self.graph.held = [(path, place, self._values.get(id(t))) for path, _, place, t in held(objects)]

    def end(self):
        """The forward is over: only the graph is left."""
        for v in self.graph.values:
            v.differentiable = v.tensor.requires_grad
        self._values, self.known = {}, Known()

    def value(self, tensor, producer=None, new=False):
        if new or id(tensor) not in self._values:
            v = Value(len(self.graph.values), tensor, producer)
            if new and id(tensor) in self._values:
                v.param = self._values[id(tensor)].param
            self.graph.values.append(v)  # keeps the tensor alive: ids stay unique
            self._values[id(tensor)] = v
        return self._values[id(tensor)]

    def values(self, obj):
        return {p: self.value(t) for p, t in tensors(obj)}

    def enter(self, path, steady, watched, module, args, kwargs):
        if self._call is not None and isinstance(self._call.func, HigherOrder):
            raise RuntimeError(
                f"{path}: expected a forward that calls its modules itself, found one called within {self._call}, "
                "which compiles what it is given: choose between modules by a Python if"
            )
        parent = self._stack[-1] if self._stack else None
        given, checkpoints = self.values((args, kwargs)), callers()[1]
        call = ModuleCall(path, parent, given, {}, steady, watched, checkpoints, module.training, settings_of(module))
        if parent is None:
            for v in call.inputs.values():
                v.trainable = is_float(v)
        self.graph.modules.append(call)
        self._stack.append(call)

    def leave(self, module, args, kwargs, output):
        self._stack.pop().outputs = self.values(output)

    def run_call(self, name, func, args, kwargs):
        inputs = self.values((args, kwargs))
        given = replace((args, kwargs), inputs)
        call = Call(len(self.graph.calls), func, name, self._stack[-1], given, inputs, source=source_line())
        sets = getattr(func, "__name__", "") == "__set__"  # x.data = y
        custom, call.checkpoints = callers()
        unseen = sets or custom or name in ("register_hook", "retain_grad") or transform() is not None
        call.opaque = OPAQUE if unseen else ""
        self._call = call
        try:
            out = self.read(func, *args) if name in UNSEEN else func(*args, **kwargs)
        finally:
            self._call = None
        written = [call.inputs[0, 0]] if sets else [v for n in call.nodes for v in n.inputs if v.id in n.mutated]
        if sets and call.inputs[0, 0].param:  # the parameter is another value from here on
            self.value(args[0], call.index, new=True).trainable = call.inputs[0, 0].trainable
        self.graph.rewritten |= {v.memory.param or v.param for v in written} - {None}
        if self.graph.rewritten and not self.fake:
            raise RuntimeError(
                f"{call}: expected a forward that reads values to leave {sorted(self.graph.rewritten)} as they are: it "
                "is traced on the parameters themselves"
            )
        self.graph.calls.append(call)
        known = {v.id for v in (*call.inputs.values(), *(v for n in call.nodes for v in n.outputs))}
        reads = (v for n in call.nodes for v in n.inputs if v.param or v.producer is not None)
        if hidden := {("hidden", v.id): v for v in reads if v.id not in known}:  # through torch.vmap, autograd.grad
            call.inputs |= hidden
            call.opaque = OPAQUE
        call.outputs = {p: self.value(t, producer=call.index) for p, t in tensors(out)}
        return out

    def hidden_call(self, func):
        """The Call for an operator that none has called which a mode sees: one for all that follow each other."""
        calls, run, higher = self.graph.calls, self._stack[-1], isinstance(func, HigherOrder)
        last = calls[-1] if calls and calls[-1].hidden else None
        if last is None or last.module is not run or higher or last.func is not None:
            name = func.operator.name() if higher else "hidden operators"
            made = Call(len(calls), func if higher else None, name, run, ((), {}), {}, source=source_line())
            made.opaque, made.hidden = HIDDEN, True
            calls.append(made)
        return calls[-1]

    def read(self, func, x, *args):
        """A call that reads values with no operator: `x.tolist()`."""
        real = self.known.get(id(x)) if isinstance(x, FakeTensor) else x
        if real is None:
            self.asked = self._call
            raise RuntimeError("a fake tensor has no values to read")
        with unset_fake_temporarily():
            out = func(real, *args)
        self.note_reading(out, self.fake and not self.known.random({(): x}))
        return out

    def compute(self, func, args, kwargs):
        """Run one operator."""
        name = func._schema.name
        if name == "aten::_grouped_mm" and isinstance(args[0], FakeTensor):
            x, w, *rest = args  # its shape function knows bfloat16 alone, and what that aligns to 16 bytes
            aligned = all(s == 1 or s * x.dtype.itemsize % 16 == 0 for s in x.stride() + w.stride())
            if aligned and (x.dim(), w.dim()) == (2, 3):
                return x.new_empty(x.shape[0], w.shape[-1])
            return func(x.bfloat16(), w.bfloat16(), *rest, **kwargs).to(x.dtype)
        return func(*args, **kwargs)

    def know(self, func, args, kwargs, given, written):
        """Run one operator on the tensors `given`; on the real ones behind fake ones too, where those are known."""
        reads = reads_values(func, args)
        real = self.known.run(func, args, kwargs, given, written) if self.fake else None
        if reads and real is None:
            self.asked = self._call
        if reads and real is not None:
            out = real
            if isinstance(real, torch.Tensor):
                out = next(iter(given.values())).new_empty(real.shape, dtype=real.dtype)
        else:
            out = self.compute(func, args, kwargs)
        if real is not None:
            self.known.note(func, given, out, real)
        if reads:
            result = tuple(out.shape) if isinstance(out, torch.Tensor) else out
            self.note_reading(result, real is not None and not self.known.random(given))
        return out

    def note_reading(self, result, follows):
        """What was read of values; `follows`: it follows from the inputs alone."""
        at = self._call.index if self._call is not None else len(self.graph.calls)
        self.graph.readings.append((at, result, follows))

    def run_node(self, func, args, kwargs):
        if self.paused:
            return func(*args, **kwargs)
        if self._call is not None or not self._stack or not any(True for _ in tensors((args, kwargs))):
            return self.record_node(func, args, kwargs)
        self._call = call = self.hidden_call(func)
        try:
            return self.record_node(func, args, kwargs)
        finally:
            self._call = None
            for node in call.nodes[-1:]:
                call.inputs.update({("hidden", v.id): v for v in node.inputs if v.producer != call.index})
                call.outputs.update({("hidden", v.id): v for v in node.outputs if v.producer == call.index})

    def record_node(self, func, args, kwargs):
        given = dict(tensors((args, kwargs)))
        inputs = {p: self.value(t) for p, t in given.items()}
        shared = aliased(func, args)
        memory = None if shared is None else self.value(shared).memory
        margs, mkwargs = replace((args, kwargs), inputs)
        written = written_by(func, args, kwargs)
        self.graph.random |= draws(func, args, kwargs)
        out = self.know(func, args, kwargs, given, written)
        producer = self._call.index if self._call is not None else None
        old = {id(t): self.value(t).id for t in written}
        for t in written:
            before = self.value(t)
            self.value(t, producer, new=True).memory = before.memory
        known = {id(x) for x in given.values()}
        outs = [self.value(t, producer, new=id(t) not in known and id(t) in self._values) for _, t in tensors(out)]
        outs += [self.value(t) for t in written if not any(self.value(t) is o for o in outs)]
        for v in outs:
            v.trainable |= is_float(v) and any(x.trainable for x in inputs.values())
            if memory is not None:
                v.memory = memory
        if self._call is not None:
            self._call.nodes.append(Node(func, margs, mkwargs, list(inputs.values()), outs, set(old.values())))
        return out


def settings_of(module):
    """The attributes of a module that may choose what it computes, and that a user may change: flags, strings, what is
    None; of one of torch.nn its numbers too, which no forward of theirs changes."""
    plain = (bool, str, NoneType, *((int, float) if type(module).__module__.startswith("torch.nn.") else ()))
    return {name: x for name, x in vars(module).items() if type(x) in plain and name != "training"}


class _Calls(TorchFunctionMode):
    def __init__(self, recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func, types, args=(), kwargs=None):
        r, kwargs = self.recorder, kwargs or {}
        name = call_name(func) if r._stack and r._call is None and not r.paused else None
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
