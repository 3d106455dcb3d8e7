"""What a layout costs: bytes that a rank sends, and the seconds of a step.

A step takes what a rank computes (work.py), whether others compute the same or not, and
what it sends. Nothing is taken to overlap. The model of time is that of Alpa
(https://arxiv.org/abs/2201.12023) and FlexFlow: peak rates, bytes over a link, and a
latency for each collective.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from math import fsum

from ..axes.action import (
    ADD_ONCE,
    EXCHANGE,
    GATHER,
    MEAN,
    SPLIT,
    SUM,
    SUM_GRADIENT,
    TAKE_HEADS,
    TO_DTENSOR,
    Action,
)
from ..axes.split import Split
from ..costs import Cost
from ..devices import DeviceSpec
from ..exchange import most_sent
from ..keys import CallIndex, ValueId
from ..tracing.graph import Graph, Value
from .layout import Layout
from .statistics import row_bytes
from .work import Work

# How often a rank sends its part of a tensor in the forward; those that send in the
# backward alone.
_FORWARD = {SUM: 2, MEAN: 2, GATHER: 1, TO_DTENSOR: 0}
_BACKWARD = {SUM_GRADIENT: 2, SPLIT: 1, TAKE_HEADS: 2}
# Done once for all that read a value.
_OF_READERS = {SUM_GRADIENT, SPLIT}


@dataclass(frozen=True)
class _Exchange:
    """What calls that take statistics over their shards send of each row: how many
    numbers are gathered from all ranks, how many summed, and in how many collectives.
    `twice`: their gradients are sent too."""

    gathered: int
    summed: int
    collectives: int
    twice: bool = False


_STATISTICS = {
    # a maximum, a sum and the target's logit
    "cross_entropy": _Exchange(gathered=1, summed=2, collectives=3),
    # a mean and a sum of squares
    "layer_norm": _Exchange(gathered=2, summed=0, collectives=1, twice=True),
    "group_norm": _Exchange(gathered=2, summed=0, collectives=1, twice=True),
    # a sum of squares
    "rms_norm": _Exchange(gathered=0, summed=1, collectives=1, twice=True),
}


@dataclass(frozen=True)
class Sent:
    """What a rank sends in one forward and backward."""

    bytes: float
    collectives: float

    def seconds(self, device: DeviceSpec) -> float:
        return self.bytes / device.link_bandwidth + self.collectives * device.latency


def sent(graph: Graph, layout: Layout, work: Work, in_part: bool = False) -> Sent:
    """What a rank sends under ring collectives (as counted in
    https://arxiv.org/abs/1909.09756): 2 (n-1)/n of the tensor for an all-reduce,
    (n-1)/n of the whole tensor for a gather.

    Args: `in_part`: of a layout in which most weights are whole: what a value's other
    readers would need too, once they are sharded, is shared with them.
    """
    uses, n = Counter(_actions(graph, layout)), work.n
    collectives, amounts = 0.0, []
    for (i, action), times in uses.items():
        value = graph.values[i]
        share = 1.0
        if in_part and action.kind in _OF_READERS:
            share = min(1.0, times / max(1, work.multiplied.get(i, 1)))
        amounts.append(share * action_bytes(value, action, work))
        collectives += share * _collectives(value, action, n)
    for i, shard in layout.instead.items():
        if (exchange := _STATISTICS.get(shard.call)) is None:
            continue
        call = graph.calls[i]
        backward = any(v.differentiable for v in call.inputs.values())
        times = 2 if exchange.twice and backward else 1
        numbers = exchange.gathered * n + exchange.summed * 2
        amounts.append(times * numbers * row_bytes(call, work) * (n - 1) / n)
        collectives += times * exchange.collectives
    # rounded once: the same in any order
    return Sent(fsum(amounts), round(collectives, 6))


@dataclass(frozen=True)
class Change:
    """What a layout changes in the seconds of a step, against the whole model on one
    rank. `sending`: for its collectives; `computed`: by others, of each call."""

    sending: float = 0.0
    computed: dict[CallIndex, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """That a step takes more."""
        return self.sending - fsum(self.computed.values())


def change_by(graph: Graph, layout: Layout, work: Work) -> Change:
    """What a layout changes in the seconds of a step."""
    computed = {
        i: work.whole[i] - work.seconds(graph.calls[i], axis)
        for i, axis in layout.axis_of.items()
    }
    return Change(
        sent(graph, layout, work, in_part=True).seconds(work.device), computed
    )


def change_by_gather(value: Value, work: Work) -> Change:
    """What it changes to gather a weight before its use."""
    share = work.nbytes(value) * (work.n - 1) / work.n
    return Change(Sent(share, 1).seconds(work.device))


def cost_of(graph: Graph, layout: Layout, work: Work) -> Cost:
    """What a step costs by a layout."""
    communication = sent(graph, layout, work)
    whole = work.share(graph.calls, {})
    local = work.share(graph.calls, layout.axis_of)
    return Cost(
        flops=round(local.flops),
        whole_flops=round(whole.flops),
        bytes_sent=round(communication.bytes),
        collectives=round(communication.collectives),
        activation_bytes=round(local.activation_bytes),
        whole_activation_bytes=round(whole.activation_bytes),
        compute_seconds=fsum(local.seconds),
        communication_seconds=communication.seconds(work.device),
        device=work.device.name,
        inputs=_named(graph.modules[0].inputs.values()),
    )


def _named(inputs: Collection[Value]) -> str:
    """Inputs by their shapes and dtypes."""
    shown = [
        f"{' x '.join(map(str, v.shape)) or 'scalar'} {str(v.dtype)[6:]}"
        for v in inputs
    ]
    return ", ".join(dict.fromkeys(shown)) or "no tensors"


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


def action_bytes(value: Value, action: Action, work: Work) -> float:
    """Bytes that a rank sends for one action on a value, forward and backward."""
    n = work.n
    share = work.nbytes(value) * (n - 1) / n
    if action.kind == EXCHANGE:
        split = action.split
        rows = most_sent(split, n, value.differentiable)
        return work.nbytes(value) * rows / split.length
    if action.kind in (GATHER, SPLIT) and action.split.units:
        # parts are filled up to the longest
        share *= n * action.split.sizes(n)[0] / action.split.units
    if action.kind == ADD_ONCE:
        return 2 * share if _shared_unevenly(value, action, n) else 0
    if action.kind in _BACKWARD:
        return share * _BACKWARD[action.kind] if value.differentiable else 0
    return share * _FORWARD[action.kind]


def _shared_unevenly(value: Value, action: Action, n: int) -> bool:
    """Whether the gradient of an addend is the first rank's: see actions.py."""
    return value.differentiable and action.split.units % n > 0


def _collectives(value: Value, action: Action, n: int) -> int:
    """How many collectives one action on a value is, forward and backward."""
    if action.kind == TO_DTENSOR:
        return 0
    if action.kind == ADD_ONCE:
        return int(_shared_unevenly(value, action, n))
    if action.kind in _BACKWARD:
        return int(value.differentiable)
    return 2 if action.kind == EXCHANGE and value.differentiable else 1
