"""A plan as a user reads it, of a forward that was traced, or of none."""

from collections.abc import Mapping

from torch import nn

from ..axes.action import GATHER, Action
from ..axes.sharding import Axis, Sharding
from ..keys import ArgPath, CallIndex, ParamName, ValueId
from ..parts import named_parameters
from ..plan import (
    EXCHANGED,
    GATHERED,
    LOCAL,
    REPLICATED,
    WEIGHT_GATHERED,
    Entry,
    TensorParallelPlan,
)
from ..tracing.graph import Value
from ..tracing.trace import UnknownValues
from .cost import cost_of
from .layout import Layout
from .task import Task
from .where import communications, numbered

_BY_ITSELF = "split by itself: no axis of it was found that other weights share"


def why_blind(failed: Exception | None) -> str:
    """What to say of a plan that was made without a forward."""
    if isinstance(failed, UnknownValues):
        return (
            f"planned without a forward: {failed}; for a better plan, make it with the"
            " model's values"
        )
    return (
        "planned without a forward: no inputs were given and none that were made up"
        f" fit ({type(failed).__name__}: {str(failed)[:200]}); give example_inputs for"
        " a better plan"
    )


def blind_plan(
    model: nn.Module,
    n: int,
    user_dims: Mapping[ParamName, int | None],
    note: str,
    applied: Mapping[ParamName, Entry],
) -> TensorParallelPlan:
    """Every large weight split on its longest dim, but for those that are split
    already."""
    plan = TensorParallelPlan(n, note=note)
    for name, p in named_parameters(model):
        longest = max(range(p.dim()), key=lambda d: p.shape[d], default=None)
        worth_it = p.dim() > 1 and p.shape[longest] >= n
        dim = user_dims.get(name, longest if worth_it else None)
        pieces = applied[name].pieces if name in applied else 1
        how = REPLICATED if dim is None else GATHERED
        plan.entries[name] = Entry(name, tuple(p.shape), dim, pieces, how)
    return plan


def describe(
    task: Task,
    sharding: Sharding,
    layout: Layout,
    user_dims: Mapping[ParamName, int | None],
) -> TensorParallelPlan:
    """The plan as a user reads it."""
    cost = cost_of(task.graph, layout, task.traced_work)
    numbers = numbered(task, sharding)
    plan = TensorParallelPlan(
        task.n,
        cost=cost,
        loss_parallel=task.loss_parallel,
        communications=communications(task, layout, numbers),
    )
    completed = _Completed(task, layout)
    for name, v in task.params.items():
        entry = plan.entries[name] = _entry(task, sharding, completed, name, v)
        if entry.units:
            entry.axis = numbers[sharding.params[name].axis]
        if name in user_dims and task.n > 1:
            plan.entries[name].why = "set by the user"
    return plan


def _entry(
    task: Task, sharding: Sharding, completed: "_Completed", name: ParamName, v: Value
) -> Entry:
    param = sharding.params.get(name)
    if param is None:
        why = "small" if task.n > 1 else "one rank holds all"
        return Entry(name, v.shape, why=why)
    why = task.why.get(name, _BY_ITSELF)
    entry = Entry(name, v.shape, param.dim, param.blocks, GATHERED, why)
    if param.gathered:
        entry.how = WEIGHT_GATHERED
        if not task.users.get(name):
            entry.why = "the traced forward did not reach it"
    elif param.axis in sharding.through:
        size = param.axis.size
        entry.units = size
        entry.why = f"an axis of {size} units, {-(-size // task.n)} a rank"
        if param.exchanged:
            entry.how = EXCHANGED
        elif not completed.at_once(name, param.axis):
            entry.how = LOCAL
    return entry


class _Completed:
    """Which weights compute on shards only to have their results gathered by all that
    reads them."""

    def __init__(self, task: Task, layout: Layout):
        self.users, self.layout = task.users, layout
        self.readers: dict[ValueId, list[tuple[CallIndex, ArgPath]]] = {}
        for call in task.graph.calls:
            for path, v in call.inputs.items():
                self.readers.setdefault(v.id, []).append((call.index, path))

    def at_once(self, name: ParamName, axis: Axis) -> bool:
        """Whether all that is made of a weight on shards of `axis` is gathered where it
        is made or next used."""
        calls = [
            c
            for c in self.users.get(name, ())
            if self.layout.axis_of.get(c.index) == axis
        ]
        made = [v.id for call in calls for v in call.outputs.values()]
        sharded = [i for i in made if self.layout.states.get(i) == axis]
        return bool(sharded) and all(map(self.gathered, sharded))

    def gathered(self, value: ValueId) -> bool:
        if _gathers(self.layout.values.get(value)):
            return True
        readers = self.readers.get(value, ())
        return bool(readers) and all(
            _gathers(self.layout.uses.get(at)) for at in readers
        )


def _gathers(actions: list[Action] | None) -> bool:
    return actions is not None and len(actions) > 0 and actions[0].kind == GATHER
