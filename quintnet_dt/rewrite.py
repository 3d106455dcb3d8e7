"""The one call, `apply_tensor_parallel`, and the plan without it.

Both make a plan (make_plan.py: trace, choose, prove). The call then lets the ranks
agree on it (agreement.py) and applies it (apply_plan.py).
"""

import copy
import warnings
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .agreement import agree
from .apply_plan import apply_plan
from .around import undisturbed
from .contiguous import Contiguous, chosen
from .devices import DeviceSpec, device_spec
from .keys import ParamName
from .make_plan import Request, check_model, check_tp_size, make_plan, where_it_lies
from .plan import TensorParallelPlan
from .processgroup import ProcessGroupManager
from .split_before import entries_of_split
from .together import together
from .verifying.on_ranks import Check, verify_on_ranks


@undisturbed
def plan_tensor_parallel(
    model: nn.Module,
    tp_size: int,
    *,
    example_inputs: tuple | dict[str, Any] | None = None,
    plan: TensorParallelPlan | dict[ParamName, Any] | None = None,
    loss_parallel: bool = False,
    contiguous: Contiguous = False,
    device: str | DeviceSpec | None = None,
) -> TensorParallelPlan:
    """The plan that `apply_tensor_parallel` would apply, in one process, without a
    process group, a GPU, or a change to the model.

    Args:
        tp_size: number of ranks to split over, at least 1.
        model, example_inputs, plan, loss_parallel, contiguous, device: as for
            `apply_tensor_parallel`, which sets `contiguous` by itself.

    Returns: TensorParallelPlan.
    Raises: TypeError, ValueError for inputs or plans that do not fit; every wrong plan
    entry is listed at once.
    """
    check_tp_size(tp_size)
    check_model(model)
    spec = device_spec(device, where_it_lies(model))
    blocks = chosen(contiguous)
    request = Request(tp_size, example_inputs, plan, loss_parallel, blocks, spec)
    made = make_plan(model, request)
    _warn_if_untraced(model, made.plan)
    made.plan.dry_run = made.dry_run
    return made.plan


@undisturbed
def apply_tensor_parallel(
    model: nn.Module,
    tp_size: int | None = None,
    *,
    mesh: DeviceMesh | ProcessGroupManager | None = None,
    example_inputs: tuple | dict[str, Any] | None = None,
    plan: TensorParallelPlan | dict[ParamName, Any] | None = None,
    loss_parallel: bool = False,
    contiguous: Contiguous | None = None,
    src_data_rank: int | None = 0,
    device: str | DeviceSpec | None = None,
    verify: bool = False,
) -> nn.Module:
    """Split a model's weights over the ranks of a process group, in place.

    The model stays itself: same object, classes, parameter names and outputs. Every
    parameter becomes a DTensor on the 1-D tp mesh; its plan is
    `model.tensor_parallel_plan`, the mesh `model.tensor_parallel_mesh`.

    A model that was split before, and whose modules have changed since (adapters were
    added or merged), is split anew: its DTensors stay as they are, new parameters are
    split along the axes of theirs, or replicated.

    Args:
        model: any nn.Module, live or on the meta device.
        tp_size: number of ranks to split over; with no mesh, the world is laid out as
            by `ProcessGroupManager(tp_size)`. In a process that no launcher started, 1
            leaves no process group open.
        mesh: a 1-D DeviceMesh or a ProcessGroupManager, instead of tp_size.
        example_inputs: a tuple (positional) or dict (keyword) for the model's forward;
            made up from the first layer if left out.
        plan: placements that win over the planner's: {parameter name: Shard(dim) or
            Replicate()}, or a TensorParallelPlan.
        loss_parallel: outputs that are sharded on their last dim (the vocabulary of
            logits) are returned as DTensors with Shard(-1), and not gathered: use them
            within torch.distributed.tensor.parallel.loss_parallel(). A cross entropy
            inside the model runs on shards in any case.
        contiguous: whether each rank's part of a fused weight ([q | k | v]) is one
            block of it, a plain Shard, of which the ranks exchange rows before its use;
            else it is a part of each piece, a _StridedShard, which sends nothing, but
            which FSDP2 cannot shard again on the same dim. "first dim": of weights that
            are split on dim 0, where FSDP2 shards them; the default where the world is
            larger than the tp group. "vectors": of those of one dim, for
            `fully_shard(..., shard_placement_fn=fsdp_shard_placement(model))`. Before
            torch 2.13 the default is True.
        src_data_rank: the rank of each tp group whose weights are used; None if every
            rank holds the same: then each takes its slices with no communication.
        verify: take a step of a split copy beside one of a whole copy first, both in
            float64, as `verify_tensor_parallel` does: every rank holds both for that
            long. Where they differ, RuntimeError names the first module that does, and
            the model stays whole.

    Returns: the model.
    Raises: TypeError, ValueError, RuntimeError, on every rank, also when only one
    rank's model or plan is at fault.
    """
    mesh = mesh.mesh if isinstance(mesh, ProcessGroupManager) else mesh
    if mesh is not None and not isinstance(mesh, DeviceMesh):
        raise TypeError(
            "mesh: expected a 1-D DeviceMesh or a ProcessGroupManager, found"
            f" {type(mesh).__name__}"
        )
    ranks = ProcessGroupManager(tp_size, mesh=mesh)
    try:
        mesh, n = ranks.mesh, ranks.tp_size
        blocks = chosen(contiguous, split_again=n < dist.get_world_size())
        with together(ranks.group):
            if src_data_rank is not None and src_data_rank not in range(n):
                raise ValueError(
                    "src_data_rank: expected None or a rank of the tp group, found"
                    f" {src_data_rank!r}"
                )
            check_model(model)
            before = entries_of_split(model, mesh)
            spec = device_spec(device, ranks.mesh.device_type)
            request = Request(
                n, example_inputs, plan, loss_parallel, blocks, spec, before
            )
            planned = make_plan(model, request)
            _warn_if_untraced(model, planned.plan)
        options = {
            "src_data_rank": src_data_rank,
            "contiguous": blocks,
            "loss_parallel": planned.plan.loss_parallel,
        }
        split_id = agree(
            model, options, (planned.plan.to_json(), planned.programs), mesh
        )
        if verify:
            _verify(model, mesh, replace(request, plan=planned.plan))
        apply_plan(model, mesh, planned, split_id, src_data_rank)
    finally:
        if ranks.alone:  # nothing more will be communicated
            ranks.close()
    return model


def _verify(model: nn.Module, mesh: DeviceMesh, request: Request) -> None:
    """Raise RuntimeError where a copy of the model that is split so is wrong."""

    def split(whole: nn.Module, inputs: Any) -> None:
        apply_tensor_parallel(
            whole,
            mesh=mesh,
            example_inputs=inputs,
            plan=request.plan,
            contiguous=request.contiguous,
            device=request.device,
        )

    check = Check(request.example_inputs)
    report = verify_on_ranks(lambda: copy.deepcopy(model), split, mesh, check)
    if not report.ok:
        raise RuntimeError(f"verify: the model stays whole, as {report}")


def _warn_if_untraced(model: nn.Module, plan: TensorParallelPlan) -> None:
    """Tell the user of a plan that was made without a forward."""
    if plan.cost is None:
        # This function, a public one, `undisturbed`, and the user's line.
        warnings.warn(f"{type(model).__name__}: {plan.note}", stacklevel=4)
