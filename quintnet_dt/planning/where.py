"""Where a plan communicates, module by module: what a user is shown."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..axes.action import Action
from ..axes.sharding import Axis, Sharding
from ..costs import Communication
from ..keys import CallIndex, ModulePath, ParamName
from ..running.program import CallProgram, Program
from ..tracing.graph import Graph, Value
from .cost import action_bytes
from .layout import Layout
from .task import Task

AxisNumbers = dict[Axis, int]


def numbered(task: Task, sharding: Sharding) -> AxisNumbers:
    """The axes that stay sharded through calls, in the order of their parameters."""
    params = [sharding.params[name] for name in task.params if name in sharding.params]
    axes = dict.fromkeys(p.axis for p in params if p.axis in sharding.through)
    return {axis: number for number, axis in enumerate(axes)}


@dataclass(frozen=True)
class _Place:
    """An action, on which value, and where."""

    value: Value
    action: Action
    module: ModulePath
    what: str
    call: CallIndex | None


def communications(
    task: Task, layout: Layout, numbers: AxisNumbers
) -> list[Communication]:
    """What several calls read is communicated once, before the first."""
    first: dict[tuple, _Place] = {}
    for place in _places(task.graph, layout):
        first.setdefault((place.value.id, place.action), place)
    found = []
    for place in first.values():
        axis = layout.axis_of.get(-1 if place.call is None else place.call)
        sent = action_bytes(place.value, place.action, task.traced_work)
        one = Communication(
            place.module,
            place.what,
            place.action.kind,
            round(sent),
            None if axis is None else numbers.get(axis),
        )
        found.append(one)
    return found


def _places(graph: Graph, layout: Layout) -> Iterator[_Place]:
    for (i, path), actions in layout.uses.items():
        value = graph.calls[i].inputs[path]
        what = value.param or "input"
        module = graph.calls[i].module.path
        for action in actions:
            yield _Place(value, action, module, what, i)
    for value_id, actions in layout.values.items():
        value = graph.values[value_id]
        made = value.producer
        owner = (value.param or "").rpartition(".")[0]
        module = owner if made is None else graph.calls[made].module.path
        for action in actions:
            yield _Place(value, action, module, value.param or "output", made)
    for path, actions in layout.root.items():
        for action in actions:
            yield _Place(graph.outputs[path], action, "", "output", None)


def adapted(programs: Mapping[ModulePath, Program]) -> list[ModulePath]:
    """The modules of which a call is given other numbers, or run otherwise."""
    return [
        path
        for path, program in programs.items()
        if any(map(_is_adapted, program.calls.values()))
    ]


def _is_adapted(call: CallProgram) -> bool:
    changes = (
        call.sizes,
        call.bounds,
        call.buffers,
        call.instead,
    )
    return any(changes)


def used_elsewhere(graph: Graph, name: ParamName, owners: set[ModulePath]) -> bool:
    """Whether calls of other modules than those that own it use a parameter."""
    users = {call.module.path for call in graph.users.get(name, ())}
    return not users <= owners
