"""Which candidates to take, of those that stand in each other's way: the set that saves
the most time, found exactly.

It is the independent set of the greatest weight in the graph of conflicts. With an axis
that runs through the whole model (the model dimension) decided either way, the others
fall apart into layers, so that branching on what conflicts most, and solving what falls
apart by itself, is quick.
"""

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from ..keys import CallIndex, ParamName
from .candidates import Candidate

# Numbers of candidates in a list.
_Numbers: TypeAlias = frozenset[int]

# So many branches are tried; what is left open then is decided greedily.
MOST_BRANCHES = 20_000


def best_set(candidates: Sequence[Candidate], saved: Sequence[float]) -> list[int]:
    """The numbers of candidates that do not conflict and save the most seconds in all,
    of which `saved` has each one's; of sets that save as much, one that shards more
    elements. In order."""
    search = _Search(candidates, saved)
    worth_it = frozenset(i for i, s in enumerate(saved) if s >= 0)
    return sorted(search.best(worth_it))


def conflicts(candidates: Sequence[Candidate]) -> list[set[int]]:
    """For each candidate, the numbers of those that cannot be taken with it: a weight
    is split once, and a call works on one axis."""
    at: dict[ParamName | CallIndex, list[int]] = {}
    for number, c in enumerate(candidates):
        for name in c.params:
            at.setdefault(name, []).append(number)
        for call in c.indices:
            at.setdefault(call, []).append(number)
    near: list[set[int]] = [set() for _ in candidates]
    for numbers in {tuple(numbers) for numbers in at.values()}:
        for number in numbers:
            near[number].update(numbers)
    for number, others in enumerate(near):
        others.discard(number)
    return near


class _Search:
    def __init__(self, candidates: Sequence[Candidate], saved: Sequence[float]):
        self.near = conflicts(candidates)
        self.saved, self.elements = saved, [c.elements for c in candidates]
        self.found: dict[_Numbers, _Numbers] = {}
        self.branches = 0

    def best(self, numbers: _Numbers) -> _Numbers:
        """The best set of these candidates."""
        parts = self.apart(numbers)
        return frozenset(i for part in parts for i in self.best_connected(part))

    def best_connected(self, numbers: _Numbers) -> _Numbers:
        """The best set of candidates that hang together: with that which conflicts
        most, or without it."""
        if len(numbers) == 1:
            return numbers
        if numbers not in self.found:
            self.branches += 1
            if self.branches > MOST_BRANCHES:
                return self.greedy(numbers)
            pivot = self.most_in_the_way(numbers)
            others = numbers - {pivot}
            without = self.best(others)
            taken = self.best(others - self.near[pivot]) | {pivot}
            self.found[numbers] = max(taken, without, key=self.worth)
        return self.found[numbers]

    def most_in_the_way(self, numbers: _Numbers) -> int:
        """The candidate that conflicts with most of the others."""
        most, found = -1, -1
        for i in sorted(numbers):
            conflicting = len(self.near[i] & numbers)
            if conflicting > most:
                most = conflicting
                found = i
        return found

    def greedy(self, numbers: _Numbers) -> _Numbers:
        chosen: set[int] = set()
        for i in sorted(numbers, key=lambda i: (-self.saved[i], i)):
            if self.near[i].isdisjoint(chosen):
                chosen.add(i)
        return frozenset(chosen)

    def worth(self, numbers: Iterable[int]) -> tuple[float, int]:
        order = sorted(numbers)
        saved = sum(self.saved[i] for i in order)
        # To nine digits: equal layers that are summed otherwise are no choice.
        return float(f"{saved:.9g}"), sum(self.elements[i] for i in order)

    def apart(self, numbers: _Numbers) -> list[_Numbers]:
        """Candidates in groups that do not conflict with each other's."""
        left, groups = set(numbers), []
        for start in sorted(numbers):
            if start not in left:
                continue
            left.discard(start)
            group, edge = {start}, [start]
            while edge:
                reached = self.near[edge.pop()] & left
                left -= reached
                group |= reached
                edge.extend(reached)
            groups.append(frozenset(group))
        return groups
