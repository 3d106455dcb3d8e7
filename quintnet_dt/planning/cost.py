"""What a layout sends, and how to send less: bytes by action, and reductions moved to where there
are fewer."""

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


def cost(graph, layout, n):
    """Bytes that a rank sends in one forward and backward, under ring collectives (as counted in
    https://arxiv.org/abs/1909.09756): 2 (n-1)/n of the tensor for an all-reduce, (n-1)/n of the
    whole tensor for a gather.
    """
    seen = {(graph.calls[i].inputs[path].id, tuple(a)) for (i, path), a in layout.uses.items()}
    seen |= {(v, tuple(a)) for v, a in layout.values.items()}
    seen |= {(graph.outputs[p].id, tuple(a)) for p, a in layout.root.items()}
    seen = {(v, a) for v, actions in seen for a in actions}
    for i, at in layout.kept.items():
        seen |= {
            (graph.calls[i].inputs[p].id, Action(GATHER, Split(a.split.dim, 0)))
            for p, a in at.items()
        }
    losses = [(graph.calls[i], a) for i, a in layout.instead.items() if a.call == "cross_entropy"]
    rows = fsum(max(v.nbytes for v in call.inputs.values()) / a.split.units for call, a in losses)
    sent = fsum(
        action_bytes(graph.values[v], a, n) for v, a in seen
    )  # rounded once: the same in any order of the set
    return sent + 5 * rows * (n - 1) / n


def action_bytes(value, action, n):
    """Bytes that a rank sends for one action on a value, forward and backward."""
    share = value.nbytes * (n - 1) / n
    passes = {SUM: 2, MEAN: 2, GATHER: 1, ADD_ONCE: 0, TO_DTENSOR: 0}
    if action.kind in (SUM_GRADIENT, SPLIT):  # these send in the backward only
        passes |= (
            {SUM_GRADIENT: 2, SPLIT: 1} if value.differentiable else {SUM_GRADIENT: 0, SPLIT: 0}
        )
    passes[EXCHANGE] = (2 if value.differentiable else 1) / n
    return share * passes[action.kind]


def hoist(graph, layout):
    """Move `enter` above replicated calls where that sends fewer bytes: two norms of one tensor,
    each entering a region, cost two reductions below and one above (and those of their small
    weights)."""
    readers = {}
    for call in graph.calls:
        if call.nodes:
            for path, v in call.inputs.items():
                readers.setdefault(v.id, []).append((call, path))
    kept = {v.id for v in (*graph.outputs.values(), *graph.stored)} | graph.seen.keys()
    enter = Action(SUM_GRADIENT)

    def entered(v):
        return [
            (c.index, p)
            for c, p in readers.get(v.id, ())
            if layout.uses.get((c.index, p)) == [enter]
        ]

    def movable(call):
        """The outputs that enter, if all that the call makes does, and nothing else is done with
        it."""
        if call.opaque or not graph.numbered(call, call.module) or call.index in layout.axis_of:
            return []
        if any((call.index, p) in layout.uses for p in call.inputs) or any(
            n.mutated for n in call.nodes
        ):
            return []
        ins, outs = call.inputs.values(), {v.id: v for v in call.outputs.values() if v.trainable}
        if any(graph.last_write.get(v.memory.id, -1) >= call.index for v in ins):
            return []
        if any(
            i in done
            for i in outs
            for done in (kept, {v.id for v in ins}, layout.values, layout.states)
        ):
            return []
        all_enter = all(0 < len(readers.get(i, ())) == len(entered(v)) for i, v in outs.items())
        return list(outs.values()) if all_enter else []

    def reduction(vs):
        return sum({v.id: v.nbytes for v in vs}.values())

    moved = True
    while moved:
        moved = False
        for x in graph.values:
            if not x.trainable:
                continue
            group = {
                call.index: (call, outs)
                for call, _ in readers.get(x.id, ())
                if (outs := movable(call))
            }
            if not group:
                continue
            before = reduction([v for _, outs in group.values() for v in outs])
            new = [
                v
                for call, _ in group.values()
                for v in call.inputs.values()
                if v.trainable and not entered(v)
            ]
            after = reduction(new)
            single = all(
                len(call.inputs) == 1 and call.name in ("view", "reshape")
                for call, _ in group.values()
            )
            if after < before or (after == before and single):
                for call, outs in group.values():
                    for v in outs:
                        for key in entered(v):
                            del layout.uses[key]
                    for path, v in call.inputs.items():
                        if v.trainable:
                            layout.uses[(call.index, path)] = [enter]
                moved = True
    return layout
