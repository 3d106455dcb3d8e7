"""Whether a call that can work on shards is to."""

from collections.abc import Iterable
from typing import TypeAlias

from ..axes.state import State
from ..keys import ModulePath, ValueId
from ..tracing.graph import Call, Value
from .analysis import Analysis

# (Module's path, call's name, line of code) -> whether it is dearer on shards.
Decided: TypeAlias = dict[tuple[ModulePath, str, str], bool]


def dearer(
    call: Call,
    analysis: Analysis,
    state: dict[ValueId, State],
    before: Decided,
    now: Decided,
) -> str:
    """Why a call is not worth running on shards, though it could: what it needs split
    is larger than they are. One line of code is decided once (`now`), and as `before`:
    on the path that a forward leaves, which what ran must be the same on."""
    shards = [analysis.external[i] for i, s in state.items() if s is not None]
    split = [v for i in analysis.slices if (v := analysis.external[i]).differentiable]
    if any(v.param for v in shards) or not split:
        return ""
    key = call.module.path, call.name, call.source
    now[key] = before.get(key, now.get(key, size(split) > size(shards)))
    return "its other inputs are larger than its shards" if now[key] else ""


def size(values: Iterable[Value]) -> int:
    return sum(v.nbytes for v in values)
