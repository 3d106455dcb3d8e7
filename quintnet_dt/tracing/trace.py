"""A model's forward, recorded: one run on a ghost of the model gives the Graph that all else is inferred from.

The ghost is a deep copy whose parameters and buffers are fake tensors, so nothing is allocated or computed and the
user's model, its buffers and its random state stay untouched. Two levels are recorded at once: *calls*, the torch
functions that Python code called (`F.linear`, `x.view`), which are what can be intercepted later; and *nodes*, the ATen
operators inside them, few and regular, which are what the axis rules read.
"""

import contextlib
import gc
from functools import cache, partial
from types import CellType

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from ..private import FakeTensor, FakeTensorMode, TorchDispatchMode, hidden_fakes, silent_fakes, unset_fake_temporarily
from ..utils import call_name, callers, held, is_float, replace, shard_kept, source_line, tensors
from .caches import forgotten
from .composites import restated
from .escapes import let_go
from .ghost import StrayParameter, fake_inputs, ghost, passed, put_last, real_inputs, user_hooks, user_hooks_of_all
from .graph import Call, Graph, ModuleCall, Node, Value

# What a forward may read of its values: on fake tensors these have no answer.
READS_VALUES = (
    "aten::_local_scalar_dense aten::nonzero aten::nonzero_static aten::unique_dim aten::_unique2 "
    "aten::unique_consecutive "
    "aten::masked_select aten::bincount aten::equal aten::is_nonzero aten::repeat_interleave"
).split()

UNSEEN = {"tolist", "numpy"}  # these read values with no operator

# Forwards that make the same calls each time, so that nothing need watch them.
STEADY = {
    c.forward
    for c in (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
    + (nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Identity, nn.Dropout, nn.Softmax, nn.Sequential, nn.Bilinear)
}

BATCH_NORMS = {"aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm"}

# Why a call must get whole tensors.
OPAQUE = "it reads tensors or gradients in ways that operators do not show (an autograd.Function, a hook, torch.vmap)"

# Elements up to which a tensor that follows from the inputs alone is kept: masks and positions, not activations.
KNOWN_SIZE = 1 << 16


def trace(model, args=(), kwargs=None, *, device=None):
    """Run the model's forward once on a ghost and record it.

    Args: model, whole (its parameters have their whole shapes); `args`, `kwargs`: example inputs; `device`: where a
    model on the meta device is imagined to be. Returns: Graph.

    What a forward reads of values that follow from its inputs alone (is there padding?) is known. One that reads values
    which depend on parameters (which expert is hit?), or asks what a fake tensor cannot answer, is run again on the
    parameters themselves.
    """
    kwargs = kwargs or {}
    fake_mode, recorder = FakeTensorMode(allow_non_fake_inputs=True), Recorder()
    try:
        copied = ghost(model, fake_mode, device=device)
        given = fake_inputs(fake_mode, args, kwargs, recorder.known)
        graph = record(copied, *given, modes=[fake_mode], recorder=recorder)
    except StrayParameter:
        raise
    except Exception:
        shards = any(shard_kept(holder, place) for _, holder, place, _ in held((args, kwargs)))
        if shards or any(p.device.type == "meta" for p in model.parameters()):
            raise
        copied, given = ghost(model, device=device), real_inputs(args, kwargs)
        graph = record(copied, *given)
    read = {id(v.tensor) for v in graph.values}  # of the model itself, not of its copy: through a lambda
    captured = [(name, gc.get_referrers(p)) for name, p in model.named_parameters() if id(p) in read]
    if stray := [name for name, holders in captured if any(type(x) is CellType for x in holders)]:
        raise StrayParameter(stray)
    let_go_of_graph(graph)
    return graph


def let_go_of_graph(graph):
    """A Graph keeps no tensors; the values that something else keeps are noted as stored."""
    given = {id(v.tensor) for v in graph.values if v.producer is None} | {id(v.tensor) for _, _, v in graph.held if v}
    made = [v for v in graph.values if id(v.tensor) not in given]
    tensors = [v.tensor for v in made]
    for v in graph.values:
        v.tensor = None
    graph.stored += [made[i] for i in let_go(tensors)]


def record(model, args, kwargs, modes=(), recorder=None):
    """Run `model(*args, **kwargs)` under a Recorder and return its Graph."""
    recorder = recorder or Recorder()
    recorder.fake = bool(modes)
    recorder.attach(model)
    with contextlib.ExitStack() as stack:
        gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        stack.enter_context(forgotten(model))
        stack.enter_context(torch.random.fork_rng(devices=gpus))
        torch.manual_seed(0)  # the same path on every rank
        unseen = saved_tensors_hooks(lambda t: t, lambda t: t)  # a checkpoint around us must not see ours
        modes = hidden_fakes(), silent_fakes(), unseen, *modes, _Nodes(recorder), _Calls(recorder)
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
        self.known = {}  # id of a fake tensor -> the real one, where it follows from the inputs alone

    @property
    def paused(self):
        """Whether what runs now is not the model's own computation."""
        return False

    def attach(self, model):
        """Hooks that tell when each module starts and ends; parameters get their names."""
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
        self.graph.held = [(path, place, self._values.get(id(t))) for path, _, place, t in held(objects)]

    def end(self):
        """The forward is over: only the graph is left."""
        for v in self.graph.values:
            v.differentiable = v.tensor.requires_grad
        self._values, self.known = {}, {}

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
        call.opaque = OPAQUE if sets or custom or name in ("register_hook", "retain_grad") else ""
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
                f"{call}: expected a forward that reads values to leave {sorted(self.graph.rewritten)} as they are: it is "
                "traced on the parameters themselves"
            )
        self.graph.calls.append(call)
        known = {v.id for v in (*call.inputs.values(), *(v for n in call.nodes for v in n.outputs))}
        reads = (v for n in call.nodes for v in n.inputs if v.param or v.producer is not None)
        if hidden := {("hidden", v.id): v for v in reads if v.id not in known}:  # through torch.vmap, autograd.grad
            call.inputs |= hidden
            call.opaque = OPAQUE
        call.outputs = {p: self.value(t, producer=call.index) for p, t in tensors(out)}
        return out

    def read(self, func, x, *args):
        """A call that reads values with no operator: `x.tolist()`."""
        real = self.known.get(id(x)) if isinstance(x, FakeTensor) else x
        if real is None:
            raise RuntimeError("a fake tensor has no values to read")
        with unset_fake_temporarily():
            out = func(real, *args)
        self.graph.readings.append((len(self.graph.calls), out, self.fake))
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

    def know(self, func, args, kwargs, given):
        """Run one operator on the tensors `given`; on the real ones behind fake ones too, where those are known."""
        reads = reads_values(func, args)
        real = self.run_known(func, args, kwargs, given) if self.fake else None
        if reads and real is not None:
            out = real
            if isinstance(real, torch.Tensor):
                out = next(iter(given.values())).new_empty(real.shape, dtype=real.dtype)
        else:
            out = self.compute(func, args, kwargs)
        if real is not None:
            pairs = [(a, b) for (_, a), (_, b) in zip(tensors((out,)), tensors((real,)))]
            self.known.update((id(a), b) for a, b in pairs if isinstance(a, FakeTensor) and b.numel() <= KNOWN_SIZE)
        if reads:
            result = tuple(out.shape) if isinstance(out, torch.Tensor) else out
            self.graph.readings.append((len(self.graph.calls), result, real is not None))
        return out

    def run_known(self, func, args, kwargs, given):
        """The operator's result on real tensors, None where one of them is not known."""
        real = {p: self.known.get(id(x), None if isinstance(x, FakeTensor) else x) for p, x in given.items()}
        small = all(x is not None and x.numel() <= KNOWN_SIZE and x.device.type != "meta" for x in real.values())
        if small and torch.Tag.nondeterministic_seeded not in func.tags:
            with unset_fake_temporarily():
                return func(*replace(args, _under(real, 0)), **replace(kwargs, _under(real, 1)))
        if any(id(x) in self.known for x in _written(func, args, kwargs)):
            self.known = {}  # others may share its memory
        return None

    def run_node(self, func, args, kwargs):
        if self.paused:
            return func(*args, **kwargs)
        given = dict(tensors((args, kwargs)))
        inputs = {p: self.value(t) for p, t in given.items()}
        shared = _aliased(func, args)
        memory = None if shared is None else self.value(shared).memory
        margs, mkwargs = replace((args, kwargs), inputs)
        written = _written(func, args, kwargs)
        self.graph.random |= draws(func, args, kwargs)
        out = self.know(func, args, kwargs, given)
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
    """What a module of torch.nn computes by its attributes, which a user may change: its numbers and strings."""
    if not type(module).__module__.startswith("torch.nn."):
        return {}
    plain = (int, float, str)
    return {name: x for name, x in vars(module).items() if isinstance(x, plain) and name != "training"}


