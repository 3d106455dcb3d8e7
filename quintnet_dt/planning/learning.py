"""Programs for a call of a split model that was not traced before, shown right before
it runs."""

import logging
from collections.abc import Callable
from dataclasses import replace

from ..axes.axes import Axes
from ..axes.sharding import LayoutError
from ..keys import ParamName
from ..parts import named_modules, named_parameters
from ..plan import TensorParallelPlan
from ..running.context import AGAIN
from ..running.program import Program, Programs
from ..running.record import UserCall
from ..running.structure import hooks_on, pass_added
from ..tracing.graph import Graph
from ..tracing.trace import trace
from ..utils import has_state, leaves
from .applied import sharding_of
from .planner import Planner
from .settle import settle
from .signature import device_of
from .task import Task

_LOG = logging.getLogger(__name__)


def learn(
    call: UserCall,
    plan: TensorParallelPlan,
    any_rank: Callable[[bool], bool],
    dear: dict | None,
) -> Programs:
    """The programs of the module that is called and of those within, by their paths in
    it.

    Args: `any_rank`: as `trace` wants it; `dear`: as Layout has it, from another path
    of such a call.
    Raises: RuntimeError, where the call cannot be shown right.
    """
    names = parameter_names(call)
    pass_added(call.module)
    graph = _trace(call, any_rank)
    axes = Axes(graph)
    within = replace(plan, entries={inner: plan[name] for inner, name in names.items()})
    device = device_of(call.module)
    try:
        sharding = sharding_of(within, graph, axes)
        if dear is not None:
            sharding.dear = dear
        planner = Planner(Task(graph, axes, plan.tp_size))
        settled = settle(planner, call.module, call.args, call.kwargs, device, sharding)
    except LayoutError as e:
        _LOG.info("%s, in a new way: cannot be shown right: %s", call.name, e)
        raise RuntimeError(
            f"{call.name} was called in a way that was not traced before,"
            f" and it cannot be shown right on shards: {e}"
        ) from e
    _LOG.info("%s was called in a new way: traced and shown right", call.name)
    return {
        path: _renamed(program, names) for path, program in settled.programs.items()
    }


def parameter_names(call: UserCall) -> dict[ParamName, ParamName]:
    """The name in the model that was split of each parameter of the module that is
    called, by its name there."""
    names = {
        id(module._parameters.get(attr)): name
        for name, places in call.owners.items()
        for module, attr in places
    }
    mine = dict(named_parameters(call.module))
    if added := [inner for inner, p in mine.items() if id(p) not in names]:
        raise RuntimeError(
            f"{', '.join(added[:5])}: expected the parameters that were split, found"
            f" others: {AGAIN}"
        )
    return {inner: names[id(p)] for inner, p in mine.items()}


def _trace(call: UserCall, any_rank: Callable[[bool], bool]) -> Graph:
    device = device_of(call.module)
    try:
        return trace(
            call.module, call.args, call.kwargs, device=device, any_rank=any_rank
        )
    except Exception as e:
        if not any(has_state(x) for _, x in leaves((call.args, call.kwargs))):
            raise
        raise RuntimeError(
            f"{call.name} was given an object whose tensors do not fit its"
            " forward; if they are this rank's shards from an earlier call (a key-value"
            f" cache?), give it that object as that call left it: {e}"
        ) from e


def _renamed(program: Program, names: dict[ParamName, ParamName]) -> Program:
    """A program whose parameters have their names in the model."""
    return replace(
        program,
        params={names[inner]: actions for inner, actions in program.params.items()},
        optional={names[inner] for inner in program.optional},
        written={names[inner] for inner in program.written},
    )


def at_split(call: UserCall, programs: Programs) -> Programs:
    """The programs by the paths that the modules had when the model was split; a shared
    one has its first, and one that was added since the path where it is now."""
    context, found = hooks_on(call.module).context, {}
    for inner, module in named_modules(call.module):
        hooks = hooks_on(module)
        ours = hooks is not None and hooks.context is context
        path = hooks.path if ours else ".".join(filter(None, (call.path, inner)))
        if inner in programs:
            found[path] = programs[inner]
    return found


def completed(defaults: Programs, programs: Programs) -> Programs:
    """Programs of one forward, with the default ones of modules that it did not reach.
    A module that it reached shows its parameters that nobody read too, whole, for
    another path through its code."""
    read = {name for program in programs.values() for name in program.params}
    found = {**defaults, **programs}
    for path in defaults.keys() & programs.keys():
        program, default = programs[path], defaults[path]
        unread = {
            name: actions
            for name, actions in default.params.items()
            if name not in read
        }
        optional = program.optional | unread.keys()
        found[path] = replace(
            program, params={**program.params, **unread}, optional=optional
        )
    return found
