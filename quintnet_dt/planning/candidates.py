"""The axes of a model that can be sharded: what the planner chooses from."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import prod

from ..axes.factors import Factor, flat, leaves
from ..axes.sharding import Axis, ShardedParam
from ..axes.split import Split
from ..contiguous import in_one_block
from ..keys import CallIndex, ParamName
from ..tracing.graph import Call
from .task import Task


@dataclass
class Candidate:
    """An axis of the model, tried alone: the parameters that it runs through, the calls
    that touch it, and the seconds that a step takes more than with nothing sharded."""

    axis: Axis
    params: dict[ParamName, ShardedParam]
    calls: list[Call]
    elements: int
    seconds: float = 0.0

    @cached_property
    def indices(self) -> frozenset[CallIndex]:
        return frozenset(call.index for call in self.calls)


def candidates(task: Task) -> Iterator[Candidate]:
    """Every axis of the model that the ranks can share."""
    for factors, names in _axes_of_params(task).items():
        splits = _splits_along(task, Axis(factors), names)
        axis = Axis(factors, balanced=_balanced(splits.values(), task.n))
        params = {
            name: stored(
                axis,
                split,
                task.n,
                in_one_block(task.contiguous, split.dim, len(task.params[name].shape)),
            )
            for name, split in splits.items()
        }
        elements = sum(map(task.numel, params))
        touched = {i: c for f in factors for i, c in task.calls_with.get(f, {}).items()}
        calls = [call for _, call in sorted(touched.items())]
        # an axis of weights that the forward did not reach runs nowhere
        if elements and calls:
            yield Candidate(axis, params, calls, elements)


def _axes_of_params(task: Task) -> dict[tuple[Factor, ...], list[ParamName]]:
    """Adjacent factors -> parameters with them: one that the ranks can share, or as
    many as it takes for n to divide them."""
    found: dict[tuple[Factor, ...], list[ParamName]] = {}
    for name, v in task.params.items():
        for factors in spans(task.axes.final(v)):
            for i, j in combinations(range(len(factors) + 1), 2):
                fewer_do = j - i > 1 and divides(factors[i : j - 1], task.n)
                if shareable(factors[i:j], task.n) and not fewer_do:
                    found.setdefault(tuple(factors[i:j]), []).append(name)
    return found


def _splits_along(
    task: Task, axis: Axis, names: Iterable[ParamName]
) -> dict[ParamName, Split]:
    """How an axis splits those of some parameters that it can."""
    splits = {}
    of_inputs = not task.input_factors.isdisjoint(flat(axis.factors))
    for name in dict.fromkeys(names):
        split = axis.find(task.axes, task.params[name])
        if not split or not task.may_split(name, split.dim):
            continue
        if of_inputs and split.dim in task.cut_by_numbers.get(name, ()):
            continue  # a table of positions, of which another input takes other rows
        splits[name] = split
    return splits


def _balanced(splits: Iterable[Split], n: int) -> bool:
    """Whether an axis is dealt out in balance: unevenly, but for one whose units are
    single rows, which lie where DTensor shards them."""
    as_stored = all(split.blocks == 1 and split.width == 1 for split in splits)
    return not as_stored and any(split.units % n for split in splits)


def stored(axis: Axis, split: Split, n: int, contiguous: bool) -> ShardedParam:
    """How a parameter is stored that an axis of the model splits so."""
    in_one_block = split.blocks == 1
    if axis.size % n:
        as_used = in_one_block and split.width == 1 and not axis.balanced
    else:
        as_used = in_one_block if contiguous else split.blocks is not None
    if not as_used:
        return ShardedParam(split.dim, axis, exchanged=True)
    return ShardedParam(split.dim, axis, split.blocks or 1)


def spans(dims: Iterable[Sequence[Factor]]) -> Iterator[Sequence[Factor]]:
    """Lists of adjacent factors: of each dim, and of each unequal piece of one."""
    for factors in dims:
        yield factors
        for f in factors:
            yield from spans(map(leaves, f.pieces or ()))


def shareable(factors: Sequence[Factor], n: int) -> bool:
    """Whether n ranks can share adjacent factors: evenly, or in whole units, of one
    factor or of heads in groups, where no more than half of the ranks are left with
    nothing."""
    if divides(factors, n):
        return True
    units = prod(f.size for f in factors)
    in_units = len(factors) <= 2 and 2 * units >= n
    return in_units and not any(f.unshardable for f in factors)


def divides(factors: Sequence[Factor], n: int) -> bool:
    """Whether n ranks can share adjacent factors evenly."""
    return prod(f.size for f in factors) % n == 0 and not any(
        f.unshardable for f in factors
    )
