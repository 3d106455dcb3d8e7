"""From a layout to programs: for each module, what its hooks do to its parameters,
inputs and outputs, and to single calls within it.

An action is attached as far out as it can be: to a parameter or an input of the module
when all uses there agree, to an output when nothing inside reads it. Those are plain
hooks, and hold on any path through the module. Only what is left is attached to a call
by its number, which takes a torch-function mode around that module's forward.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..axes.action import SPLIT, SUM
from ..axes.sharding import Axis, LayoutError
from ..keys import ArgPath, CallIndex, ModulePath
from ..running.memory import is_contiguous
from ..running.program import Actions, Bound, CallProgram, Forward, Program
from ..running.sizes import LocalSize
from ..tracing.graph import Call, Graph, ModuleCall, Value
from ..tracing.hidden import HIDDEN
from .layout import Layout
from .numbering import Numbering
from .operators import linear
from .origin import axis_behind
from .readers import Readers, holds, origin, paths_of


@dataclass
class Found:
    """What the proof found that programs must do beside the layout's actions, by call
    or by module."""

    sizes: dict[CallIndex, dict[ArgPath, LocalSize]] = field(default_factory=dict)
    bounds: dict[CallIndex, dict[ArgPath, Bound]] = field(default_factory=dict)
    # Of dims in memory, that its input has in the whole model.
    order: dict[CallIndex, tuple[int, ...]] = field(default_factory=dict)
    # By module, attributes that are to be this rank's.
    numbers: dict[ModulePath, dict[str, LocalSize]] = field(default_factory=dict)


def make_programs(
    graph: Graph, layout: Layout, found: Found | None = None
) -> dict[ModulePath, Program]:
    """The program of each module. `found`: by the proof. Raises LayoutError where no
    program can do what the layout asks."""
    aside: set[ModulePath] = set()
    while True:
        try:
            return _Maker(graph, layout, found or Found(), aside).run()
        except _Differ as e:
            if e.path in aside:
                raise
            aside.add(e.path)


class _Differ(LayoutError):
    """A module's runs need different programs."""

    def __init__(self, path: ModulePath, axis: Axis | None):
        super().__init__(f"{path} runs more than once, in ways that differ", axis=axis)
        self.path = path


