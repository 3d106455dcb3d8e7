"""Applying a plan: parameters become DTensors, modules get the hooks that run their
programs."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module

from .adopt import adopt
from .axes.action import GATHER, Action
from .carried import carried
from .huggingface import mark
from .keys import ModulePath
from .layers import ModelParameters, ShardedModule
from .make_plan import Planned
from .parts import modules, named_modules, named_parameters, scripts
from .places import parameter_owners
from .plan import TensorParallelPlan
from .planning.paths import Paths
from .running.context import Context
from .running.install import unhook
from .running.program import Program
from .running.structure import Structures
from .running.weights import Weights
from .together import together
from .tracing.composites import adapt


def apply_plan(
    model: nn.Module,
    mesh: DeviceMesh,
    planned: Planned,
    split_id: str,
    src_data_rank: int | None,
) -> None:
    """Split a model by a plan that all ranks have. `split_id`: the same on all, for
    this split alone."""
    plan, group = planned.plan, mesh.get_group()
    for module in modules(model):
        _undo_split(module)
    defaults = _default_programs(model, plan)
    context = Context(mesh)
    context.paths = Paths(plan, defaults, planned.programs, mesh, split_id, model)
    context.programs = next(iter(context.paths.learned.values()), [defaults])[0]
    parameters = ModelParameters(parameter_owners(model), plan.placements)
    for path, module in named_modules(model):
        style = ShardedModule(context, path, parameters)
        parallelize_module(module, mesh, style, src_data_rank=src_data_rank)
    with together(group):
        adopt(list(parameters.replaced.values()))
    if src_data_rank is not None and mesh.size() > 1:
        _share_plain_tensors(model, dist.get_global_rank(group, src_data_rank), group)
    adapt(model)
    mark(model, mesh)
    if any(entry.pieces > 1 for entry in plan.entries.values()):
        # only then, since torch.distributed.checkpoint takes a while to import
        from .state.pieces import teach_pieces

        teach_pieces()
    context.weights, context.structures = Weights(parameters.owners, mesh), Structures(
        model
    )
    model.tensor_parallel_plan, model.tensor_parallel_mesh = plan, mesh


def _undo_split(module: nn.Module) -> None:
    """Take off what an earlier split left, but for the DTensors."""
    unhook(module)
    for attr in "tensor_parallel_plan", "tensor_parallel_mesh":
        vars(module).pop(attr, None)


def _default_programs(
    model: nn.Module, plan: TensorParallelPlan
) -> dict[ModulePath, Program]:
    """For a module that no traced forward reached: its own weights gathered."""
    programs = {}
    names = {id(p): name for name, p in named_parameters(model)}
    for path, module in named_modules(model):
        entries = [plan[names[id(p)]] for p in module.parameters(recurse=False)]
        if entries:
            programs[path] = Program(
                {
                    e.name: () if e.dim is None else (Action(GATHER, e.split),)
                    for e in entries
                }
            )
    return programs


def _share_plain_tensors(model: nn.Module, source: int, group: ProcessGroup) -> None:
    """Every rank takes from one the values of what is no DTensor: buffers, and the
    parameters of ScriptModules."""
    left_plain = {
        id(p): p.data for script in scripts(model) for p in script.parameters()
    }
    for tensor in (*model.buffers(), *left_plain.values()):
        if tensor.device.type != "meta" and tensor.numel():
            broadcast(tensor, source, group)


def broadcast(tensor: torch.Tensor, source: int, group: ProcessGroup) -> None:
    """Every rank takes a tensor's values from one; a sparse one's elements may differ
    in number."""
    if tensor.layout == torch.strided:
        dist.broadcast(carried(tensor), source, group=group)
        return
    box = [tensor]
    dist.broadcast_object_list(box, source, group=group)
    with torch.no_grad():
        tensor.copy_(box[0])
