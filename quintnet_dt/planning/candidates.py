"""What the planner chooses from: axes of the model, and ways to split one weight alone."""

from dataclasses import dataclass
from functools import cached_property
from math import prod

from ..axes.factors import leaves
from ..axes.sharding import Axis


@dataclass
class Candidate:
    """An axis of the model, tried alone: the parameters it runs through as {name: ShardedParam},
    the calls that touch it, bytes a step."""

    axis: Axis
    params: dict
    calls: list
    elements: int
    bytes: float = 0.0

    def conflicts(self, other):
        """Whether both cannot be sharded: a weight is split once, and a call works on one axis."""
        return not self.params.keys().isdisjoint(other.params) or not self.indices.isdisjoint(
            other.indices
        )

    @cached_property
    def indices(self):
        return frozenset(call.index for call in self.calls)


def regions(candidates):
    """Candidates in groups: those of different groups have no weight and no call in common."""
    group_of, groups = {}, {}
    for c in candidates:
        near = {
            id(group_of[key]): group_of[key] for key in (*c.params, *c.indices) if key in group_of
        }
        group = [c, *(o for g in near.values() for o in g)]
        for i in near:
            del groups[i]
        groups[id(group)] = group
        group_of.update((key, group) for o in group for key in (*o.params, *o.indices))
    return list(groups.values())


@dataclass
class Way:
    """One weight split alone. `gathered`: it is gathered before its use; else `partners` (biases)
    are split with it."""

    dim: int
    axis: Axis
    bytes: float
    gathered: bool
    partners: dict
    why: str = ""


def spans(dims):
    """Lists of adjacent factors: of each dim, and of each unequal piece of one."""
    for dim in dims:
        yield dim
        for f in dim:
            yield from spans(map(leaves, f.pieces or ()))


def indices(calls):
    return {call.index for call in calls}


def divides(factors, n):
    """Whether n ranks can share adjacent factors."""
    return prod(f.size for f in factors) % n == 0 and not any(f.opaque for f in factors)
