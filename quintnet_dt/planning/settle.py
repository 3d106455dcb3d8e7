"""From a choice of axes to one that is proven: axes that cannot be shown right are
given up."""

import logging
from typing import Any, NamedTuple

from torch import nn

from ..axes.sharding import Axis, LayoutError, Sharding
from ..keys import ModulePath
from ..running.program import Program
from .hoist import hoist
from .lay_out import lay_out
from .layout import Layout
from .planner import Planner
from .programs import make_programs
from .prove import prove
from .sink import sink

_LOG = logging.getLogger(__name__)


class Settled(NamedTuple):
    """What is sharded, the collectives that make it right, and the programs that run
    them."""

    sharding: Sharding
    layout: Layout
    programs: dict[ModulePath, Program]


def settle(
    planner: Planner,
    model: nn.Module,
    args: tuple,
    kwargs: dict,
    device: Any = None,
    applied: Sharding | None = None,
) -> Settled:
    """A Sharding that is proven for the traced forward, and what runs it.

    Axes that cannot be shown right are given up; at the end every split weight is
    gathered before its use, which is right on any path. With an `applied` Sharding (of
    a plan in force) the parameters keep their placements.
    """
    task = planner.task
    graph, axes = task.graph, task.axes
    banned: set[Axis] = set()
    sharding = applied or planner.choose()
    while True:
        try:
            layout = sink(graph, axes, lay_out(graph, axes, sharding), task.work)
            layout = hoist(graph, layout)
            all_gathered = all(p.gathered for p in sharding.params.values())
            if (
                all_gathered and not graph.shards_given
            ):  # it computes as the whole model does
                programs = make_programs(graph, layout)
            else:
                programs = prove(
                    model, args, kwargs, graph, axes, layout, sharding, task.n, device
                )
            return Settled(sharding, layout, programs)
        except LayoutError as first:
            before = len(banned)
            for error in (first, *first.others):
                given_up = _give_up(
                    planner, error, sharding, banned, applied is not None
                )
                if not given_up and error is first:
                    raise
            if len(banned) > before:
                sharding = planner.choose(banned)


def _give_up(
    planner: Planner,
    error: LayoutError,
    sharding: Sharding,
    banned: set[Axis],
    placed: bool,
) -> bool:
    """Do without an axis that failed, in one of three ways; whether there was one left.
    `placed`: the parameters have their placements."""
    names = {
        name for name, p in sharding.params.items() if error.axis in (p.axis, None)
    }
    planner.task.note(names, str(error))
    _LOG.info("given up, for %d parameters: %s", len(names), error)
    if error.axis in sharding.through and not placed:
        banned.add(error.axis)
    elif error.axis in sharding.through:  # its weights compute alone, completed at once
        sharding.through.discard(error.axis)
    elif not all(sharding.params[p].gathered for p in names):
        sharding.gather(names)
    else:
        return False
    return True
