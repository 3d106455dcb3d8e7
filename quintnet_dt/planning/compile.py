"""From a layout to programs: for each module, what its hooks do to its parameters, inputs and
outputs, and to single calls within it.

An action is attached as far out as it can be: to a parameter or an input of the module when all
uses there agree, to an output when nothing inside reads it. Those are plain hooks, and hold on any
path through the module. Only what is left is attached to a call by its number, which takes a
torch-function mode around that module's forward.
"""

from collections import Counter
from dataclasses import dataclass, field

from ..axes.action import SPLIT, SUM
from ..axes.sharding import LayoutError
from ..axes.state import PARTIAL
from ..running.kinds import call_kind
from ..running.memory import is_contiguous
from ..running.program import CallProgram, Program
from ..tracing.recorder import HIDDEN
from ..utils import leaves
from .analysis import linear

# Calls that draw random numbers or not, as their arguments say.
MAY_DRAW = set(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout rrelu"
    " scaled_dot_product_attention dropout_ alpha_dropout_ feature_alpha_dropout_ rrelu_"
    " feature_dropout feature_dropout_".split()
)
# Calls all of whose integers name dims, though their operators know none.
NAME_DIMS = set("flatten movedim moveaxis swapaxes swapdims squeeze unsqueeze".split())
DIM_NAMES = {"dim", "dims", "dim0", "dim1"}
UNNUMBERED = (
    "the forward reads values, or runs a function in a checkpoint, so its calls have no fixed"
    " numbers"
)


@dataclass
class Found:
    """What the proof found that programs must do beside the layout's actions; each by the call's
    index."""

    divided: dict = field(default_factory=dict)  # paths of sizes to divide by the number of ranks
    multiplied: dict = field(default_factory=dict)  # and to multiply
    bounds: dict = field(default_factory=dict)  # {path: Bound}
    order: dict = field(
        default_factory=dict
    )  # of dims in memory that its input has in the whole model


def compile_programs(graph, layout, found=None):
    """Programs by module path. `found`: Found by the proof. Raises LayoutError where no program can
    do what the layout asks."""
    aside = set()
    while True:
        try:
            return _Compiler(graph, layout, found or Found(), aside).run()
        except _Differ as e:
            if e.path in aside:
                raise
            aside.add(e.path)


class _Differ(LayoutError):
    """A module's runs need different programs."""

    def __init__(self, path, axis):
        super().__init__(f"{path} runs more than once, in ways that differ", axis=axis)
        self.path = path


def holds(values, v):
    """Whether a value is among those at some paths."""
    return any(x is v for x in values.values())


