"""Which calls read a value, in which runs of modules, and what they want done to it
first."""

from collections import defaultdict
from typing import TypeAlias

from ..keys import ArgPath, ValueId
from ..running.program import Actions
from ..tracing.graph import Call, Graph, ModuleCall, Value
from .layout import Layout

_At: TypeAlias = tuple[ValueId, int]  # a value in a run of a module, by its id()


class Readers:
    """The actions that a layout asks for on each value, by the runs in which it is
    read."""

    def __init__(self, graph: Graph, layout: Layout):
        self.layout = layout
        self._direct: dict[_At, set[Actions]] = defaultdict(set)
        self._through: dict[_At, set[Actions]] = defaultdict(set)
        self._deeper: set[_At] = set()
        for call in graph.calls:
            run, *callers = call.module.chain()
            for path, v in call.inputs.items() if call.nodes else ():
                wanted = self.wants(call, path)
                self._direct[v.id, id(run)].add(wanted)
                self._deeper.update((v.id, id(caller)) for caller in callers)
                if v.param is not None:
                    self._through[v.id, id(origin(run, v))].add(wanted)

    def wants(self, call: Call, path: ArgPath) -> Actions:
        """What is to be done to an argument of a call."""
        return tuple(self.layout.uses.get((call.index, path), ()))

    def want_directly(self, v: Value, run: ModuleCall) -> set[Actions]:
        """What the calls of a run's own code want done to a value, in any of their
        arguments."""
        return self._direct[v.id, id(run)]

    def want_through(self, v: Value, run: ModuleCall) -> set[Actions]:
        """What all calls want done to a parameter that get it from the run that reads
        it."""
        return self._through[v.id, id(run)]

    def reads_deeper(self, v: Value, run: ModuleCall) -> bool:
        """Whether what a run calls reads a value."""
        return (v.id, id(run)) in self._deeper

    def reads(self, v: Value, run: ModuleCall) -> bool:
        """Whether a run, or what it calls, reads a value."""
        return self.reads_deeper(v, run) or (v.id, id(run)) in self._direct


def origin(run: ModuleCall, v: Value) -> ModuleCall:
    """The run that a parameter was read in: the first around a run that was not given
    it."""
    while holds(run.inputs, v) and run.parent is not None:
        run = run.parent
    return run


def holds(values: dict[ArgPath, Value], v: Value) -> bool:
    """Whether a value is among those at some paths."""
    return any(x is v for x in values.values())


def paths_of(v: Value, values: dict[ArgPath, Value]) -> list[ArgPath]:
    """The paths at which a value is."""
    return [path for path, x in values.items() if x is v]
