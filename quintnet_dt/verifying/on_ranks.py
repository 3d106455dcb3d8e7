"""A split model and the whole one, each taken through a step on the ranks that there
are."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..apply_plan import broadcast
from ..make_plan import check_model, fitting_inputs
from ..together import together
from ..tracing.inputs import check
from ..utils import is_float, replace, tensors
from .compare import compare, first_backward
from .first import first_output
from .report import GRADIENTS, OUTPUTS, Verification
from .step import SEED, Loss, MakeOptimizer, step_of_sgd, take_step, weighted_sum

# Module.to would make real numbers of complex ones.
_CONVERSIONS = {
    torch.float64: "double",
    torch.float32: "float",
    torch.bfloat16: "bfloat16",
    torch.float16: "half",
}


@dataclass(frozen=True)
class Check:
    """What is to be compared, and how: see `verify_tensor_parallel`."""

    example_inputs: tuple | dict[str, Any] | None = None
    loss: Loss | None = None
    optimizer: MakeOptimizer | None = None
    dtype: torch.dtype | None = torch.float64
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in _CONVERSIONS:
            names = ", ".join(map(str, _CONVERSIONS))
            raise ValueError(
                f"dtype: expected None or one of {names}, found {self.dtype!r}"
            )


def verify_on_ranks(
    make: Callable[[], nn.Module],
    split: Callable[[nn.Module, Any], object],
    mesh: DeviceMesh,
    given: Check,
) -> Verification:
    """What a Check finds; every rank of the mesh calls this, and gets the same.

    Args:
        make: makes the model, which belongs to this function then.
        split: splits a model over the mesh, given its example inputs.
    """
    group = mesh.get_group()
    on_cuda = mesh.device_type == "cuda"
    with torch.random.fork_rng([torch.cuda.current_device()] if on_cuda else []):
        with together(group):
            torch.manual_seed(SEED)
            whole = _prepared(make(), mesh, given.dtype)
            sharded = copy.deepcopy(whole)
            args, kwargs = _inputs(whole, mesh, given)
            dtype = next((p.dtype for p in whole.parameters() if is_float(p)), None)
        for tensor in (*whole.parameters(), *whole.buffers()):
            broadcast(tensor.detach(), dist.get_global_rank(group, 0), group)
        inputs = None if given.example_inputs is None else kwargs or args
        split(sharded, inputs)
        loss = given.loss or weighted_sum
        optimizer = given.optimizer or step_of_sgd
        with together(group):
            whole_step = take_step(whole, args, kwargs, loss, optimizer)
        split_step = take_step(sharded, args, kwargs, loss, optimizer)
    tolerance = given.tolerance or default_tolerance(dtype)
    compared = compare(split_step, whole_step, tolerance, group)
    wrong = {c.kind: c.differences for c in compared}
    plan = sharded.tensor_parallel_plan
    output = gradient = None
    if wrong[OUTPUTS]:
        output = first_output(split_step, whole_step, plan, tolerance, group)
        output = output or wrong[OUTPUTS][0]
    if wrong[GRADIENTS]:
        gradient = first_backward(wrong[GRADIENTS], whole_step)
    name = str(dtype).removeprefix("torch.")
    return Verification(mesh.size(), name, tolerance, compared, output, gradient)


def default_tolerance(dtype: torch.dtype | None) -> float:
    """Relative: 5e-7 in float64, 2e-3 in float32, 0.15 in bfloat16. It leaves room for
    sums that ranks make in another order, and for code that computes in float32
    whatever the model's dtype is."""
    return torch.finfo(dtype or torch.float32).eps ** 0.4


def _prepared(
    model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype | None
) -> nn.Module:
    """The model on the mesh's device, in a dtype, where it can be compared."""
    check_model(model)
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(x, DTensor) or x.is_meta:
            found = "a DTensor" if isinstance(x, DTensor) else "one on the meta device"
            raise ValueError(
                f"{name}: expected a tensor with values, of a model that is whole, found"
                f" {found}: verify a model before it is split, or give a factory that"
                " makes it with values"
            )
    model = model.to(mesh.device_type)
    return model if dtype is None else getattr(model, _CONVERSIONS[dtype])()


def _inputs(model: nn.Module, mesh: DeviceMesh, given: Check) -> tuple[tuple, dict]:
    """(args, kwargs) on the mesh's device, in the dtype."""
    if given.example_inputs is None:
        inputs = fitting_inputs(model)
    else:
        inputs = check(given.example_inputs)
    changes = {}
    for path, x in tensors(inputs):
        dtype = given.dtype if x.is_floating_point() else None
        changes[path] = x.to(mesh.device_type, dtype or x.dtype)
    return replace(inputs, changes)
