"""What the proof does at each call of the forward on one rank's shapes: compare it with
the same call of the whole forward, and replace numbers that were written for the
whole."""

from dataclasses import dataclass
from typing import Any, Callable, NamedTuple

import torch

from ..axes.axes import Axes
from ..axes.sharding import Axis, LayoutError
from ..groups import SimulatedGroup, part_of
from ..keys import ArgPath
from ..private import silent_fakes
from ..running.call_program import resize
from ..running.memory import dims_in_memory, laid_out
from ..running.on_shard import without_padding
from ..running.program import Bound
from ..tracing.graph import Call, Graph, Value
from ..tracing.hidden import UNSEEN
from ..tracing.operators import draws
from ..utils import STOPS, leaves, lookup, replace, tensors
from .indexing import CUTS, INDEXING, Cut, bounds, cut_of, indexed_dims, other_elements
from .layout import Layout
from .operators import aligned_only, copes, op_name
from .programs import Found
from .rerun import Rerun
from .sizes import SIZES, groups_at, localise

# What a kernel that wants aligned rows aligns them to.
_ALIGNMENT = 16

Shapes = dict[ArgPath, tuple[int, ...]]


class _Arguments(NamedTuple):
    args: tuple
    kwargs: dict


@dataclass(frozen=True)
class _Attempt:
    """A call that was made on shards: what it gave, of which shapes, and why that is
    not right."""

    out: Any
    shapes: Shapes | None
    reason: str


