"""One rank's training step on fake tensors: what its memory holds, and what it sends.

The forward runs by the plan's programs, as in the proof, and its backward after it. No
tensor is kept, so that memory is let go of just as in a real step.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..around import undisturbed
from ..axes.sharding import Sharding
from ..costs import Collective, Step
from ..groups import CountedGroup
from ..keys import CallIndex, ModulePath
from ..parts import modules, parameters
from ..private import FakeTensorMode
from ..running.program import Program
from ..tracing.fakes import fake_inputs
from ..tracing.graph import Graph, ModuleCall
from ..tracing.hidden import UNSEEN
from ..tracing.operators import reads_values
from ..tracing.trace import record
from ..utils import tensors
from .layout import Layout
from .prove import rank_copy
from .rerun import Rerun


class _Place(NamedTuple):
    """A call: the how manieth of a name in the runs of a module."""

    path: ModulePath
    name: str
    number: int


def readings_at(graph: Graph) -> dict[_Place, list]:
    """What the traced forward read of values, by its calls."""
    results: dict[CallIndex, list] = {}
    for reading in graph.readings:
        results.setdefault(reading.call, []).append(reading.result)
    found = {}
    met: Counter[tuple] = Counter()
    for call in graph.calls if results else ():
        key = (call.module.path, call.name)
        if call.index in results:
            found[_Place(*key, met[key])] = results[call.index]
        met[key] += 1
    return found


class DryRun(NamedTuple):
    """A step that can be run. `readings`: what its forward reads of values."""

    model: nn.Module
    args: tuple
    kwargs: dict
    device: torch.device
    readings: dict[_Place, list]
    sharding: Sharding
    programs: dict[ModulePath, Program]
    n: int

    @undisturbed
    def __call__(self) -> Step:
        """Run the step of the first rank, which has the most of every axis. Raises
        RuntimeError."""
        group = CountedGroup(0, self.n)
        fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        copied = rank_copy(
            self.model,
            self.programs,
            self.sharding,
            group,
            fake_mode,
            self.device,
        )
        for module in modules(copied):
            _silence(module._backward_hooks)
            _silence(module._backward_pre_hooks)
        args, kwargs = fake_inputs(fake_mode, self.args, self.kwargs)
        meter = _Meter(self.readings, group)
        try:
            with torch.enable_grad():
                record(copied, args, kwargs, modes=[fake_mode], recorder=meter)
        except Exception as e:
            raise RuntimeError(
                f"{type(self.model).__name__}: expected a forward and backward that run"
                f" on fake tensors, found {type(e).__name__}: {e}"
            ) from e
        finally:
            copied.zero_grad()  # which nothing of the user's can hold
            meter.let_go(copied, (args, kwargs))
        return meter.step(list(parameters(copied)))


def _silence(hooks: dict) -> None:
    """Hooks of the user's on gradients: none is to see fake tensors. They stay, as
    torch calls `view_as` in the forward of a module that has some."""
    hooks.update(dict.fromkeys(hooks, lambda *_: None))


class _Live:
    """The memory that is in use, by the module that asked for it."""

    def __init__(self) -> None:
        self.bytes: Counter[ModulePath | None] = Counter()
        self.now = self.peak = 0
        self.known: dict[int, Any] = {}  # id of a storage -> it, or a weak reference

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        for t in tensors:
            storage = t.untyped_storage()
            self.known[id(storage)] = storage

    def add(self, t: Tensor, path: ModulePath | None) -> None:
        if t.layout != torch.strided:  # of what it is made of, each has been added
            return
        storage = t.untyped_storage()
        key = id(storage)
        if key in self.known:
            return
        nbytes = storage.nbytes()
        gone = partial(self.remove, key, nbytes, path)
        self.known[key] = weakref.ref(storage, gone)
        self.bytes[path] += nbytes
        self.now += nbytes
        self.peak = max(self.peak, self.now)

    def remove(self, key: int, nbytes: int, path: ModulePath | None, _: object) -> None:
        del self.known[key]
        self.bytes[path] -= nbytes
        self.now -= nbytes


class _Meter(Rerun):
    """Watches a step. Calls that on_shard.py replaces are not seen, so that others are
    known by their names."""

    def __init__(self, readings: dict[_Place, list], group: CountedGroup):
        super().__init__(Graph([], [], [], {}), Layout())
        self.all_read = readings
        self.to_read: list = []  # by the present call
        self.met: Counter[tuple] = Counter()
        self.group = group
        self.live = _Live()
        self.activations: dict[ModulePath, int] = {}
        self.sent_forward = 0

    def attach(self, model: nn.Module) -> None:
        super().attach(model)
        self.live.leave_out(parameters(model))
        for buffer in model.buffers():
            self.live.add(buffer, None)

    def give(self, inputs: Any) -> None:
        for _, t in tensors(inputs):
            self.live.add(t, None)

    def enter(
        self,
        path: ModulePath,
        steady: bool,
        user_hooked: bool,
        module: nn.Module,
        args: tuple,
        kwargs: dict,
    ) -> None:
        self._stack.append(ModuleCall(path, None))

    def reading(self) -> Any:
        if not self.to_read:
            raise RuntimeError("other values are read than when it was traced")
        return self.to_read.pop(0)

    def run_call(self, name: str, func: Callable, args: tuple, kwargs: dict) -> Any:
        key = (self._stack[-1].path, name)
        self.to_read = list(self.all_read.get(_Place(*key, self.met[key]), ()))
        self.met[key] += 1
        return self.reading() if name in UNSEEN else func(*args, **kwargs)

    def run_node(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        if reads_values(func, args) and not self.paused:
            out = self.read_values(func, args, kwargs)
        else:
            out = self.compute(func, args, kwargs)
        path = self._stack[-1].path if self._stack else None
        for _, t in tensors(out):
            self.value(t)
            self.live.add(t, path)
        return out

    def value(self, tensor: Any, producer: Any = None, new: bool = False) -> Any:
        self.graph.values.append(weakref.ref(tensor))
        return tensor

    def let_go(self, model: nn.Module, inputs: Any) -> None:
        alive = [ref() for ref in self.graph.values]
        self.graph.values = [t for t in alive if t is not None]
        super().let_go(model, inputs)

    def returned(self, out: Any) -> None:
        held = self.live.bytes.items()
        self.activations = {path: n for path, n in held if n and path is not None}
        self.sent_forward = len(self.group.log)
        ends = [t for _, t in tensors(out) if t.requires_grad]
        if ends:
            torch.autograd.backward(ends, [torch.ones_like(t) for t in ends])

    def step(self, params: list[Tensor]) -> Step:
        trained = [p for p in params if p.requires_grad]
        return Step(
            parameters=sum(p.nbytes for p in params),
            elements=sum(p.numel() for p in params),
            trained=sum(p.nbytes for p in trained),
            tensors=len(trained),
            activations=self.activations,
            peak=self.live.peak,
            collectives=self.collectives(),
        )

    def collectives(self) -> list[Collective]:
        found: dict[tuple[str, bool], list[float]] = {}
        for i, (name, nbytes) in enumerate(self.group.log):
            backward = i >= self.sent_forward
            found.setdefault((name, backward), []).append(nbytes)
        return [
            Collective(name, backward, len(sent), round(sum(sent)))
            for (name, backward), sent in found.items()
        ]
