"""apply_tensor_parallel: trace, plan, prove, apply. The one call, and the plan without it."""

import hashlib
import warnings

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from . import inputs
from .axes import Axes
from .context import Context
from .cost import cost
from .hooks import parameter_owners
from .layers import ShardedModule
from .layout import Action
from .paths import Paths, device_of, sharding_of, signature
from .plan import GATHERED, LOCAL, REPLICATED, WEIGHT_GATHERED, Entry, TensorParallelPlan, check_user_plan
from .planner import Planner, settle
from .processgroup import ProcessGroupManager
from .program import Program
from .trace import trace


def plan_tensor_parallel(model, tp_size, *, example_inputs=None, plan=None):
    """The plan that `apply_tensor_parallel` would apply, in one process, without a process group, a GPU, or a change to the model.

    Args:
        model: any nn.Module, live or on the meta device.
        tp_size: number of ranks to split over, at least 1.
        example_inputs: a tuple (positional) or dict (keyword) for the model's forward; made up from the first layer if left out.
        plan: placements that win over the planner's: {parameter name: Shard(dim) or Replicate()}, or a TensorParallelPlan.

    Returns: TensorParallelPlan.
    Raises: TypeError, ValueError for inputs or plans that do not fit; every wrong plan entry is listed at once.
    """
    if isinstance(tp_size, bool) or not isinstance(tp_size, int) or tp_size < 1:
        raise ValueError(f"tp_size: expected an int of at least 1, found {tp_size!r}")
    _check_model(model)
    return _make_plan(model, tp_size, example_inputs, plan)[0]


def apply_tensor_parallel(model, tp_size=None, *, mesh=None, example_inputs=None, plan=None, src_data_rank=0):
    """Split a model's weights over the ranks of a process group, in place.

    The model stays itself: same object, classes, parameter names and outputs. Every parameter becomes a DTensor on the 1-D tp mesh; its
    plan is `model.tensor_parallel_plan`, the mesh `model.tensor_parallel_mesh`.

    Args:
        model: any nn.Module, live or on the meta device.
        tp_size: number of ranks to split over; with no mesh, the world is laid out as by `ProcessGroupManager(tp_size)`.
        mesh: a 1-D DeviceMesh or a ProcessGroupManager, instead of tp_size.
        example_inputs: a tuple (positional) or dict (keyword) for the model's forward; made up from the first layer if left out.
        plan: placements that win over the planner's: {parameter name: Shard(dim) or Replicate()}, or a TensorParallelPlan.
        src_data_rank: the rank of each tp group whose weights are used; None if every rank holds the same: then
            each takes its slices with no communication.

    Returns: the model.
    Raises: TypeError, ValueError, RuntimeError, on every rank, also when only one rank's model or plan is at fault.
    """
    if isinstance(mesh, ProcessGroupManager):
        mesh = mesh.mesh
    if isinstance(mesh, DeviceMesh) or mesh is None:
        pgm = ProcessGroupManager(tp_size, mesh=mesh) if mesh is not None else ProcessGroupManager(tp_size)
        mesh = pgm.mesh
    else:
        raise TypeError(f"mesh: expected a 1-D DeviceMesh or a ProcessGroupManager, found {type(mesh).__name__}")

    error = made = None
    try:
        _check_model(model)
        made = _make_plan(model, mesh.size(), example_inputs, plan)
    except Exception as e:
        error = e
    _agree(model, made and made[0], error, mesh)
    plan, known = made
    _apply(model, mesh, plan, known, src_data_rank)
    return model


# ---- planning