class _Compiler:
    def __init__(self, graph, layout, found, aside):
        self.graph, self.layout, self.found = graph, layout, found
        self.aside = aside  # modules whose calls are numbered by their callers
        # These, and others at whose borders nothing is done.
        self.closed = aside | {m.path for m in graph.modules if m.watched}
        self.readers = {}  # value id -> calls that read it
        self.direct = {}  # (value id, module run) -> calls of that run that read it
        self.within = (
            Counter()
        )  # (value id, module run) -> how many calls read it in that run and what it calls
        self.passed = (
            set()
        )  # (value id, module run): given as an input to something that the run calls
        for call in graph.calls:
            for v in {v.id for v in call.inputs.values()} if call.nodes else ():
                self.readers.setdefault(v, []).append(call)
                self.direct.setdefault((v, id(call.module)), []).append(call)
                self.within.update((v, id(m)) for m in call.module.chain())
        for run in graph.modules:
            callers = list(run.chain())[1:]
            self.passed.update((v.id, id(m)) for v in run.inputs.values() for m in callers)
        self.per_run = {id(m): Program() for m in graph.modules}
        self.at_calls = {}  # call index -> CallProgram
        self.done = {}  # call index -> {value id: the actions on it as an argument}

    def run(self):
        for call in self.graph.calls:
            if call.nodes:
                self.uses(call)
        for v_id, actions in self.layout.values.items():
            self.value(self.graph.values[v_id], tuple(actions))
        for path, actions in self.layout.root.items():
            self.per_run[id(self.graph.modules[0])].outputs[path] = tuple(actions)
        beside = {"instead": self.layout.instead, "kept": self.layout.kept, **vars(self.found)}
        for what, by_call in beside.items():
            for index, x in by_call.items():
                setattr(self.at(self.graph.calls[index]), what, x)
        root = self.per_run[id(self.graph.modules[0])]
        root.shards, root.random, root.dear = (
            self.layout.shards,
            self.graph.random,
            self.layout.dear,
        )
        root.modules, root.changes = len(self.graph.modules), self.graph.changes
        states, whole = self.layout.states, self.layout.values
        for m in self.graph.modules:
            kept = {
                name: x
                for name, x in m.settings.items()
                if (m.path, name) not in self.graph.changes
            }
            self.per_run[id(m)].training, self.per_run[id(m)].settings = m.training, kept
        for m in self.graph.modules[1:]:
            program, seen = self.per_run[id(m)], {
                v.id for v in (*m.inputs.values(), *m.outputs.values())
            }
            split = any(a.kind == SPLIT for actions in program.inputs.values() for a in actions)
            program.inside = split or any(
                states.get(i) is not None and i not in whole for i in seen
            )
        self.number()
        return self.merge()

    def at(self, call):
        return self.at_calls.setdefault(call.index, CallProgram())

    def actions(self, call, v):
        """The actions on a value as a call's argument; None where it is several, on which not the
        same is done."""
        if call.index not in self.done:
            done = self.done[call.index] = {}
            for p, x in call.inputs.items():
                done.setdefault(x.id, set()).add(tuple(self.layout.uses.get((call.index, p), ())))
        found = self.done[call.index].get(v.id, ())
        return next(iter(found)) if len(found) == 1 else None

    def uses(self, call):
        m = call.module
        for path, v in call.inputs.items():
            actions = tuple(self.layout.uses.get((call.index, path), ()))
            if v.param is None and not actions:
                continue
            at = (v.id, id(m))
            agree = all(self.actions(c, v) == actions for c in self.direct[at])
            if v.param is not None and not holds(m.inputs, v):
                agree = agree and at not in self.passed and m.path not in self.aside
                agree = (
                    agree and v.param not in self.graph.rewritten
                )  # several values, which may be treated otherwise
                self.per_run[id(m)].params[v.param] = actions if agree else ()
                if agree or not actions:
                    continue
            else:
                if v.param is not None:  # passed in by the module that read it
                    reader = m
                    while holds(reader.inputs, v) and reader.parent is not None:
                        reader = reader.parent
                    everywhere = [c for c in self.readers[v.id] if c.module.within(reader)]
                    same = all(self.actions(c, v) == actions for c in everywhere)
                    same = same and v.param not in self.graph.rewritten
                    self.per_run[id(reader)].params[v.param] = actions if same else ()
                    if same or not actions:
                        continue
                if agree and self.within[at] == len(self.direct[at]) and not holds(m.outputs, v):
                    given = [p for p, x in m.inputs.items() if x is v and m.path not in self.closed]
                    self.per_run[id(m)].inputs.update({p: actions for p in given})
                    self.per_run[id(m)].fixed.update(given if self.fixed(v) else ())
                    if given:
                        continue
            if call.opaque or call.hidden:
                raise LayoutError(call.opaque or HIDDEN, call, self.axis(call))
            self.at(call).inputs[path] = actions
            self.at(call).fixed.update([path] if self.fixed(v) else ())

    def fixed(self, v):
        """Whether no call writes to a value's memory once it is made."""
        return self.graph.last_write.get(v.memory.id, -1) <= (
            -1 if v.producer is None else v.producer
        )

    def value(self, v, actions):
        """Attach actions to a value where it is made, or, for a sum, at the view it was made of if
        a hook reaches it."""
        chain = [v]
        while actions[0].kind == SUM and chain[-1].producer is not None:
            call = self.graph.calls[chain[-1].producer]
            inputs = list(call.inputs.values())
            if (
                len(inputs) != 1
                or self.graph.use_count[inputs[0].id] != 1
                or inputs[0].id not in self.layout.states
            ):
                break
            if any(not linear(n) or n.mutated for n in call.nodes):
                break
            chain.append(inputs[0])
        for x in chain[::-1]:
            if self.output(x, actions):
                return
            if is_contiguous(x.shape, x.strides) and not is_contiguous(v.shape, v.strides):
                # a later dropout draws in the order of memory, which a collective makes that of the
                # dims
                break
        call = self.graph.calls[x.producer]
        at = [p for p, y in call.outputs.items() if y is x]
        if call.hidden:
            raise LayoutError(HIDDEN, call, self.axis(call))
        if not at or x.id in self.graph.made_in_place:
            raise LayoutError(
                "a tensor that was written to in place cannot be completed", call, self.axis(call)
            )
        self.at(call).outputs.update({p: actions for p in at})

    def output(self, v, actions):
        if v.producer is None:
            return False
        m = self.graph.calls[v.producer].module
        at = [p for p, x in m.outputs.items() if x is v]
        if (
            not at
            or m.path in self.closed
            or self.within[v.id, id(m)]
            or any(v is x for _, _, x in self.graph.held)
        ):
            return False
        self.per_run[id(m)].outputs.update({p: actions for p in at})
        return True

    def axis(self, call):
        """The axis that a call works on, or whose shards or partial results it was given."""
        states = {
            v.producer: s
            for v in call.inputs.values()
            if (s := self.layout.states.get(v.id)) is not None
        }
        found = (self.axis(self.graph.calls[i]) if s is PARTIAL else s for i, s in states.items())
        return self.layout.axis_of.get(call.index) or next(filter(None, found), None)

    def on_shards(self, call):
        """Whether a call works on shards or partial results."""
        states, whole = self.layout.states, self.layout.values
        shards = (
            v for v in call.inputs.values() if states.get(v.id) is not None and v.id not in whole
        )
        return call.index in self.layout.axis_of or any(True for _ in shards)

    def caller(self, call):
        """The module run that a call is numbered in."""
        return next(m for m in call.module.chain() if m.path not in self.aside)

    def number(self):
        """Give each call with a program its number among its module's own calls. A module that has
        shards in its own code is watched too: its calls must be those that were shown right."""
        watched = {self.caller(self.graph.calls[i]).path for i in self.at_calls}
        on_shards = {c.index for c in self.graph.calls if self.on_shards(c) or c.name in MAY_DRAW}
        unsteady = (c for c in self.graph.calls if c.index in on_shards and not c.module.steady)
        paths = watched | {self.caller(c).path for c in unsteady}
        for m in self.graph.modules[1:]:
            if self.per_run[id(m)].inside and not m.parent.steady:
                paths.add(next(x.path for x in m.parent.chain() if x.path not in self.aside))
        for m in self.graph.modules:
            if m.path in paths and (m.path in watched or id(m) not in self.graph.unsteady):
                self.per_run[id(m)].names = []
        for call in (call for call in self.graph.calls if not call.hidden):
            m = self.caller(call)
            program = self.per_run[id(m)]
            if program.names is None:
                continue
            if call.index in self.at_calls and not self.graph.numbered(call, m):
                raise LayoutError(UNNUMBERED, call, self.axis(call))
            if call.index in self.at_calls:
                program.calls[len(program.names)] = self.at_calls[call.index]
            if call.index in self.at_calls or call.index in on_shards:
                program.kinds[len(program.names)] = kind_of(call)
            program.names.append(call.name)

    def merge(self):
        """One program a module: runs of the same module must agree."""
        programs = {}
        for m in self.graph.modules:
            new, old = self.per_run[id(m)], programs.setdefault(m.path, self.per_run[id(m)])
            _share_params(old, new)
            if old != new:
                axis = next(
                    (self.axis(c) for c in self.graph.calls if c.module.within(m) and self.axis(c)),
                    None,
                )
                raise _Differ(m.path, axis)
            old.inside |= new.inside
            old.fixed &= new.fixed
            old.written = old.params.keys() & self.graph.rewritten
            old.aside = m.path in self.aside
            if (old.training, old.settings) != (new.training, new.settings):
                old.training = None
        return programs