class Checker(Rerun):
    """Compares each call with the whole forward's."""

    def __init__(
        self,
        graph: Graph,
        axes: Axes,
        layout: Layout,
        group: SimulatedGroup,
        found: Found,
    ):
        super().__init__(graph, layout)
        self.axes, self.group, self.n = axes, group, group.size
        # what programs must do beside, of earlier runs and of this one
        self.found = found
        self.changed = False  # whether this run found some that alters the forward
        self.pinned = False  # or some that does not
        self.failed: list[LayoutError] = []
        self.cuts: list[Cut] = []  # of the present call

    def note(self, reason: str, go_on: bool = True) -> None:
        """An axis that fails. The run goes on where it can, as if it had not, so that
        it finds all that do."""
        error = self.error(reason)
        if error.axis is None or not go_on:
            raise error
        if all(e.axis != error.axis for e in self.failed):
            self.failed.append(error)

    def run_call(self, name: str, func: Callable, args: tuple, kwargs: dict) -> Any:
        call = self.next_call(name)
        if name in UNSEEN:
            out, self.at = self.reading(), self.at + 1
            return out
        axis = self.layout.axis_of.get(call.index)
        if axis is not None:
            self.check_kernels(call, axis)
        self._call = call
        try:
            out = self.show(call, func, _Arguments(args, kwargs), axis)
            self.values(out)
        finally:
            self._call = None
        self.at += 1
        return out

    def check_kernels(self, call: Call, axis: Axis) -> None:
        """Whether the call's operators work on every rank's shard, the last one's
        too."""
        sizes = axis.units.sizes(self.n)
        if not sizes[-1] and not all(map(copes, call.nodes)):
            self.note(
                "the last rank would hold nothing of the axis, which this operator"
                " cannot work on"
            )
        if any(map(aligned_only, call.nodes)) and not self.aligned(call, axis, sizes):
            self.note(
                "a rank's rows would not be of multiples of 16 bytes, which this"
                " operator wants"
            )

    def aligned(self, call: Call, axis: Axis, sizes: list[int]) -> bool:
        """Whether the rows of all a call's tensors are aligned on every rank, as its
        backward wants them."""
        for v in (*call.inputs.values(), *call.outputs.values()):
            split = axis.find(self.axes, v)
            width = split.width * v.dtype.itemsize if split else 0
            if any(width * size % _ALIGNMENT for size in sizes):
                return False
        return True

    def expected(self, call: Call) -> Shapes:
        """The shapes of what a call makes, on this rank."""
        inputs = {v.id for v in call.inputs.values()}
        made = {path: v for path, v in call.outputs.items() if v.id not in inputs}
        return {path: self.local_shape(v) for path, v in made.items()}

    def local_shape(self, v: Value) -> tuple[int, ...]:
        state = self.layout.states.get(v.id)
        if not isinstance(state, Axis):
            return v.shape
        return state.split_of(self.axes, v).local_shape(
            v.shape, self.group.rank, self.n
        )

    def show(
        self, call: Call, func: Callable, given: _Arguments, axis: Axis | None
    ) -> Any:
        """Run a call as it is given, else with its numbers translated; note where
        neither is right."""
        expected = self.expected(call)
        indexing = (
            bounds(call, given, axis, self.axes, self.group)
            if call.name in INDEXING
            else {}
        )
        taken = {path: self.as_given(call, path, b) for path, b in indexing.items()}
        if any(draws(node.op, node.args, node.kwargs) for node in call.nodes):
            given = self.in_order(call, given)
        made = self.attempt(call, func, given, expected, axis)
        # A group norm's result has one shape for any number of groups.
        in_groups = call.name == "group_norm" and call.index not in self.layout.instead
        if made.reason or in_groups:
            translated = self.translate(call, given, expected, indexing, axis)
            if translated is not None:
                given, taken = translated, indexing
                made = self.attempt(call, func, given, expected, axis)
        if taken and call.index not in self.found.bounds:
            self.found.bounds[call.index], self.pinned = taken, True
        if not made.reason:
            if reason := self.other_scalars(call, given, axis):
                self.note(reason)
            return made.out
        self.note(made.reason, go_on=expected.keys() == {()})
        return (
            made.out if made.shapes == expected else self.stand_in(call, expected[()])
        )

    def as_given(self, call: Call, path: ArgPath, bound: Bound) -> Bound:
        """A number that is right as the code gives it, on every rank: the same on all,
        or each rank's own part."""
        whole = lookup(call.args, path)
        axis = self.layout.axis_of[call.index]
        own = Bound(whole, axis.units, own=True)
        dealt_out = part_of(abs(whole), axis.units, self.group) is not None
        differs = whole != bound.given
        is_own = dealt_out and differs and own.local(self.group) == bound.given
        return own if is_own else Bound(bound.given)

    def translate(
        self,
        call: Call,
        given: _Arguments,
        expected: Shapes,
        indexing: dict[ArgPath, Bound],
        axis: Axis | None,
    ) -> _Arguments | None:
        """A call's arguments with the numbers of a shard, where they hold some of the
        whole; the programs will do the same."""
        sharded = [axis] if axis else list(dict.fromkeys(self.layout.axis_of.values()))
        units = list(dict.fromkeys(axis.units for axis in sharded))
        sizes = localise(call, tuple(given), expected, units, self.group)
        local = {path: b.local(self.group) for path, b in indexing.items()}
        local = {path: x for path, x in local.items() if x != indexing[path].given}
        if not sizes and not local:
            return None
        if sizes:
            self.found.sizes[call.index] = sizes
        self.changed = True
        resized = resize(tuple(given), sizes, self.group, call)
        return _Arguments(*replace(resized, local))

    def attempt(
        self,
        call: Call,
        func: Callable,
        given: _Arguments,
        expected: Shapes,
        axis: Axis | None,
    ) -> _Attempt:
        """Make a call."""
        self.cuts = []
        if call.index in self.layout.instead and call.name == "embedding":
            func = without_padding(func)
        wanted = f"expected shapes {list(expected.values())} on shards"
        try:
            with silent_fakes():
                out = func(*given.args, **given.kwargs)
        except STOPS:
            raise
        except Exception as e:
            return _Attempt(None, None, f"{wanted}, found {e}")
        shapes = {path: tuple(t.shape) for path, t in tensors(out) if path in expected}
        if shapes != expected:
            return _Attempt(out, shapes, f"{wanted}, found {list(shapes.values())}")
        return _Attempt(
            out, shapes, other_elements(call, self.cuts, axis, self.axes, self.group)
        )

    def stand_in(self, call: Call, shape: tuple[int, ...]) -> torch.Tensor:
        """What the forward goes on with after a call that was not right."""
        v = call.outputs[()]
        options = {
            "dtype": v.dtype,
            "device": v.device,
            "requires_grad": v.differentiable,
        }
        return torch.empty(shape, **options).clone()

    def in_order(self, call: Call, given: _Arguments) -> _Arguments:
        """The arguments of a call that draws random numbers, which it does in the order
        of memory: its input gets the whole forward's order, which a collective may have
        changed."""
        if not call.inputs:
            return given
        whole, (path, local) = next(iter(call.inputs.values())), next(
            tensors(tuple(given))
        )
        order = dims_in_memory(whole.shape, whole.strides)
        if order == dims_in_memory(whole.shape, local.stride()):
            return given
        if call.index not in self.found.order:
            self.found.order[call.index], self.changed = order, True
        return _Arguments(*replace(tuple(given), {path: laid_out(local, order)}))

    def other_scalars(self, call: Call, given: _Arguments, axis: Axis | None) -> str:
        """Why the scalar arguments of a call differ from the whole forward's; "" where
        they may."""
        groups = groups_at(call, given.args)
        places = self.places_on_shard(call, axis)
        for (path, now), (_, then) in zip(leaves(tuple(given)), leaves(call.args)):
            if not isinstance(now, (int, float, complex)) or now == then:
                continue
            fewer = path == groups and now == self.share_of(then, axis)
            is_size = call.name in SIZES or fewer or path in places
            if not isinstance(now, int) or not is_size:
                return f"its argument {then} becomes {now} on shards"
        return ""

    def share_of(self, number: int, axis: Axis | None) -> float:
        """This rank's share of a number of the whole axis's."""
        if axis is None:
            return number
        mine = axis.units.sizes(self.n)[self.group.rank]
        return number * mine / axis.size

    def places_on_shard(self, call: Call, axis: Axis | None) -> set[ArgPath]:
        """The paths of the numbers with which a call indexes the dim that is
        sharded."""
        if axis is None or call.name not in INDEXING:
            return set()
        split = axis.find(self.axes, call.args[0][0])
        if not split:
            return set()
        return {path for path, dim in indexed_dims(call).items() if dim == split.dim}

    def record_node(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        out = super().record_node(func, args, kwargs)
        if self._call is not None and op_name(func) in CUTS:
            shapes = [t.shape for _, t in tensors((out,))]
            self.cuts.append(cut_of(func, args, kwargs, args[0].shape, shapes))
        return out