class _Maker:
    """Makes the programs of one layout. `aside`: modules whose calls their callers
    number."""

    def __init__(
        self, graph: Graph, layout: Layout, found: Found, aside: set[ModulePath]
    ):
        self.graph, self.layout, self.found, self.aside = graph, layout, found, aside
        # Modules at whose borders nothing is done: hooks of the user's see what crosses
        # them.
        self.closed = aside | {run.path for run in graph.modules if run.user_hooked}
        self.readers = Readers(graph, layout)
        self.per_run = {id(run): Program() for run in graph.modules}
        self.at_calls: dict[CallIndex, CallProgram] = {}

    def run(self) -> dict[ModulePath, Program]:
        for call in self.graph.calls:
            for path, v in call.inputs.items() if call.nodes else ():
                self.place_use(call, path, v)
        for i, actions in self.layout.values.items():
            self.place_result(self.graph.values[i], tuple(actions))
        self.describe_root()
        self.describe_calls()
        self.describe_runs()
        Numbering(self.graph, self.layout, self.aside).apply(
            self.per_run, self.at_calls
        )
        return self.merge()

    def program(self, run: ModuleCall) -> Program:
        return self.per_run[id(run)]

    def at_call(self, call: Call) -> CallProgram:
        return self.at_calls.setdefault(call.index, CallProgram())

    def refuse(self, reason: str, call: Call) -> LayoutError:
        return LayoutError(reason, call, axis_behind(call, self.graph, self.layout))

    # Actions on arguments.

    def place_use(self, call: Call, path: ArgPath, v: Value) -> None:
        """Attach what is done to an argument of a call as far out as it can be."""
        actions = self.readers.wants(call, path)
        if v.param is not None and self.on_parameter(call.module, v, actions):
            return
        if not actions or self.on_input(call.module, v, actions):
            return
        if call.why_whole or call.hidden:
            raise self.refuse(call.why_whole or HIDDEN, call)
        self.at_call(call).inputs[path] = actions
        if self.unwritten(v):
            self.at_call(call).unwritten.add(path)

    def on_parameter(self, run: ModuleCall, v: Value, actions: Actions) -> bool:
        """Whether the module that reads a parameter can do these actions for all that
        get it from there; its hook shows the parameter in any case."""
        reader = origin(run, v)
        alike = (
            self.readers.want_through(v, reader) == {actions}
            and reader.path not in self.aside
        )
        # What is written to is several values, which may be treated otherwise.
        alike = alike and v.param not in self.graph.rewritten
        self.program(reader).params[v.param] = actions if alike else ()
        return alike

    def on_input(self, run: ModuleCall, v: Value, actions: Actions) -> bool:
        """Do these actions to a module's input, if all that reads it there agrees."""
        paths = paths_of(v, run.inputs)
        if not paths or run.path in self.closed or holds(run.outputs, v):
            return False
        if self.readers.reads_deeper(v, run) or self.readers.want_directly(v, run) != {
            actions
        }:
            return False
        program = self.program(run)
        program.inputs.update(dict.fromkeys(paths, actions))
        if self.unwritten(v):
            program.unwritten.update(paths)
        return True

    def unwritten(self, v: Value) -> bool:
        """Whether no call writes to a value's memory once it is made."""
        made = -1 if v.producer is None else v.producer
        return self.graph.last_write.get(v.memory.id, -1) <= made

    # Actions on results.

    def place_result(self, v: Value, actions: Actions) -> None:
        """Attach actions to a value where it is made, or, for a sum, at the view it was
        made of if a hook reaches it."""
        at = v
        for at in reversed(self.summable(v) if actions[0].kind == SUM else [v]):
            if self.on_output(at, actions):
                return
            if is_contiguous(at.shape, at.strides) and not is_contiguous(
                v.shape, v.strides
            ):
                # A later dropout draws in the order of memory, which a collective makes
                # that of the dims.
                break
        call = self.graph.calls[at.producer]
        if call.hidden:
            raise self.refuse(HIDDEN, call)
        paths = paths_of(at, call.outputs)
        if not paths or at.id in self.graph.made_in_place:
            raise self.refuse(
                "a tensor that was written to in place cannot be completed", call
            )
        self.at_call(call).outputs.update(dict.fromkeys(paths, actions))

    def summable(self, v: Value) -> list[Value]:
        """A partial value, and those that it is a view of, one of the other: to sum any
        of them is to sum it."""
        chain = [v]
        while chain[-1].producer is not None:
            call = self.graph.calls[chain[-1].producer]
            inputs = list(call.inputs.values())
            if len(inputs) != 1 or any(not linear(n) or n.mutated for n in call.nodes):
                break
            read_once = self.graph.use_count[inputs[0].id] == 1
            if not read_once or inputs[0].id not in self.layout.states:
                break
            chain.append(inputs[0])
        return chain

    def on_output(self, v: Value, actions: Actions) -> bool:
        """Do these actions to a module's output, if nothing within it reads it."""
        if v.producer is None:
            return False
        run = self.graph.calls[v.producer].module
        paths = paths_of(v, run.outputs)
        if not paths or run.path in self.closed or self.readers.reads(v, run):
            return False
        if any(v is x for _, _, x in self.graph.in_objects):
            return False
        self.program(run).outputs.update(dict.fromkeys(paths, actions))
        return True

    # What programs say beside actions.

    def describe_root(self) -> None:
        root = self.program(self.graph.modules[0])
        for path, actions in self.layout.root.items():
            root.outputs[path] = tuple(actions)
        root.forward = Forward(
            random=self.graph.random,
            modules=len(self.graph.modules),
            changes=self.graph.changes,
            dear=self.layout.dear,
            shards=self.layout.shards,
        )

    def describe_calls(self) -> None:
        beside: dict[str, Mapping[CallIndex, Any]] = {
            "instead": self.layout.instead,
            "buffers": self.layout.buffers,
            "sizes": self.found.sizes,
            "bounds": self.found.bounds,
            "order": self.found.order,
        }
        for attribute, by_call in beside.items():
            for index, x in by_call.items():
                setattr(self.at_call(self.graph.calls[index]), attribute, x)

    def describe_runs(self) -> None:
        for run in self.graph.modules:
            program = self.program(run)
            program.training = run.training
            program.numbers = self.found.numbers.get(run.path, {})
            program.settings = {
                name: x
                for name, x in run.settings.items()
                if (run.path, name) not in self.graph.changes
            }
        for run in self.graph.modules[1:]:
            self.program(run).inside = self.is_inside(run)

    def is_inside(self, run: ModuleCall) -> bool:
        """Whether hooks would see shards or partial results at a run's border."""
        inputs = self.program(run).inputs.values()
        if any(action.kind == SPLIT for actions in inputs for action in actions):
            return True
        border = {v.id for v in (*run.inputs.values(), *run.outputs.values())}
        states, completed = self.layout.states, self.layout.values
        return any(states.get(i) is not None and i not in completed for i in border)

    # One program a module.

    def merge(self) -> dict[ModulePath, Program]:
        """Runs of the same module must agree."""
        programs: dict[ModulePath, Program] = {}
        for run in self.graph.modules:
            new, old = self.program(run), programs.setdefault(
                run.path, self.program(run)
            )
            _share_params(old, new)
            if old != new:
                raise _Differ(run.path, self.axis_within(run))
            old.inside |= new.inside
            old.unwritten &= new.unwritten
            old.written = old.params.keys() & self.graph.rewritten
            old.aside = run.path in self.aside
            if (old.training, old.settings) != (new.training, new.settings):
                old.training = None
        return programs

    def axis_within(self, run: ModuleCall) -> Axis | None:
        """An axis that the calls of a run work on."""
        within = (call for call in self.graph.calls if call.module.within(run))
        axes = (axis_behind(call, self.graph, self.layout) for call in within)
        return next((axis for axis in axes if axis is not None), None)


def _share_params(old: Program, new: Program) -> None:
    """One run of a module may read a parameter that another does not
    (torch.func.functional_call): both show it."""
    read_once = old.params.keys() ^ new.params.keys()
    old.optional |= read_once
    both = {**new.params, **old.params}
    old.params, new.params = {**both}, {**both, **new.params}