def _share_params(old, new):
    """One run of a module may read a parameter that another does not (torch.func.functional_call):
    both show it."""
    read_once = old.params.keys() ^ new.params.keys()
    old.optional |= read_once
    both = {**new.params, **old.params}
    old.params, new.params = {**both}, {**both, **new.params}


def kind_of(call):
    """The CallKind of a call of the graph."""
    args, kwargs = call.args
    indexes = call.name in ("__getitem__", "__setitem__")  # their numbers are places
    named = set() if indexes else {d for node in call.nodes for d in _named_dims(node)}
    dims = []
    for path, x in leaves((args, kwargs)):
        is_int = isinstance(x, int) and not isinstance(x, bool)
        if (
            is_int
            and (x in named or call.name in NAME_DIMS)
            and not _in_slice((args, kwargs), path)
        ):
            dims.append(path[1:])
    return call_kind(call.func, args, kwargs, dims)


def _named_dims(node):
    """The dims that an operator's arguments name, counted from either end."""
    names = [a.name for a in node.op._schema.arguments]
    given = dict(zip(names, node.args)) | node.kwargs
    ndim = max((len(v.shape) for v in (*node.inputs, *node.outputs)), default=0)
    dims = [
        x
        for name, x in given.items()
        if name in DIM_NAMES
        for _, x in leaves(x)
        if isinstance(x, int)
    ]
    return {d + offset for d in dims for offset in (-ndim, 0, ndim)}


def _in_slice(obj, path):
    """Whether a path leads through a slice, whose numbers are no dims."""
    for key in path:
        if isinstance(obj, slice):
            return True
        obj = obj[key]
    return False
