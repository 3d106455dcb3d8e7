"""Making a plan: a forward of the model is traced, what to shard is chosen, and the
choice is proven to compute what the whole model does."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .axes.axes import Axes
from .contiguous import Contiguous
from .devices import DeviceSpec
from .fsdp import wrapped_by_fsdp1
from .keys import ModulePath, ParamName
from .parts import named_parameters, parameters
from .plan import Entry, TensorParallelPlan
from .planning.applied import sharding_of
from .planning.describe import blind_plan, describe, why_blind
from .planning.dry_run import DryRun, readings_at
from .planning.planner import Planner
from .planning.settle import settle
from .planning.signature import Signature, device_of, signature
from .planning.task import Task
from .planning.where import adapted, used_elsewhere
from .running.program import Program
from .tracing import inputs
from .tracing.ghost import SplitWithin, StrayParameter
from .tracing.graph import Graph
from .tracing.trace import UnknownValues, trace
from .user_plan import check_user_plan
from .utils import STOPS

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What a user asks for: see `apply_tensor_parallel`."""

    tp_size: int
    example_inputs: Any
    plan: Any
    loss_parallel: bool
    contiguous: Contiguous
    device: DeviceSpec
    # Of the parameters that are split already.
    before: dict[ParamName, Entry] = field(default_factory=dict)


class Forward(NamedTuple):
    """A traced forward, and what it was given."""

    graph: Graph
    args: tuple
    kwargs: dict


class Planned(NamedTuple):
    """A plan, and how the traced call runs by it; no programs where nothing was
    traced. `forward`: for plans over other numbers of ranks."""

    plan: TensorParallelPlan
    programs: dict[Signature, dict[ModulePath, Program]]
    forward: Forward | None = None
    dry_run: DryRun | None = None


class _Untraced(Exception):
    """No inputs were given, and none that were made up fit; or values are not known."""


@torch.enable_grad()
def make_plan(
    model: nn.Module, request: Request, forward: Forward | None = None
) -> Planned:
    """The plan for a model that `check_model` let pass. `forward`: where it was traced
    before."""
    n, before = request.tp_size, request.before
    plan = _plan_to_apply(request)
    user_dims = _user_dims(model, request, plan)
    device = device_of(model)
    try:
        forward = forward or _trace(model, request.example_inputs, device)
    except _Untraced as e:
        _LOG.info("%s: %s", type(model).__name__, e)
        return Planned(blind_plan(model, n, user_dims, str(e), before), {})
    graph, args, kwargs = forward
    axes = Axes(graph)
    loss_parallel = request.loss_parallel if plan is None else plan.loss_parallel
    task = Task(
        graph,
        axes,
        n,
        user_dims,
        loss_parallel=loss_parallel,
        contiguous=request.contiguous,
        device=request.device,
    )
    applied = None
    if plan is not None and n > 1:
        applied = sharding_of(plan, graph, axes)
        if before:
            applied.follow(graph.params.keys() - before.keys(), graph, axes)
    settled = settle(Planner(task), model, args, kwargs, device, applied)
    described = describe(task, settled.sharding, settled.layout, user_dims)
    for name, entry in before.items():
        described.entries[name].why = entry.why
    described.adapted = adapted(settled.programs)
    _note_modules(described, model, graph)
    _LOG.info(
        "planned %s over %d ranks: each holds %.1f%% of the parameters; %s",
        type(model).__name__,
        n,
        100 * described.share,
        described.cost,
    )
    programs = {signature(model, args, kwargs): settled.programs}
    dry_run = DryRun(
        model,
        args,
        kwargs,
        device,
        readings_at(graph),
        settled.sharding,
        settled.programs,
        n,
    )
    return Planned(described, programs, forward, dry_run)


def _note_modules(plan: TensorParallelPlan, model: nn.Module, graph: Graph) -> None:
    """Note which of torch's modules use each parameter, where they alone do."""
    first = {id(p): name for name, p in named_parameters(model)}
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) in first:
            module = model.get_submodule(name.rpartition(".")[0])
            plan[first[id(p)]].modules[name] = _torch_class(module)
    for name, entry in plan.entries.items():
        owners = {own.rpartition(".")[0] for own in entry.modules}
        if used_elsewhere(graph, name, owners):
            entry.modules = dict.fromkeys(entry.modules, "")


def _torch_class(module: nn.Module) -> str:
    """The class of torch.nn whose forward a module runs; "" for another's."""
    for kind in type(module).__mro__:
        if kind.__module__.startswith("torch.nn.modules."):
            runs_it = getattr(kind, "forward", None) is type(module).forward
            return kind.__name__ if runs_it else ""
    return ""