def _check_model(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, found {type(model).__name__}")
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise ValueError(
            "the model's parameters are DTensors already: apply tensor parallelism once, before fully_shard"
        )


def _make_plan(model, n, example_inputs, user):
    """(plan, {signature: programs}) for a model."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    fixed = {}
    if isinstance(user, TensorParallelPlan):
        if user.tp_size != n:
            raise ValueError(f"plan: expected one for tp_size {n}, found one for {user.tp_size}")
        check_user_plan(user.placements, shapes)
        fixed = {name: e.dim for name, e in user.entries.items()}
    elif user is not None:
        if not isinstance(user, dict):
            raise TypeError(f"plan: expected a TensorParallelPlan or a dict of placements, found {type(user).__name__}")
        check_user_plan(user, shapes)
        fixed = {name: getattr(p, "dim", None) for name, p in user.items()}
    if n == 1:
        fixed = dict.fromkeys(shapes)
    device = device_of(model)
    found = None
    if example_inputs is not None:
        args, kwargs = inputs.check(example_inputs)
        found = (args, kwargs, trace(model, args, kwargs, device=device))
    else:
        first = None
        for args, kwargs in inputs.made_up(model, device):
            try:
                found = (args, kwargs, trace(model, args, kwargs, device=device))
                break
            except Exception as e:
                first = first or e
        if found is None:
            note = (
                "planned without a forward: no inputs were given and none that were made up fit "
                f"({type(first).__name__}: {str(first)[:200]}); give example_inputs for a better plan"
            )
            warnings.warn(f"{type(model).__name__}: {note}", stacklevel=4)
            return _blind_plan(model, n, fixed, note), {}
    args, kwargs, graph = found
    axes = Axes(graph)
    planner = Planner(graph, axes, n, fixed)
    given = sharding_of(user, graph, axes) if isinstance(user, TensorParallelPlan) and n > 1 else None
    sharding, layout, programs = settle(planner, model, args, kwargs, device, given)
    plan = _describe(planner, sharding, layout, fixed)
    return plan, {signature(model, args, kwargs): programs}


def _blind_plan(model, n, fixed, note):
    """Every large weight split on its longest dim."""
    plan = TensorParallelPlan(n, note=note)
    for name, p in model.named_parameters():
        longest = max(range(p.dim()), key=lambda d: p.shape[d], default=None)
        dim = fixed.get(name, longest if p.dim() > 1 and p.shape[longest] >= n else None)
        plan.entries[name] = Entry(name, tuple(p.shape), dim, 1, REPLICATED if dim is None else GATHERED)
    return plan


def _describe(planner, sharding, layout, fixed):
    """The plan as a user reads it."""
    plan = TensorParallelPlan(planner.n, bytes_per_step=round(cost(planner.graph, layout, planner.n)))
    for name, v in planner.params.items():
        entry = plan.entries[name] = Entry(name, v.shape)
        if name in sharding.params:
            entry.dim, axis = sharding.params[name]
            entry.pieces = sharding.outer.get(name, 1)
            if name in sharding.whole:
                entry.how = WEIGHT_GATHERED
                unreached = "" if planner.users.get(name) else "the traced forward did not reach it"
                entry.why = unreached or planner.why.get(name, "")
            elif axis in sharding.through:
                entry.how = LOCAL
                entry.why = f"an axis of {axis.size} units, {axis.size // planner.n} a rank"
            else:
                entry.how, entry.why = GATHERED, planner.why.get(name, "")
        else:
            entry.why = "small" if planner.n > 1 else "one rank holds all"
        if name in fixed and planner.n > 1:
            entry.why = "set by the user"
    return plan


# ---- applying


def _agree(model, plan, error, mesh):
    """Every rank must have planned the same for the same model; else all raise."""
    if mesh.size() == 1:
        if error is not None:
            raise error
        return
    params = model.named_parameters() if error is None else ()
    mine = {n: f"{tuple(p.shape)} {p.dtype} requires_grad={p.requires_grad}" for n, p in params}
    digest = hashlib.sha256(repr((sorted(mine.items()), plan and plan.to_json())).encode()).hexdigest()
    told = [None] * mesh.size()
    failure = None if error is None else f"{type(error).__name__}: {error}"
    dist.all_gather_object(told, (failure, digest), group=mesh.get_group())
    failed = [f"rank {r}: {f}" for r, (f, _) in enumerate(told) if f]
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("tensor parallelism failed on another rank: " + "; ".join(failed))
    if len({d for _, d in told}) == 1:
        return
    all_params = [None] * mesh.size()
    dist.all_gather_object(all_params, mine, group=mesh.get_group())
    for rank, other in enumerate(all_params):
        for name in {**all_params[0], **other}:
            a, b = all_params[0].get(name, "absent"), other.get(name, "absent")
            if a != b:
                raise RuntimeError(
                    f"the model differs between ranks: {name} is {a} on rank 0 and {b} on rank {rank}; build the same model on every rank"
                )
    raise RuntimeError(
        "the ranks made different plans for one model; pass the same example_inputs and plan on every rank"
    )


def _apply(model, mesh, plan, known, src_data_rank):
    context = Context(mesh)
    defaults = _default_programs(model, plan)
    context.paths = Paths(plan, defaults, {("", key): programs for key, programs in known.items()})
    context.programs = next(iter(context.paths.known.values()), [defaults])[0]
    owners, made = parameter_owners(model), {}
    for path, module in model.named_modules():
        style = ShardedModule(context, path, owners, plan.placements, made)
        parallelize_module(module, mesh, style, src_data_rank=src_data_rank)
    if src_data_rank is not None and mesh.size() > 1:
        source = dist.get_global_rank(mesh.get_group(), src_data_rank)
        for buffer in model.buffers():
            if buffer.device.type != "meta" and buffer.numel():
                dist.broadcast(buffer, source, group=mesh.get_group())
    model.tensor_parallel_plan, model.tensor_parallel_mesh = plan, mesh


def _default_programs(model, plan):
    """For a module that no traced forward reached: its own weights gathered."""
    programs, names = {}, {id(p): n for n, p in model.named_parameters()}
    for path, module in model.named_modules():
        params = {}
        for p in module._parameters.values():
            if p is not None:
                e = plan.entries[names[id(p)]]
                size = 0 if e.dim is None else e.shape[e.dim] // e.pieces
                params[e.name] = () if e.dim is None else (Action("gather", e.dim, size, 1, e.pieces),)
        if params:
            programs[path] = Program(params)
    return programs
