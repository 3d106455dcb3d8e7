"""apply_tensor_parallel: trace, plan, prove, apply. The one call, and the plan without it."""

import warnings
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from .adopt import adopt
from .agreement import agree
from .around import undisturbed
from .axes.action import GATHER, Action
from .axes.axes import Axes
from .carried import carried
from .fsdp import wrapped_by_fsdp1
from .huggingface import mark
from .layers import ShardedModule
from .parts import modules, named_modules, named_parameters, parameters, scripts
from .plan import TensorParallelPlan, check_user_plan
from .planning.applied import sharding_of
from .planning.describe import blind_plan, describe, why_blind
from .planning.paths import Paths
from .planning.planner import Planner
from .planning.settle import settle
from .planning.signature import device_of, signature
from .planning.task import Task
from .private import SINCE_2_13
from .processgroup import ProcessGroupManager
from .running.context import Context
from .running.install import unhook
from .running.program import Program
from .running.structure import Structures, changed_modules, hooks_on, parameter_owners
from .running.weights import Weights
from .together import together
from .tracing import inputs
from .tracing.composites import adapt
from .tracing.ghost import PASSED, SplitWithin, StrayParameter
from .tracing.trace import UnknownValues, trace


@undisturbed
def plan_tensor_parallel(
    model, tp_size, *, example_inputs=None, plan=None, loss_parallel=False, contiguous=False
):
    """The plan that `apply_tensor_parallel` would apply, in one process, without a process group, a
    GPU, or a change to the model.

    Args:
        tp_size: number of ranks to split over, at least 1.
        model, example_inputs, plan, loss_parallel, contiguous: as for `apply_tensor_parallel`,
        which sets `contiguous`
            by itself.

    Returns: TensorParallelPlan.
    Raises: TypeError, ValueError for inputs or plans that do not fit; every wrong plan entry is
    listed at once.
    """
    if isinstance(tp_size, bool) or not isinstance(tp_size, int) or tp_size < 1:
        raise ValueError(f"tp_size: expected an int of at least 1, found {tp_size!r}")
    return _make_plan(model, tp_size, example_inputs, plan, loss_parallel, contiguous, {})[0]


@undisturbed
def apply_tensor_parallel(
    model,
    tp_size=None,
    *,
    mesh=None,
    example_inputs=None,
    plan=None,
    loss_parallel=False,
    contiguous=None,
    src_data_rank=0,
):
    """Split a model's weights over the ranks of a process group, in place.

    The model stays itself: same object, classes, parameter names and outputs. Every parameter
    becomes a DTensor on the 1-D tp mesh; its plan is `model.tensor_parallel_plan`, the mesh
    `model.tensor_parallel_mesh`.

    A model that was split before, and whose modules have changed since (adapters were added or
    merged), is split anew: its DTensors stay as they are, new parameters are split along the axes
    of theirs, or replicated.

    Args:
        model: any nn.Module, live or on the meta device.
        tp_size: number of ranks to split over; with no mesh, the world is laid out as by
            `ProcessGroupManager(tp_size)`. In a process that no launcher started, 1 leaves no
            process group open.
        mesh: a 1-D DeviceMesh or a ProcessGroupManager, instead of tp_size.
        example_inputs: a tuple (positional) or dict (keyword) for the model's forward; made up from
        the first layer if
            left out.
        plan: placements that win over the planner's: {parameter name: Shard(dim) or Replicate()},
        or a
            TensorParallelPlan.
        loss_parallel: outputs that are sharded on their last dim (the vocabulary of logits) are
        returned as DTensors
            with Shard(-1), and not gathered: use them within
            torch.distributed.tensor.parallel.loss_parallel(). A cross entropy inside the model runs
            on shards in any case.
        contiguous: whether each rank's part of a fused weight ([q | k | v]) is one block of it, a
        plain Shard, of which
            the ranks exchange rows before its use; else it is a part of each piece, a
            _StridedShard, which sends nothing, but which FSDP2 and torch's own checkpoint functions
            do not handle. By default it is where the world is larger than the tp group, as it then
            will be split again, and before torch 2.13.
        src_data_rank: the rank of each tp group whose weights are used; None if every rank holds
        the same: then each
            takes its slices with no communication.

    Returns: the model.
    Raises: TypeError, ValueError, RuntimeError, on every rank, also when only one rank's model or
    plan is at fault.
    """
    mesh = mesh.mesh if isinstance(mesh, ProcessGroupManager) else mesh
    if mesh is not None and not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"mesh: expected a 1-D DeviceMesh or a ProcessGroupManager, found {type(mesh).__name__}"
        )
    ranks = ProcessGroupManager(tp_size, mesh=mesh)
    try:
        _split(model, ranks.mesh, example_inputs, plan, loss_parallel, contiguous, src_data_rank)
    finally:
        if ranks.alone:  # nothing more will be communicated
            ranks.close()
    return model


