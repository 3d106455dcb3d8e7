"""The proof: the forward run again on one rank's shapes, call by call beside the whole
one; where an axis is shared unevenly, on those of each kind of rank.

With the programs installed on a ghost whose parameters have their local shapes, the
forward must make the same calls in the same order with the same scalar arguments, and
every tensor must be exactly the shard that the layout says. A scale computed from a
sharded dim's size differs, and is caught; a size written into the code (`view(b, s, 8,
64)`) is caught and replaced, and then shown in the same way.
"""

from typing import Any

from torch import nn

from ..axes.axes import Axes
from ..axes.sharding import LayoutError, Sharding
from ..ddp import whole_shape
from ..groups import SimulatedGroup
from ..keys import ModulePath
from ..parts import named_modules
from ..private import FakeTensorMode
from ..running.context import Context
from ..running.install import install
from ..running.program import Program
from ..running.sizes import LocalSize
from ..tracing.fakes import fake_inputs
from ..tracing.ghost import ghost
from ..tracing.graph import Graph
from ..tracing.trace import record
from ..utils import STOPS
from .checker import Checker
from .layout import Layout
from .numbers import numbers_of
from .programs import Found, make_programs

# What is found in one run is part of the programs that the next one shows right.
_RUNS = 5


def prove(
    model: nn.Module,
    args: tuple,
    kwargs: dict,
    graph: Graph,
    axes: Axes,
    layout: Layout,
    sharding: Sharding,
    n: int,
    device: Any = None,
) -> dict[ModulePath, Program]:
    """Show that the layout is right for this forward, or raise LayoutError. Returns the
    programs that do it."""
    found = Found()
    for _ in range(_RUNS):
        programs = make_programs(graph, layout, found)
        changed = pinned = False
        for rank in representatives(sharding, n):
            checker = Checker(graph, axes, layout, SimulatedGroup(rank, n), found)
            try:
                run_local(model, args, kwargs, programs, checker, sharding, device)
            except LayoutError as e:
                numbers = _numbers(e, model, graph, layout, found)
                if not numbers:
                    checker.failed.append(e)
                else:  # what was found of calls was found with other numbers
                    found = Found(numbers={**found.numbers, **numbers})
                    checker.changed = True
            if checker.failed:
                error, *others = checker.failed
                error.others = others
                raise error
            pinned |= checker.pinned
            changed |= checker.changed
            if changed:
                break
        if not changed:
            return make_programs(graph, layout, found) if pinned else programs
    raise LayoutError("sizes written into the code could not be replaced")


def _numbers(
    error: LayoutError, model: nn.Module, graph: Graph, layout: Layout, found: Found
) -> dict[ModulePath, dict[str, LocalSize]]:
    """After the code of a module has failed on a shard: of modules of its kind, the
    attributes with which it may not, if they are this rank's."""
    if error.call is None:
        return {}
    modules = dict(named_modules(model))
    kind = type(modules.get(error.call.module.path))
    numbers = numbers_of(graph, layout, modules, kind)
    return {path: x for path, x in numbers.items() if path not in found.numbers}


def representatives(sharding: Sharding, n: int) -> list[int]:
    """Ranks, one of each kind: those of a kind have as much of every axis."""
    axes = {p.axis for p in sharding.params.values() if not p.gathered}
    uneven = [axis.units.sizes(n) for axis in axes if axis.size % n]
    kinds: dict[tuple[int, ...], int] = {}
    for rank in range(n):
        kinds.setdefault(tuple(sizes[rank] for sizes in uneven), rank)
    return list(kinds.values())


def run_local(
    model: nn.Module,
    args: tuple,
    kwargs: dict,
    programs: dict[ModulePath, Program],
    checker: Checker,
    sharding: Sharding,
    device: Any = None,
) -> None:
    """Run one rank's forward on fake tensors under its `checker`."""
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    copied = rank_copy(model, programs, sharding, checker.group, fake_mode, device)
    inputs = fake_inputs(fake_mode, args, kwargs)
    try:
        record(copied, inputs[0], inputs[1], modes=[fake_mode], recorder=checker)
    except (LayoutError, *STOPS):
        raise
    except Exception as e:
        raise checker.error(f"{type(e).__name__}: {e}") from e
    finally:
        checker.let_go(copied, inputs)
    checker.check_end()


def rank_copy(
    model: nn.Module,
    programs: dict[ModulePath, Program],
    sharding: Sharding,
    group: SimulatedGroup,
    fake_mode: FakeTensorMode,
    device: Any = None,
) -> nn.Module:
    """A ghost of the model as one rank holds it, which runs by these programs."""

    def local_shape(name: str, p: Any) -> Any:
        whole = tuple(whole_shape(p))
        if name not in sharding.params:
            return whole
        return (
            sharding.params[name]
            .split(whole)
            .local_shape(whole, group.rank, group.size)
        )

    copied = ghost(model, fake_mode, local_shape=local_shape, device=device)
    context = Context(group=group)
    context.programs = programs
    install(copied, context)
    return copied
