"""Repeated blocks of a model as one: layers 0 to 31 on a line."""

import re
from collections.abc import Iterable, Iterator
from itertools import count, groupby
from math import prod
from typing import Any


def folded(entries: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Entries that differ only in a layer's number, as one:
    ("layers.0-31.mlp.up.weight", entry)."""
    groups: dict[tuple, list] = {}
    for e in entries:
        key = (
            re.sub(r"\d+", "#", f"{e.name} {e.why}"),
            e.shape,
            e.dim,
            e.pieces,
            e.how,
        )
        groups.setdefault(key, []).append(
            (tuple(map(int, re.findall(r"\d+", e.name))), e)
        )
    for group in groups.values():
        parts = {(): group}
        if len(group) < prod(
            len(set(column)) for column in zip(*(numbers for numbers, _ in group))
        ):
            parts = {}  # some are missing: only the first number is joined
            for numbers, e in group:
                parts.setdefault(numbers[1:], []).append((numbers, e))
        for part in parts.values():
            spans = map(_ranges, zip(*(numbers for numbers, _ in part)))
            yield re.sub(r"\d+", lambda _: next(spans), part[0][1].name), part[0][1]


def _ranges(numbers):
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs = [
        list(run)
        for _, run in groupby(
            sorted(set(numbers)), key=lambda x, at=count(): x - next(at)
        )
    ]
    return ",".join(
        str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs
    )