def _under(changes, first):
    """The changes whose path starts with `first`, with the rest of the path."""
    return {p[1:]: x for p, x in changes.items() if p[0] == first}


def reads_values(func, args):
    """Whether the result of an ATen operator, or its shape, depends on its inputs' values."""
    if func._schema.name == "aten::index":
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return func._schema.name in READS_VALUES and "self_int" not in str(func)


def draws(func, args, kwargs):
    """Whether an ATen operator draws random numbers; attention does where it drops out."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    names = [a.name for a in func._schema.arguments]
    return "dropout_p" not in names or bool(dict(zip(names, args), **kwargs).get("dropout_p"))


@cache
def _aliases(func):
    """(position, name) of the arguments whose memory an operator's outputs share, and of those that it writes to."""
    marked = [(i, a) for i, a in enumerate(func._schema.arguments) if a.alias_info is not None]
    views = any(r.alias_info is not None for r in func._schema.returns)
    return [(i, a.name) for i, a in marked if views], [(i, a.name) for i, a in marked if a.alias_info.is_write]


def _aliased(func, args):
    """The tensor whose memory an operator's outputs share; None if they own theirs."""
    return next((args[i] for i, _ in _aliases(func)[0] if i < len(args) and isinstance(args[i], torch.Tensor)), None)


def _written(func, args, kwargs):
    """The tensors that an operator writes to."""
    found = [args[i] if i < len(args) else kwargs.get(name) for i, name in _aliases(func)[1]]
    if func._schema.name in BATCH_NORMS and args[5]:
        found += args[3:5]  # running statistics, which its schema does not tell of
    return [t for _, t in tensors(found)]


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
    def __init__(self, recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # asked several times an operator
            return args[0].device
        if func.namespace == "prim":
            return func(*args, **(kwargs or {}))
        return self.recorder.run_node(func, args, kwargs or {})
