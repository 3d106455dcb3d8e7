"""Who reads a value, and from where."""

from collections import Counter

from ..keys import ArgPath, ValueId
from ..tracing.graph import Call, Graph, ModuleCall, Value

_Run = int  # the id of a ModuleCall


class Readers:
    """The calls that read a value: in one run of a module, in what it calls, and elsewhere."""

    def __init__(self, graph: Graph):
        self._all: dict[ValueId, list[Call]] = {}
        self._direct: dict[tuple[ValueId, _Run], list[Call]] = {}
        self._within: Counter[tuple[ValueId, _Run]] = Counter()
        self._passed: set[tuple[ValueId, _Run]] = set()
        for call in graph.calls:
            for i in {v.id for v in call.inputs.values()} if call.nodes else ():
                self._all.setdefault(i, []).append(call)
                self._direct.setdefault((i, id(call.module)), []).append(call)
                self._within.update((i, id(run)) for run in call.module.chain())
        for run in graph.modules:
            callers = list(run.chain())[1:]
            self._passed.update((v.id, id(m)) for v in run.inputs.values() for m in callers)

    def directly_in(self, v: Value, run: ModuleCall) -> list[Call]:
        """The calls of a run's own code that read a value."""
        return self._direct.get((v.id, id(run)), [])

    def deeper_in(self, v: Value, run: ModuleCall) -> bool:
        """Whether what a run calls reads a value."""
        return self._within[v.id, id(run)] > len(self.directly_in(v, run))

    def anywhere_in(self, v: Value, run: ModuleCall) -> list[Call]:
        """The calls that read a value in a run, and in what it calls."""
        return [call for call in self._all.get(v.id, ()) if call.module.within(run)]

    def passed_on(self, v: Value, run: ModuleCall) -> bool:
        """Whether a run gives a value to something that it calls."""
        return (v.id, id(run)) in self._passed


def holds(values: dict[ArgPath, Value], v: Value) -> bool:
    """Whether a value is among those at some paths."""
    return any(x is v for x in values.values())


def paths_of(v: Value, values: dict[ArgPath, Value]) -> list[ArgPath]:
    """The paths at which a value is."""
    return [path for path, x in values.items() if x is v]
