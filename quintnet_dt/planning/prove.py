"""The proof: the forward run again on one rank's shapes, call by call beside the whole one.

With the programs installed on a ghost whose parameters have their local shapes, the forward must
make the same calls in the same order with the same scalar arguments, and every tensor must be
exactly the shard that the layout says. A scale computed from a sharded dim's size differs, and is
caught; a size written into the code (`view(b, s, 8, 64)`) is caught and replaced, and then shown in
the same way.
"""

import torch

from ..axes.sharding import Axis, LayoutError
from ..comm_ops import SimulatedGroup, chunk_sizes
from ..ddp import whole_shape
from ..parts import parameters
from ..private import FakeTensorMode, silent_fakes
from ..running.calls import resize
from ..running.context import Context
from ..running.install import install
from ..running.memory import dims_in_memory, laid_out
from ..running.program import Bound
from ..tracing.escapes import let_go
from ..tracing.ghost import fake_inputs, ghost
from ..tracing.graph import Call, next_seen
from ..tracing.operators import draws, reads_values
from ..tracing.recorder import UNSEEN, Recorder
from ..tracing.trace import record
from ..utils import leaves, quiet, replace, silence, tensors
from .analysis import aligned_only, copes, op_name
from .indexing import CUTS, INDEXING, bounds, cut_of, indexed_dims, other_elements
from .programs import Found, make_programs
from .sizes import SIZES, groups_at, localise


def prove(model, args, kwargs, graph, axes, layout, sharding, n, device=None):
    """Show that the layout is right for this forward, or raise LayoutError. Returns the programs
    that do it."""
    found = Found()
    for _ in range(
        3
    ):  # what is found in one run is part of the programs that the next one shows right
        programs = make_programs(graph, layout, found)
        checker = _Checker(graph, axes, layout, n, found)
        try:
            run_local(model, args, kwargs, programs, checker, sharding, n, device)
        except LayoutError as e:
            checker.failed.append(e)
        if checker.failed:
            error, *others = checker.failed
            error.others = others
            raise error
        if not checker.changed:
            return make_programs(graph, layout, found) if checker.pinned else programs
    raise LayoutError("sizes written into the code could not be replaced")


def run_local(model, args, kwargs, programs, checker, sharding, n, device=None):
    """Run rank 0's forward of n on fake tensors under `checker`."""

    def shape(name, p):
        whole = tuple(whole_shape(p))
        if name not in sharding.params:
            return whole
        return sharding.params[name].split(whole).local_shape(whole, 0, n)

    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    copied = ghost(model, fake_mode, local_shape=shape, device=device)
    context = Context(group=SimulatedGroup(0, n))
    context.programs = programs
    install(copied, context)
    given = fake_inputs(fake_mode, args, kwargs)
    try:
        record(copied, *given, modes=[fake_mode], recorder=checker)
    except LayoutError:
        raise
    except Exception as e:
        raise checker.error(f"{type(e).__name__}: {e}") from e
    finally:
        checker.let_go(copied, given)
    if next_seen(checker.whole, checker.at) != len(checker.whole):
        raise checker.error("the forward ended early")


