"""What happens in one forward, written down: modules that start and end, calls,
operators, what is read of values."""

import contextlib
from functools import partial

from ..parts import modules, named_modules
from ..private import transform
from ..utils import (
    callers,
    is_float,
    replace,
    shard_kept,
    source_line,
    tensors,
    tensors_in_objects,
    within_higher_order,
)
from .attributes import attributes, changed
from .graph import Call, InObject, ModuleCall, Value
from .hidden import OPAQUE, UNSEEN, hides_gradients, sets_data
from .known import Known
from .module_settings import STEADY, settings_of
from .nodes import NodeRecorder
from .own_backward import pointwise_function
from .user_hooks import passed, put_last, user_hooks, user_hooks_of_all


class TooManyCalls(RuntimeError):
    """A forward that is traced only if that is quick is not."""


class Recorder(NodeRecorder):
    """Builds a Graph. Subclasses watch or steer single calls through `run_call`.
    `most_calls`: how many there may be."""

    def __init__(self, most_calls=None):
        super().__init__()
        self.most_calls = most_calls
        self._values = {}  # id(tensor) -> its present Value
        self._stack = []  # module calls that are running
        # the autograd.Function of the last call in one: its frame, and what was found
        self._function = None

    @property
    def paused(self):
        """Whether what runs now is not the model's own computation."""
        return False

    def attach(self, model):
        """Hooks that tell when each module starts and ends; parameters get their
        names."""
        self.before = attributes(model)
        for path, module in named_modules(model):
            for name, p in module.named_parameters(path, recurse=False):
                if id(p) not in self._values:
                    v = self.graph.params[name] = self.value(p)
                    v.param, v.trainable = name, is_float(v)
            if passed(module):
                continue
            steady = type(module).forward in STEADY
            seen = user_hooks(module).keys() - vars(module).get("_tp_later", [])
            user_hooked = bool(seen or user_hooks_of_all())
            module.register_forward_pre_hook(
                partial(self.enter, path, steady, user_hooked),
                with_kwargs=True,
                prepend=True,
            )
            leave = partial(self.leave, path)
            module.register_forward_hook(leave, with_kwargs=True, always_call=True)
            put_last(module)

    def give(self, inputs):
        """Note the shards that objects among the inputs keep."""
        for _, holder, place, t in tensors_in_objects(inputs):
            if (action := shard_kept(holder, place)) is not None:
                self.graph.shards_given[self.value(t).id] = action

    def unwound(self):
        """Around the forward: takes off what its hooks have put on, if it fails."""
        return contextlib.nullcontext()

    def returned(self, out):
        """The forward has returned this; what watches operators still does."""

    def keep(self, model, objects):
        """Note the values that the forward left in buffers, in attributes, and in
        objects among its inputs and outputs."""
        inside = [
            x for m in modules(model) for x in [*m._buffers.values(), *vars(m).values()]
        ]
        values = [self._values.get(id(t)) for _, t in tensors(inside)]
        self.graph.left_in_modules = [
            v for v in values if v is not None and v.producer is not None
        ]
        self.graph.changes = changed(self.before, attributes(model))
        self.graph.in_objects = [
            InObject(path, place, self._values.get(id(t)))
            for path, _, place, t in tensors_in_objects(objects)
        ]

    def end(self):
        """The forward is over: only the graph is left."""
        for v in self.graph.values:
            v.differentiable = v.tensor.requires_grad
        self._values, self.known, self._function = {}, Known(), None

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

    def enter(self, path, steady, user_hooked, module, args, kwargs):
        if within_higher_order():
            operator = (
                self._call
                or f"an operator such as torch.cond in {self._stack[-1].path or 'the root'}"
            )
            raise RuntimeError(
                f"{path}: expected a forward that calls its modules itself, found one"
                f" called within {operator}, which compiles what it is given: choose"
                " between modules by a Python if"
            )
        parent = self._stack[-1] if self._stack else None
        given, checkpoints = self.values((args, kwargs)), callers().checkpoints
        call = ModuleCall(
            path,
            parent,
            given,
            {},
            steady,
            user_hooked,
            checkpoints,
            module.training,
            settings_of(module),
        )
        if parent is None:
            for v in call.inputs.values():
                v.trainable = is_float(v)
        self.graph.modules.append(call)
        self._stack.append(call)

    def leave(self, path, module, args, kwargs, output):
        # Torch calls this too of a module whose hooks before raised: none was entered.
        if self._stack and self._stack[-1].path == path:
            self._stack.pop().outputs = self.values(output)

    def run_call(self, name, func, args, kwargs):
        inputs = self.values((args, kwargs))
        given = replace((args, kwargs), inputs)
        run, index = self._stack[-1], len(self.graph.calls)
        if self.most_calls is not None and index > self.most_calls:
            raise TooManyCalls(f"expected at most {self.most_calls} calls")
        call = Call(index, func, name, run, given, inputs, source=source_line())
        function, call.checkpoints = callers()
        call.own_backward = function is not None and self.is_pointwise(function)
        hides = function is not None and not call.own_backward
        if hides or hides_gradients(name, func) or transform() is not None:
            call.why_whole = OPAQUE
        self._call = call
        try:
            out = self.read(func, *args) if name in UNSEEN else func(*args, **kwargs)
        finally:
            self._call = None
        self.note_written(call, args)
        if name == "expand_as":  # the operator is given but the shape of the other
            for node in call.nodes:
                node.inputs = list(call.inputs.values())
        self.graph.calls.append(call)
        self.note_hidden_inputs(call)
        call.outputs = {path: self.value(t, producer=index) for path, t in tensors(out)}
        return out

    def is_pointwise(self, function):
        """Whether an autograd.Function, of whose forward this is the frame, does the
        same at each element."""
        if self._function is None or self._function[0] is not function:

            def trainable(t):
                return self.value(t).trainable

            self._function = function, pointwise_function(function, trainable)
        return self._function[1]

    def note_written(self, call, args):
        """Note the parameters that a call writes to."""
        if sets_data(call.func):
            written = [call.inputs[0, 0]]
            if written[0].param:  # the parameter is another value from here on
                self.value(args[0], call.index, new=True).trainable = written[
                    0
                ].trainable
        else:
            written = [
                v for node in call.nodes for v in node.inputs if v.id in node.mutated
            ]
        self.graph.rewritten |= {v.memory.param or v.param for v in written} - {None}
        if self.graph.rewritten and not self.fake:
            raise RuntimeError(
                f"{call}: expected a forward that reads values to leave"
                f" {sorted(self.graph.rewritten)} as they are: it is traced on the"
                " parameters themselves"
            )

    def note_hidden_inputs(self, call):
        """What a call's operators read that it was not given: through torch.vmap,
        autograd.grad."""
        here = {v.id for v in call.inputs.values()}
        here |= {v.id for node in call.nodes for v in node.outputs}
        # Autograd makes a view anew, of what it is a view of, when it is written to.
        written = {i for node in call.nodes for i in node.mutated}
        here |= {v.memory.id for v in call.inputs.values() if v.id in written}
        reads = [v for node in call.nodes for v in node.inputs if v.id not in here]
        hidden = {
            ("hidden", v.id): v for v in reads if v.param or v.producer is not None
        }
        if hidden:
            call.inputs |= hidden
            call.why_whole = OPAQUE
