"""What an applied plan shards, in the graph of another forward."""

from dataclasses import replace
from itertools import combinations

from ..axes.axes import Axes, lone_axis, own_axis
from ..axes.sharding import Axis, ShardedParam, Sharding
from ..keys import CallIndex, ParamName
from ..plan import EXCHANGED, WEIGHT_GATHERED, Entry, TensorParallelPlan
from ..tracing.graph import Graph, Value
from .alone import indices
from .candidates import shareable, spans, stored

# Call -> the weights it uses that are split by themselves, and the axis of each.
_Alone = dict[CallIndex, dict[ParamName, Axis]]


def sharding_of(plan: TensorParallelPlan, graph: Graph, axes: Axes) -> Sharding:
    """The Sharding of an applied plan."""
    sharding = Sharding(loss_parallel=plan.loss_parallel)
    alone: _Alone = {}
    for name, entry in plan.entries.items():
        if entry.dim is None or name not in graph.params:
            continue
        axis = _axis_of_model(entry, entry.dim, graph.params[name], axes, plan.tp_size)
        if axis is None:
            sharding.params[name] = _split_alone(
                name, entry, entry.dim, graph, axes, alone
            )
        else:
            sharding.through.add(axis)
            exchanged = entry.how == EXCHANGED
            sharding.params[name] = ShardedParam(
                entry.dim, axis, entry.pieces, exchanged
            )
    return sharding


def _axis_of_model(
    entry: Entry, dim: int, value: Value, axes: Axes, n: int
) -> Axis | None:
    """The axis of the model along which a parameter is split as the plan says."""
    if not entry.units:
        return None
    exchanged = entry.how == EXCHANGED
    for factors in spans([axes.final(value)[dim]]):
        for i, j in combinations(range(len(factors) + 1), 2):
            if not shareable(factors[i:j], n):
                continue
            axis = Axis(tuple(factors[i:j]))
            if axis.size % n:
                if axis.size != entry.units:
                    continue
                axis = replace(axis, balanced=exchanged)
            split = axis.find(axes, value)
            if not split or split.dim != dim:
                continue
            # contiguous, or in pieces: as the plan has it
            ways = [stored(axis, split, n, contiguous) for contiguous in (True, False)]
            if any((w.exchanged, w.blocks) == (exchanged, entry.pieces) for w in ways):
                return axis
    return None


def _split_alone(
    name: ParamName, entry: Entry, dim: int, graph: Graph, axes: Axes, alone: _Alone
) -> ShardedParam:
    gathered = entry.how in (WEIGHT_GATHERED, EXCHANGED) or entry.pieces > 1
    axis = _axis_of_partner(name, entry, graph, axes, alone)
    if axis is None and gathered:
        axis = lone_axis(entry.shape[dim])
    elif axis is None:
        axis = own_axis(graph, name, dim)
    for call in graph.users.get(name, ()):
        alone.setdefault(call.index, {})[name] = axis
    return ShardedParam(dim, axis, entry.pieces, gathered=gathered)


def _axis_of_partner(
    name: ParamName, entry: Entry, graph: Graph, axes: Axes, alone: _Alone
) -> Axis | None:
    """The axis of a weight that is split by itself, which a bias is split along with:
    in all calls that use it."""
    calls = indices(graph.users.get(name, ()))
    if len(entry.shape) != 1 or not calls:
        return None
    for weight, axis in alone.get(min(calls), {}).items():
        split = axis.find(axes, graph.params[name])
        if (
            calls <= indices(graph.users[weight])
            and split
            and split.blocks == entry.pieces
        ):
            return axis
    return None
