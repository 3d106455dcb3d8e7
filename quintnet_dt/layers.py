"""The ParallelStyle that makes a module compute on shards, and drop-in layers for
models that are written for it."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.distributed.tensor.placement_types import Placement

from .adopt import Replaced
from .axes.action import ADD_ONCE, GATHER, SPLIT, SUM, SUM_GRADIENT, Action, OnShard
from .axes.split import Split
from .carried import distribute
from .keys import ModulePath, ParamName
from .places import Owners, parameter_owners
from .processgroup import ProcessGroupManager
from .running.context import Context
from .running.install import hook
from .running.program import CallProgram, Program
from .state.loading import place_on_load


class ModelParameters:
    """The parameters of one model, and the DTensors that take their places; ties stay
    tied."""

    def __init__(self, owners: Owners, placements: Mapping[ParamName, Placement]):
        self.owners = owners
        self.placements = {
            (id(module), attr): placements[name]
            for name, places in owners.items()
            for module, attr in places
        }
        self.replaced: dict[int, Replaced] = {}  # by the id of the plain parameter

    def dtensor(
        self, module: nn.Module, attr: str, mesh: DeviceMesh, src_data_rank: int | None
    ) -> DTensor:
        """What a module is to have in the place of its plain parameter."""
        p = module._parameters[attr]
        if id(p) not in self.replaced:
            placement, new = self.placements[id(module), attr], p
            if not isinstance(p, DTensor):
                new = _distribute_parameter(p, mesh, placement, src_data_rank)
            self.replaced[id(p)] = Replaced(p, new)
        return self.replaced[id(p)].new


def _distribute_parameter(
    p: nn.Parameter, mesh: DeviceMesh, placement: Placement, src_data_rank: int | None
) -> nn.Parameter:
    """A DTensor with a parameter's values, its attributes and its gradient."""
    new = nn.Parameter(
        distribute(p.detach(), mesh, placement, src_data_rank), p.requires_grad
    )
    vars(new).update(vars(p))
    if p.grad is not None:
        new.grad = distribute(p.grad, mesh, placement, src_data_rank)
    return new


class ShardedModule(ParallelStyle):
    """The style that `apply_tensor_parallel` gives every module: its parameters become
    DTensors, its hooks are registered."""

    def __init__(self, context: Context, path: ModulePath, parameters: ModelParameters):
        self.context, self.path, self.parameters = context, path, parameters

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        for attr in [attr for attr, p in module._parameters.items() if p is not None]:
            new = self.parameters.dtensor(module, attr, mesh, self.src_data_rank)
            setattr(module, attr, new)
        hook(module, self.context, self.path, self.parameters.owners)
        place_on_load(module)
        return module


def _shard(
    layer: nn.Module,
    mesh: DeviceMesh | ProcessGroupManager,
    placements: Mapping[ParamName, Placement],
    program: Program,
    src_data_rank: int | None,
) -> None:
    """Give one layer its style. `placements` and the program's params go by attribute
    name."""
    mesh = mesh.mesh if isinstance(mesh, ProcessGroupManager) else mesh
    context = Context(mesh)
    context.programs = {"": program}
    style = ShardedModule(
        context, "", ModelParameters(parameter_owners(layer), placements)
    )
    parallelize_module(layer, mesh, style, src_data_rank=src_data_rank)
    layer.register_forward_pre_hook(_positional, with_kwargs=True, prepend=True)


def _positional(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A layer's input given by keyword is its first argument."""
    return (args or (kwargs["input"],)), {}


class ColumnParallelLinear(nn.Linear):
    """A Linear split over its output features (Megatron-LM, arXiv 1909.08053, section
    3).

    y = x A^T + b with A = [A_0; A_1; ...]: rank r computes y_r = x A_r^T + b_r.
    Backward: dx = sum_r dy_r A_r (one all-reduce).

    Args: as nn.Linear, and `mesh`: a 1-D DeviceMesh or a ProcessGroupManager;
    `gather_output`: return the whole y, of shape (..., out_features), else this rank's
    part (`torch.chunk`'s, so out_features need not divide); `src_data_rank`: whose
    initial weights are used; None if all ranks are seeded alike. `state_dict` has the
    whole layer's keys, with DTensors; initial values are the whole layer's under the
    same seed.
    """

    def __init__(
        self,
        *args: Any,
        mesh: DeviceMesh | ProcessGroupManager,
        gather_output: bool = True,
        src_data_rank: int | None = 0,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        program = Program({"weight": ()}, {(0, 0): (Action(SUM_GRADIENT),)})
        placements = {"weight": Shard(0)}
        if self.bias is not None:
            program.params["bias"], placements["bias"] = (), Shard(0)
        if gather_output:
            program.outputs[()] = (Action(GATHER, Split(-1, self.out_features)),)
        _shard(self, mesh, placements, program, src_data_rank)


class RowParallelLinear(nn.Linear):
    """A Linear split over its input features (Megatron-LM, arXiv 1909.08053, section
    3).

    y = sum_r x_r A_r^T + b with A = [A_0, A_1, ...] and x = [x_0, x_1, ...]: one
    all-reduce forward, the bias added once. Backward: dx_r = dy A_r.

    Args: as nn.Linear, and `mesh`, `src_data_rank` as for ColumnParallelLinear;
    `input_is_parallel`: x is this rank's part already (what a ColumnParallelLinear with
    gather_output=False returns), else it is whole and is split here.
    """

    def __init__(
        self,
        *args: Any,
        mesh: DeviceMesh | ProcessGroupManager,
        input_is_parallel: bool = False,
        src_data_rank: int | None = 0,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        program = Program({"weight": ()}, {}, {(): (Action(SUM),)})
        placements = {"weight": Shard(1)}
        if self.bias is not None:
            program.params["bias"], placements["bias"] = (
                Action(ADD_ONCE),
            ), Replicate()
        if not input_is_parallel:
            program.inputs[(0, 0)] = (Action(SPLIT, Split(-1, self.in_features)),)
        _shard(self, mesh, placements, program, src_data_rank)


class VocabParallelEmbedding(nn.Embedding):
    """An Embedding split over its rows (Megatron-LM, arXiv 1909.08053, section 3): each
    rank looks up its own, zeros for the others; one all-reduce.

    Args: as nn.Embedding (`max_norm` excepted: it would write to rows that are
    elsewhere), and `mesh`, `src_data_rank` as for ColumnParallelLinear. Raises
    ValueError for `max_norm`.
    """

    def __init__(
        self,
        *args: Any,
        mesh: DeviceMesh | ProcessGroupManager,
        src_data_rank: int | None = 0,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        if self.max_norm is not None:
            raise ValueError(
                "VocabParallelEmbedding: expected max_norm=None, found"
                f" {self.max_norm}; use nn.Embedding"
            )
        call = CallProgram(instead=OnShard("embedding", Split(0, self.num_embeddings)))
        program = Program(
            {"weight": ()}, {}, {(): (Action(SUM),)}, {0: call}, ["embedding"]
        )
        _shard(self, mesh, {"weight": Shard(0)}, program, src_data_rank)