def _split(model, mesh, example_inputs, plan, loss_parallel, contiguous, src_data_rank):
    if contiguous is None:
        contiguous = mesh.size() < dist.get_world_size() or not SINCE_2_13
    with together(mesh.get_group()):
        if src_data_rank is not None and src_data_rank not in range(mesh.size()):
            raise ValueError(
                f"src_data_rank: expected None or a rank of the tp group, found {src_data_rank!r}"
            )
        kept = _kept(model, mesh) if isinstance(model, nn.Module) else {}
        plan, known = _make_plan(
            model, mesh.size(), example_inputs, plan, loss_parallel, contiguous, kept
        )
    options = {
        "src_data_rank": src_data_rank,
        "contiguous": contiguous,
        "loss_parallel": plan.loss_parallel,
    }
    split_id = agree(model, options, (plan.to_json(), known), mesh)
    _apply(model, mesh, plan, known, src_data_rank, split_id)


# ---- planning


@torch.enable_grad()
def _make_plan(model, n, example_inputs, user, loss_parallel, contiguous, kept):
    """(plan, {signature: programs}) for a model. `kept`: Entries of parameters that are split
    already."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, found {type(model).__name__}")
    _check_modules(model)
    if strange := [
        name for name, p in named_parameters(model) if isinstance(p, DTensor) and name not in kept
    ]:
        raise ValueError(
            f"{', '.join(strange[:5])}: expected a model that is whole, or that this function"
            " split, found DTensors already: apply tensor parallelism before fully_shard"
        )
    if kept and user is not None:
        raise ValueError(
            f"plan: expected none for a model that was split before, found a {type(user).__name__}:"
            " its parameters stay as they are"
        )
    shapes = {name: tuple(p.shape) for name, p in named_parameters(model)}
    whole_plan = isinstance(user, TensorParallelPlan)
    if whole_plan and user.tp_size != n:
        raise ValueError(f"plan: expected one for tp_size {n}, found one for {user.tp_size}")
    if whole_plan:
        loss_parallel |= user.loss_parallel
        user = replace(user.contiguous() if contiguous else user, loss_parallel=loss_parallel)
    elif kept:
        whole_plan, user = True, TensorParallelPlan(n, kept, loss_parallel=loss_parallel)
    placements = user.placements if whole_plan else {} if user is None else user
    if not isinstance(placements, dict):
        raise TypeError(
            "plan: expected a TensorParallelPlan or a dict of placements, found"
            f" {type(user).__name__}"
        )
    check_user_plan(placements, shapes)
    fixed = (
        {name: getattr(p, "dim", None) for name, p in placements.items()}
        if n > 1
        else dict.fromkeys(shapes)
    )
    device, failed = device_of(model), None
    given = None if example_inputs is None else [inputs.check(example_inputs)]
    for args, kwargs in given or inputs.made_up(model, device):
        try:
            graph = trace(model, args, kwargs, device=device)
            break
        except Exception as e:
            if (
                isinstance(e, (StrayParameter, SplitWithin))
                or given
                and not isinstance(e, UnknownValues)
            ):
                raise
            failed = failed or e
    else:
        note = why_blind(failed)
        warnings.warn(f"{type(model).__name__}: {note}", stacklevel=5)  # where the user called
        return blind_plan(model, n, fixed, note, kept), {}
    axes = Axes(graph)
    task = Task(graph, axes, n, fixed, loss_parallel, contiguous)
    sharding = sharding_of(user, graph, axes) if whole_plan and n > 1 else None
    if kept and n > 1:
        sharding.follow(graph.params.keys() - kept.keys(), graph, axes)
    settled = settle(Planner(task), model, args, kwargs, device, sharding)
    plan = describe(task, settled.sharding, settled.layout, fixed)
    for name, e in kept.items():
        plan.entries[name].why = e.why
    return plan, {signature(model, args, kwargs): settled.programs}


def _check_modules(model):
    """Raise TypeError where a module is of a kind that cannot be split."""
    if wrapped := wrapped_by_fsdp1(model):
        raise TypeError(
            f"{wrapped}: expected a model that is split before any data parallelism, found"
            " FullyShardedDataParallel: apply tensor parallelism first, then"
            " torch.distributed.fsdp.fully_shard"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "the model: expected modules written in Python, found a ScriptModule, whose weights and"
            " calls are out of reach: use the module that it was made from (within a model, one is"
            " left whole)"
        )


# ---- applying


def _kept(model, mesh):
    """{name: Entry} of the parameters that this library has split already."""
    splits = {
        id(h.context): h
        for m in modules(model)
        if (h := hooks_on(m)) and h.context.paths is not None
    }
    entries = {}
    for h in splits.values():
        _check_shared(model, h.context)
        for name, at in h.owners.items():
            entries.update(
                {id(m._parameters.get(attr)): h.context.paths.plan[name] for m, attr in at}
            )
    params = {
        name: p
        for name, p in named_parameters(model)
        if isinstance(p, DTensor) and p.device_mesh == mesh
    }
    same = len(splits) == 1 and not changed_modules(model, next(iter(splits.values())).context)
    if same and len(params) == len(list(parameters(model))):
        raise ValueError(
            "the model was split already, and not changed since: apply tensor parallelism once"
        )
    for module in modules(model):
        vars(module).pop(PASSED, None)
    return {
        name: replace(entries[id(p)], name=name) for name, p in params.items() if id(p) in entries
    }


def _check_shared(model, context):
    """Refuse to split a module again as a part of a model that neither holds the one it was split
    in nor is a part of
    it: its hooks can serve one of them."""
    root = context.paths.root and context.paths.root()
    if root is None or root is model:
        return
    mine, theirs = dict(map(reversed, named_modules(model))), set(modules(root))
    shared = [path for m, path in mine.items() if m in theirs]
    if root not in mine and model not in theirs and shared:
        raise ValueError(
            f"{shared[0]}: expected modules of one model, found one that is a part of a"
            f" {type(root).__name__} too, which was split before: make one module that holds it and"
            f" this {type(model).__name__}, split that, and call its parts"
        )


def _apply(model, mesh, plan, known, src_data_rank, split_id):
    context = Context(mesh)
    for module in modules(model):
        unhook(module)
        for attr in "tensor_parallel_plan", "tensor_parallel_mesh":
            vars(module).pop(attr, None)
    defaults = _default_programs(model, plan)
    context.paths = Paths(plan, defaults, known, mesh, split_id, model)
    context.programs = next(iter(context.paths.known.values()), [defaults])[0]
    owners, made = parameter_owners(model), {}
    for path, module in named_modules(model):
        style = ShardedModule(context, path, owners, plan.placements, made)
        parallelize_module(module, mesh, style, src_data_rank=src_data_rank)
    with together(mesh.get_group()):
        adopt(list(made.values()))
    if src_data_rank is not None and mesh.size() > 1:
        source = dist.get_global_rank(mesh.get_group(), src_data_rank)
        left_whole = {id(p): p.data for script in scripts(model) for p in script.parameters()}
        for tensor in (*model.buffers(), *left_whole.values()):
            if tensor.device.type != "meta" and tensor.numel():
                _broadcast(tensor, source, mesh.get_group())
    adapt(model)
    mark(model, mesh)
    context.weights, context.structures = Weights(owners, mesh), Structures(model)
    model.tensor_parallel_plan, model.tensor_parallel_mesh = plan, mesh


def _broadcast(buffer, source, group):
    """Every rank takes a buffer's values from one; a sparse one's elements may differ in number."""
    if buffer.layout == torch.strided:
        return dist.broadcast(carried(buffer), source, group=group)
    box = [buffer]
    dist.broadcast_object_list(box, source, group=group)
    with torch.no_grad():
        buffer.copy_(box[0])


def _default_programs(model, plan):
    """For a module that no traced forward reached: its own weights gathered."""
    programs, names = {}, {id(p): n for n, p in named_parameters(model)}
    for path, module in named_modules(model):
        params = {}
        for e in (plan[names[id(p)]] for p in module.parameters(recurse=False)):
            params[e.name] = () if e.dim is None else (Action(GATHER, e.split),)
        if params:
            programs[path] = Program(params)
    return programs
