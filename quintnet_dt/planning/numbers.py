"""Which attributes of modules count what is sharded, where a model's code fails on a
shard otherwise."""

from collections.abc import Mapping

from torch import nn

from ..groups import Units
from ..keys import ModulePath
from ..running.sizes import LocalSize, PartOf
from ..tracing.graph import Graph
from .layout import Layout


def numbers_of(
    graph: Graph, layout: Layout, modules: Mapping[ModulePath, nn.Module], kind: type
) -> dict[ModulePath, dict[str, LocalSize]]:
    """By module of a kind, its attributes that are as many as the units of an axis that
    its own calls work on. Only a proof can tell whether they are the axis's."""
    units: dict[ModulePath, set[Units]] = {}
    for index, axis in layout.axis_of.items():
        path = graph.calls[index].module.path
        if type(modules.get(path)) is kind:
            units.setdefault(path, set()).add(axis.units)
    found: dict[ModulePath, dict[str, LocalSize]] = {}
    for path, of_axes in units.items():
        by_count: dict[object, Units] = {u.count: u for u in of_axes}
        numbers: dict[str, LocalSize] = {
            name: PartOf(by_count[x])
            for name, x in vars(modules[path]).items()
            if type(x) is int and x in by_count and (path, name) not in graph.changes
        }
        if numbers:
            found[path] = numbers
    return found
