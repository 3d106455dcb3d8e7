"""Calls that can run on partial results, so that what they make is summed in their
place."""

from collections.abc import Iterable
from dataclasses import dataclass

from ..keys import ArgPath, ValueId
from ..tracing.graph import Call, Graph, Node, Value
from ..utils import is_float
from .operators import ADDITIVE, FIRST, linear, op_name

# A factor of a partial result gets a partial gradient, which is summed too: it is to be
# small.
SMALLER = 4


@dataclass(frozen=True)
class Deferred:
    """Where the replicated inputs lie that a call on partial ones scales them by, whose
    gradients will be partial, and those that it adds, which are to be added once."""

    factors: list[ArgPath]
    addends: list[ArgPath]


def deferred(graph: Graph, call: Call, partial: set[ValueId]) -> Deferred | None:
    """How a call runs on partial inputs; None where it cannot, or where that would not
    pay.

    Args: `partial`: ids of the call's inputs that are partial; its others are
    replicated.
    """
    if addends := _addends(graph, call, partial):
        return Deferred([], addends) if _shrinks(graph, call) else None
    factors = _scaled_by(graph, call, partial)
    return None if factors is None else Deferred(factors, [])


def _addends(graph: Graph, call: Call, partial: set[ValueId]) -> list[ArgPath]:
    """What a call adds to a partial input, and no more."""
    if len(call.nodes) != 1 or not _may_wait(graph, call, partial):
        return []
    (node,) = call.nodes
    sums = [v for v in node.inputs if v.id in partial]
    others = {v.id for v in node.inputs} - partial
    adds = op_name(node.op).removesuffix("_") in ADDITIVE
    if not adds or len(sums) != 1 or len(others) != 1:
        return []
    if node.outputs[0].shape != sums[0].shape:
        return []
    return [path for path, v in call.inputs.items() if v.id in others]


def _shrinks(graph: Graph, call: Call) -> bool:
    """Whether the calls that follow can run on a partial result until it is smaller."""
    (v,) = call.nodes[0].outputs
    size = v.nbytes
    while len(readers := graph.readers.get(v.id, [])) == 1:
        ((reader, _),) = readers
        if _scaled_by(graph, reader, {v.id}) is None or len(reader.outputs) != 1:
            return False
        (v,) = reader.outputs.values()
        if v.nbytes < size:
            return True
    return False


def _may_wait(graph: Graph, call: Call, partial: set[ValueId]) -> bool:
    """Whether nothing but a call, which is as it was each time, reads partial values."""
    if call.why_whole or call.own_backward:
        return False
    if not graph.numbered(call, call.module):
        return False
    return all(
        graph.use_count.get(i) == 1 and i not in graph.seen_by_hooks for i in partial
    )


def _scaled_by(graph: Graph, call: Call, partial: set[ValueId]) -> list[ArgPath] | None:
    """Where the replicated factors lie that a call scales partial inputs by; None where
    it does something else."""
    if not _may_wait(graph, call, partial):
        return None
    sums, factors = set(partial), set()
    for node in call.nodes:
        scales = _factors(node, sums)
        if scales is None:
            return None
        factors |= scales
        sums |= {v.id for v in node.outputs}
    if not factors <= {v.id for v in call.inputs.values()}:
        return None  # one is made within the call
    return [p for p, v in call.inputs.items() if v.id in factors and v.trainable]


def _factors(node: Node, sums: set[ValueId]) -> set[ValueId] | None:
    """The factors that a node scales a partial operand by; None where it cannot run on
    it."""
    x = _scaled(node, sums)
    if x is not None:
        factors = {v.id: v for v in node.inputs if v is not x and is_float(v)}
        return set(factors) if _worth_deferring(node, x, factors.values()) else None
    # An addend that is no float adds up, too.
    all_partial = sums.issuperset(v.id for v in node.inputs)
    return set() if all_partial and linear(node) else None


def _scaled(node: Node, sums: set[ValueId]) -> Value | None:
    """The one partial operand of a node that is linear in it, whatever its other
    operands are."""
    partial = [v for v in node.inputs if v.id in sums]
    if len(partial) != 1:
        return None
    name = op_name(node.op)
    if name == "mul" or (name in FIRST and node.inputs[0] is partial[0]):
        return partial[0]
    return None


def _worth_deferring(node: Node, x: Value, factors: Iterable[Value]) -> bool:
    """Whether what a node makes of a partial operand is a sum of no less precision, and
    the factors are small."""
    out = node.outputs[0]
    if not is_float(out) or node.kwargs.get("rounding_mode"):
        return False  # what is rounded is no longer linear
    in_better_precision = out.dtype.itemsize >= x.dtype.itemsize
    return in_better_precision and all(v.nbytes * SMALLER <= x.nbytes for v in factors)