class _Checker(Recorder):
    """Compares each call with the whole forward's."""

    def __init__(self, graph, axes, layout, n, found):
        super().__init__()
        self.whole = graph.calls
        self.axes, self.layout, self.n = axes, layout, n
        self.at, self.readings, self.failed = 0, {}, []
        self.found = found  # what programs must do beside, of earlier runs and of this one
        self.changed = self.pinned = (
            False  # whether this one found some: that alters the forward; that does not
        )
        self.cuts = []  # Cuts of the present call
        for i, result, _ in graph.readings:
            self.readings.setdefault(i, []).append(result)

    @property
    def paused(self):
        return silence.depth > 0

    def error(self, reason):
        """A LayoutError of the sharded axis nearest to the present call: in its module, else in
        those around it."""
        call = self.whole[self.at] if self.at < len(self.whole) else None
        near = sorted(self.layout.axis_of, key=lambda i: (i > self.at, abs(i - self.at)))
        for module in call.module.chain() if call is not None else ():
            for i in near:
                if self.whole[i].module.within(module):
                    return LayoutError(reason, call, self.layout.axis_of[i])
        return LayoutError(reason, call)

    def note(self, reason, go_on=True):
        """An axis that fails. The run goes on where it can, as if it had not, so that it finds all
        that do."""
        error = self.error(reason)
        if error.axis is None or not go_on:
            raise error
        if all(e.axis != error.axis for e in self.failed):
            self.failed.append(error)

    def local_shape(self, v):
        state = self.layout.states.get(v.id)
        if not isinstance(state, Axis):
            return v.shape
        return state.find(self.axes, v).local_shape(v.shape, 0, self.n)

    def run_call(self, name, func, args, kwargs):
        self.at = next_seen(self.whole, self.at)
        if self.at >= len(self.whole):
            raise self.error("the forward makes more calls on shards")
        call = self.whole[self.at]
        if name != call.name or self._stack[-1].path != call.module.path:
            raise self.error(f"on shards the forward calls {name} here")
        if name in UNSEEN:
            out, self.at = self.reading(), self.at + 1
            return out
        made = {v.id for v in call.inputs.values()}
        expected = {p: self.local_shape(v) for p, v in call.outputs.items() if v.id not in made}
        axis = self.layout.axis_of.get(call.index)
        if (
            axis is not None
            and not chunk_sizes(axis.size, self.n)[-1]
            and not all(map(copes, call.nodes))
        ):
            self.note(
                "the last rank would hold nothing of the axis, which this operator cannot work on"
            )
        if axis is not None and any(aligned_only(node) for node in call.nodes):
            sizes = chunk_sizes(
                axis.size, self.n
            )  # its backward wants rows of 16 bytes of each of its tensors
            found = [
                (v, axis.find(self.axes, v))
                for v in (*call.inputs.values(), *call.outputs.values())
            ]
            if any(
                at and at.width * size * v.dtype.itemsize % 16 for v, at in found for size in sizes
            ):
                self.note(
                    "a rank's rows would not be of multiples of 16 bytes, which this operator wants"
                )
        self._call = call
        try:
            out = self.shown(call, func, args, kwargs, expected, axis)
            self.values(out)
        finally:
            self._call = None
        self.at += 1
        return out

    def shown(self, call, func, args, kwargs, expected, axis):
        """Run a call as it is given, else with its numbers translated; note where neither is
        right."""
        given = (
            bounds(call, (args, kwargs), axis, self.axes, self.n) if call.name in INDEXING else {}
        )
        if _draws(call):
            args, kwargs = self.in_order(call, args, kwargs)
        out, found, reason = self.attempt(call, func, args, kwargs, expected, axis)
        taken = {path: Bound(b.given, b.given) for path, b in given.items()}
        if (
            reason or call.name == "group_norm"
        ):  # whose result has one shape for any number of groups
            divided, multiplied = localise(call, args, kwargs, expected, self.n)
            local = {path: b.local for path, b in given.items() if b.local != b.given}
            if divided or multiplied or local:
                args, kwargs = resize((args, kwargs), divided, multiplied, self.n, call)
                args, kwargs = replace((args, kwargs), local)
                out, found, reason = self.attempt(call, func, args, kwargs, expected, axis)
                taken = given
                if divided:
                    self.found.divided[call.index] = divided
                if multiplied:
                    self.found.multiplied[call.index] = multiplied
                self.changed = True
        if taken and call.index not in self.found.bounds:
            self.found.bounds[call.index], self.pinned = taken, True
        if not reason:
            reason = self.other_scalars(call, args, kwargs, axis)
            if reason:
                self.note(reason)
            return out
        self.note(reason, go_on=expected.keys() == {()})
        if found == expected:
            return out
        kind = {"dtype": call.outputs[()].dtype, "device": call.outputs[()].device}
        return torch.empty(
            expected[()], **kind, requires_grad=call.outputs[()].differentiable
        ).clone()

    def attempt(self, call, func, args, kwargs, expected, axis):
        """(What a call gives, its shapes, why that is not right)."""
        self.cuts = []
        try:
            with silent_fakes():
                out = func(*args, **kwargs)
        except Exception as e:
            return None, None, f"expected shapes {list(expected.values())} on shards, found {e}"
        found = {p: tuple(t.shape) for p, t in tensors(out) if p in expected}
        if found != expected:
            reason = (
                f"expected shapes {list(expected.values())} on shards, found {list(found.values())}"
            )
            return out, found, reason
        return out, found, other_elements(call, self.cuts, axis, self.axes, self.n)

    def in_order(self, call, args, kwargs):
        """The arguments of a call that draws random numbers, which it does in the order of memory:
        its input gets the whole forward's order, which a collective may have changed."""
        if not call.inputs:
            return args, kwargs
        whole, (path, local) = next(iter(call.inputs.values())), next(tensors((args, kwargs)))
        order = dims_in_memory(whole.shape, whole.strides)
        if order == dims_in_memory(whole.shape, local.stride()):
            return args, kwargs
        if call.index not in self.found.order:
            self.found.order[call.index], self.changed = order, True
        return replace((args, kwargs), {path: laid_out(local, order)})

    def other_scalars(self, call, args, kwargs, axis):
        """Why the scalar arguments of a call differ from the whole forward's; "" where they may."""
        groups = groups_at(call, args)
        at = (
            None
            if axis is None or call.name not in INDEXING
            else axis.find(self.axes, call.args[0][0])
        )
        places = {path for path, dim in indexed_dims(call).items() if dim == at.dim} if at else ()
        for (path, now), (_, then) in zip(leaves((args, kwargs)), leaves(call.args)):
            if not isinstance(now, (int, float, complex)) or now == then:
                continue
            fewer = path == groups and now * self.n == then
            if not (isinstance(now, int) and (call.name in SIZES or fewer or path in places)):
                return f"its argument {then} becomes {now} on shards"
        return ""

    def hidden_call(self, func):
        return Call(self.at, None, "", self._stack[-1], ((), {}), {}, hidden=True)

    def record_node(self, func, args, kwargs):
        if reads_values(func, args):
            result = self.reading()
            if not isinstance(result, tuple):
                return result
            x = next(t for _, t in tensors((args, kwargs)))
            dtype = x.dtype if func._schema.name in ("aten::masked_select", "aten::index") else None
            return torch.empty(result, dtype=dtype or torch.int64, device=x.device)
        if self._call is not None and self._call.hidden:
            with quiet():  # it is no call to the mode that runs programs either
                return self.compute(func, args, kwargs)
        out = self.compute(func, args, kwargs)
        if self._call is not None and op_name(func) in CUTS:
            self.cuts.append(
                cut_of(func, args, kwargs, args[0].shape, [t.shape for _, t in tensors((out,))])
            )
        return out

    def reading(self):
        """What the whole forward read here: within the call, since its operators on real tensors
        may be others."""
        if not self.readings.get(self.at):
            raise self.error("reads other values on shards")
        return self.readings[self.at].pop(0)

    def give(self, inputs):
        pass

    def keep(self, model, objects):
        pass

    def end(self):
        pass

    def value(self, tensor, producer=None, new=False):
        self.graph.values.append(tensor)  # keep it alive
        return tensor

    def let_go(self, model, inputs):
        """The forward is over; none of its tensors is to stay in a list of the user's."""
        states = [*parameters(model), *model.buffers(), *(t for _, t in tensors(inputs))]
        others = set(map(id, states))
        made = {id(t): t for t in self.graph.values if id(t) not in others}
        self.graph = None
        left = list(made.values())
        made.clear()
        let_go(left)


def _draws(call):
    return any(draws(node.op, node.args, node.kwargs) for node in call.nodes)