def _plan_to_apply(request: Request) -> TensorParallelPlan | None:
    """The plan that is not to be chosen: the user's, or that of the parameters that are
    split already."""
    n, plan = request.tp_size, request.plan
    if request.before:
        if plan is not None:
            raise ValueError(
                "plan: expected none for a model that was split before, found a"
                f" {type(plan).__name__}: its parameters stay as they are"
            )
        return TensorParallelPlan(
            n, request.before, loss_parallel=request.loss_parallel
        )
    if not isinstance(plan, TensorParallelPlan):
        return None
    if plan.tp_size != n:
        raise ValueError(
            f"plan: expected one for tp_size {n}, found one for {plan.tp_size}"
        )
    loss_parallel = request.loss_parallel or plan.loss_parallel
    plan = plan.contiguous(request.contiguous)
    return replace(plan, loss_parallel=loss_parallel)


def _user_dims(
    model: nn.Module, request: Request, plan: TensorParallelPlan | None
) -> dict[ParamName, int | None]:
    """The dims that parameters must be split on (None: replicate), by the user or an
    earlier split."""
    placements = {} if request.plan is None else request.plan
    if plan is not None:
        placements = plan.placements
    if not isinstance(placements, dict):
        raise TypeError(
            "plan: expected a TensorParallelPlan or a dict of placements, found"
            f" {type(placements).__name__}"
        )
    params = dict(named_parameters(model))
    strange = [
        n
        for n, p in params.items()
        if isinstance(p, DTensor) and n not in request.before
    ]
    if strange:
        raise ValueError(
            f"{', '.join(strange[:5])}: expected a model that is whole, or that this"
            " function split, found DTensors already: apply tensor parallelism before"
            " fully_shard"
        )
    shapes = {name: tuple(p.shape) for name, p in params.items()}
    check_user_plan(placements, shapes)
    if request.tp_size == 1:
        return dict.fromkeys(shapes)
    return {
        name: getattr(placement, "dim", None) for name, placement in placements.items()
    }


def _trace(model: nn.Module, example_inputs: Any, device: torch.device) -> Forward:
    """A forward on the user's inputs, or on the first that were made up and fit."""
    failed: Exception | None = None
    for args, kwargs, most_calls in _tries(model, example_inputs, device):
        try:
            graph = trace(model, args, kwargs, device=device, most_calls=most_calls)
            return Forward(graph, args, kwargs)
        except (StrayParameter, SplitWithin, *STOPS):
            raise
        except Exception as e:
            if example_inputs is not None and not isinstance(e, UnknownValues):
                raise
            if most_calls is None:
                failed = failed or e
    raise _Untraced(why_blind(failed)) from failed


def _tries(
    model: nn.Module, example_inputs: Any, device: torch.device
) -> Iterator[tuple[tuple, dict, int | None]]:
    """What to trace a forward on, (args, kwargs), and with how many calls at most: the
    user's inputs; else of a training step's size, but not through a loop over tokens;
    else small ones."""
    if example_inputs is not None:
        yield *inputs.check(example_inputs), None
        return
    # a few calls a module, and what lies around them
    quick = 2000 + 20 * sum(1 for _ in model.modules())
    for args, kwargs in inputs.made_up(model, device, real_size=True):
        yield args, kwargs, quick
    for args, kwargs in inputs.made_up(model, device):
        yield args, kwargs, None


def fitting_inputs(model: nn.Module) -> tuple[tuple, dict]:
    """(args, kwargs), small ones, made up, on which the model's forward runs. Raises
    ValueError where none do."""
    device = device_of(model)
    failed: Exception | None = None
    for args, kwargs in inputs.made_up(model, device):
        try:
            trace(model, args, kwargs, device=device)
            return args, kwargs
        except STOPS:
            raise
        except Exception as e:
            failed = failed or e
    raise ValueError(
        f"{type(model).__name__}: expected example_inputs, as none that were made up"
        f" fit its forward ({type(failed).__name__}: {str(failed)[:200]})"
    ) from failed


def check_model(model: nn.Module) -> None:
    """Raise TypeError where a model is of a kind that cannot be split."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, found {type(model).__name__}")
    if wrapped := wrapped_by_fsdp1(model):
        raise TypeError(
            f"{wrapped}: expected a model that is split before any data parallelism,"
            " found FullyShardedDataParallel: apply tensor parallelism first, then"
            " torch.distributed.fsdp.fully_shard"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "the model: expected modules written in Python, found a ScriptModule, whose"
            " weights and calls are out of reach: use the module that it was made from"
            " (within a model, one is left whole)"
        )


def check_tp_size(tp_size: int) -> None:
    """Raise ValueError where it is no number of ranks."""
    if isinstance(tp_size, bool) or not isinstance(tp_size, int) or tp_size < 1:
        raise ValueError(f"tp_size: expected an int of at least 1, found {tp_size!r}")


def where_it_lies(model: nn.Module) -> str:
    """The type of device that the weights are on."""
    return next((p.device.type for p in parameters(model)), "")
