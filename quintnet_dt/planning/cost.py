"""What a layout sends: bytes by action."""

from collections.abc import Iterator
from math import fsum

from ..axes.action import (
    ADD_ONCE,
    EXCHANGE,
    GATHER,
    MEAN,
    SPLIT,
    SUM,
    SUM_GRADIENT,
    TO_DTENSOR,
    Action,
)
from ..axes.split import Split
from ..keys import ValueId
from ..tracing.graph import Graph, Value
from .layout import Layout

# How often a rank sends its part of a tensor in the forward; those that send in the
# backward alone.
_FORWARD = {SUM: 2, MEAN: 2, GATHER: 1, ADD_ONCE: 0, TO_DTENSOR: 0}
_BACKWARD = {SUM_GRADIENT: 2, SPLIT: 1}

# A cross entropy over classes exchanges for each row a maximum, a sum and the target's
# logit.
_LOSS_PASSES = 5


def cost(graph: Graph, layout: Layout, n: int) -> float:
    """Bytes that a rank sends in one forward and backward, under ring collectives (as
    counted in https://arxiv.org/abs/1909.09756): 2 (n-1)/n of the tensor for an
    all-reduce, (n-1)/n of the whole tensor for a gather.
    """
    done = set(_actions(graph, layout))
    # Rounded once: the same in any order of the set.
    sent = fsum(action_bytes(graph.values[i], action, n) for i, action in done)
    losses = [
        (i, x.split) for i, x in layout.instead.items() if x.call == "cross_entropy"
    ]
    rows = fsum(
        max(v.nbytes for v in graph.calls[i].inputs.values()) / classes.units
        for i, classes in losses
    )
    return sent + _LOSS_PASSES * rows * (n - 1) / n


def _actions(graph: Graph, layout: Layout) -> Iterator[tuple[ValueId, Action]]:
    """Every action on a value: what several calls read is communicated once."""
    for (i, path), actions in layout.uses.items():
        yield from ((graph.calls[i].inputs[path].id, a) for a in actions)
    for value, actions in layout.values.items():
        yield from ((value, a) for a in actions)
    for path, actions in layout.root.items():
        yield from ((graph.outputs[path].id, a) for a in actions)
    for i, at in layout.buffers.items():  # buffers are gathered after the call
        for path, a in at.items():
            yield graph.calls[i].inputs[path].id, Action(GATHER, Split(a.split.dim, 0))


def action_bytes(value: Value, action: Action, n: int) -> float:
    """Bytes that a rank sends for one action on a value, forward and backward."""
    share = value.nbytes * (n - 1) / n
    if action.kind == EXCHANGE:
        return share * (2 if value.differentiable else 1) / n
    if action.kind in _BACKWARD:
        return share * _BACKWARD[action.kind] if value.differentiable else 0
    return share * _FORWARD[action.kind]
