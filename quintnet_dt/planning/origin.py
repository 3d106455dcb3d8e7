"""Where the shards and partial results that a call is given come from."""

from ..axes.sharding import Axis
from ..axes.state import PARTIAL
from ..tracing.graph import Call, Graph
from .layout import Layout


def axis_behind(call: Call, graph: Graph, layout: Layout) -> Axis | None:
    """The axis that a call works on, or whose shards or partial results it was
    given."""
    if call.index in layout.axis_of:
        return layout.axis_of[call.index]
    for v in call.inputs.values():
        state = layout.states.get(v.id)
        if state is PARTIAL:
            state = axis_behind(graph.calls[v.producer], graph, layout)
        if isinstance(state, Axis):
            return state
    return None


def on_shards(call: Call, layout: Layout) -> bool:
    """Whether a call works on shards or partial results."""
    if call.index in layout.axis_of:
        return True
    values = call.inputs.values()
    return any(
        layout.states.get(v.id) is not None and v.id not in layout.values
        for v in values
    )
