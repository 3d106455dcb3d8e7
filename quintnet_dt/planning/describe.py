"""A plan as a user reads it, of a forward that was traced, or of none."""

from ..axes.action import GATHER
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
from ..tracing.trace import UnknownValues
from .cost import cost


def why_blind(failed):
    """What to say of a plan that was made without a forward."""
    if isinstance(failed, UnknownValues):
        return (
            f"planned without a forward: {failed}; for a better plan, make it with the model's"
            " values"
        )
    return (
        "planned without a forward: no inputs were given and none that were made up fit"
        f" ({type(failed).__name__}: {str(failed)[:200]}); give example_inputs for a better plan"
    )


def blind_plan(model, n, fixed, note, kept):
    """Every large weight split on its longest dim, but for those that are split already."""
    plan = TensorParallelPlan(n, bytes_per_step=None, note=note)
    for name, p in named_parameters(model):
        longest = max(range(p.dim()), key=lambda d: p.shape[d], default=None)
        dim = fixed.get(name, longest if p.dim() > 1 and p.shape[longest] >= n else None)
        pieces = kept[name].pieces if name in kept else 1
        plan.entries[name] = Entry(
            name, tuple(p.shape), dim, pieces, REPLICATED if dim is None else GATHERED
        )
    return plan


def describe(planner, sharding, layout, fixed):
    """The plan as a user reads it."""
    plan = TensorParallelPlan(
        planner.n, bytes_per_step=round(cost(planner.graph, layout, planner.n))
    )
    plan.loss_parallel = planner.loss_parallel
    completed = _Completed(planner, layout)
    for name, v in planner.params.items():
        entry = plan.entries[name] = Entry(name, v.shape, why=planner.why.get(name, ""))
        param = sharding.params.get(name)
        if param is None:
            entry.why = "small" if planner.n > 1 else "one rank holds all"
            continue
        axis, entry.dim, entry.pieces = param.axis, param.dim, param.blocks
        if param.gathered:
            entry.how = WEIGHT_GATHERED
            entry.why = (
                entry.why if planner.users.get(name) else "the traced forward did not reach it"
            )
        elif axis in sharding.through:
            entry.units = axis.size
            entry.why = f"an axis of {axis.size} units, {axis.size // planner.n} a rank"
            if param.exchanged:
                entry.how = EXCHANGED
            else:
                entry.how = GATHERED if completed.at_once(name, axis) else LOCAL
        else:
            entry.how = GATHERED
    for name in fixed.keys() & plan.entries.keys() if planner.n > 1 else ():
        plan.entries[name].why = "set by the user"
    return plan


class _Completed:
    """Which weights compute on shards only to have their results gathered by all that reads
    them."""

    def __init__(self, planner, layout):
        self.users, self.layout, self.readers = planner.users, layout, {}
        for call in planner.graph.calls:
            for path, v in call.inputs.items():
                self.readers.setdefault(v.id, []).append((call.index, path))

    def at_once(self, name, axis):
        """Whether all that is made of a weight on shards of `axis` is gathered where it is made or
        next used."""
        calls = [
            call for call in self.users.get(name, ()) if self.layout.axis_of.get(call.index) == axis
        ]
        made = [v.id for call in calls for v in call.outputs.values()]
        sharded = [i for i in made if self.layout.states.get(i) == axis]
        return bool(sharded) and all(map(self._gathered, sharded))

    def _gathered(self, value):
        if _gathers(self.layout.values.get(value)):
            return True
        readers = self.readers.get(value, ())
        return bool(readers) and all(_gathers(self.layout.uses.get(at)) for at in readers)


def _gathers(actions):
    return bool(actions) and actions[0].kind == GATHER
