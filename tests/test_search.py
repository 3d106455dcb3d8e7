"""The search among axes that stand in each other's way, against brute force."""

import random
from itertools import chain, combinations

import pytest

from quintnet_dt.planning import search
from quintnet_dt.planning.search import best_set, conflicts


class Axis:
    """As much of a Candidate as the search asks for."""

    def __init__(self, params, calls):
        self.params, self.indices = dict.fromkeys(params), frozenset(calls)
        self.elements = len(params)


def instance(seed, layers=3):
    """A model's: layers of axes that conflict with each other, wide ones that conflict
    with all."""
    draw = random.Random(seed)
    found = []
    for layer in range(layers):
        for _ in range(draw.randint(1, 4)):
            params = draw.sample([f"{layer}.{i}" for i in range(4)], 2)
            found.append(Axis(params, draw.sample(range(9 * layer, 9 * layer + 9), 2)))
    for _ in range(draw.randint(0, 2)):
        params = [p for c in found if draw.random() < 0.7 for p in c.params]
        found.append(Axis(dict.fromkeys(params), draw.sample(range(9 * layers), 5)))
    draw.shuffle(found)
    return found, [draw.uniform(-0.2, 1) * (1 + 3 * (len(c.params) > 4)) for c in found]


def brute_force(candidates, saved):
    near = conflicts(candidates)
    numbers = range(len(candidates))
    sets = chain.from_iterable(
        combinations(numbers, k) for k in range(len(numbers) + 1)
    )
    free = [s for s in sets if not any(a in near[b] for a, b in combinations(s, 2))]
    return max(sum(saved[i] for i in s) for s in free)


@pytest.mark.parametrize("seed", range(60))
def test_it_finds_the_best_set(seed):
    candidates, saved = instance(seed)
    chosen = best_set(candidates, saved)
    near = conflicts(candidates)
    assert not any(a in near[b] for a, b in combinations(chosen, 2))
    best = brute_force(candidates, saved)
    assert sum(saved[i] for i in chosen) == pytest.approx(best, rel=1e-8)


def test_conflicts_are_weights_and_calls_in_common():
    a, b, c = Axis("xy", [1]), Axis("yz", [2]), Axis("w", [2, 3])
    assert conflicts([a, b, c]) == [{1}, {0, 2}, {1}]


def test_of_equal_sets_the_one_that_shards_more():
    small, large = Axis("x", [1]), Axis("xyz", [2])
    assert best_set([small, large], [0.5, 0.5]) == [1]


def test_layers_are_decided_one_by_one(monkeypatch):
    """Eighty layers under one wide axis: branches grow with the layers, not with their
    power set."""
    layers = [
        Axis([f"{i}.{j}", f"{i}.{k}"], [])
        for i in range(80)
        for j, k in ((0, 1), (1, 2), (2, 3), (3, 0))
    ]
    wide = Axis([p for c in layers for p in c.params], [])
    seen = []
    connected = search._Search.best_connected
    monkeypatch.setattr(
        search._Search,
        "best_connected",
        lambda self, numbers: seen.append(numbers) or connected(self, numbers),
    )
    chosen = best_set([wide, *layers], [100.0, *[1.0] * len(layers)])
    assert len(chosen) == 160 and 0 not in chosen
    assert len(seen) < 20 * 80


def test_beyond_its_budget_it_still_answers(monkeypatch):
    monkeypatch.setattr(search, "MOST_BRANCHES", 0)
    candidates, saved = instance(1)
    chosen, near = best_set(candidates, saved), conflicts(candidates)
    assert chosen and not any(a in near[b] for a, b in combinations(chosen, 2))
