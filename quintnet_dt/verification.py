"""`verify_tensor_parallel`: the split model beside the whole one, before it is trusted
with a training run."""

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .keys import ParamName
from .plan import TensorParallelPlan
from .processes import on_processes
from .processgroup import LAUNCHED, ProcessGroupManager
from .rewrite import apply_tensor_parallel
from .verifying.on_ranks import Check, verify_on_ranks
from .verifying.report import Verification
from .verifying.step import Loss, MakeOptimizer


def verify_tensor_parallel(
    model: nn.Module | Callable[[], nn.Module],
    tp_size: int,
    *,
    example_inputs: tuple | dict[str, Any] | None = None,
    plan: TensorParallelPlan | dict[ParamName, Any] | None = None,
    loss: Loss | None = None,
    optimizer: MakeOptimizer | None = None,
    dtype: torch.dtype | None = torch.float64,
    tolerance: float | None = None,
) -> Verification:
    """One step of the split model beside one of the whole model, from the same weights,
    inputs and random numbers: outputs, every gradient, buffers, and the parameters
    after an optimizer's step.

    On the ranks of the process group, or of torchrun, where there are any: every rank
    holds the whole model and its shards then. Else on `tp_size` new processes of this
    machine (CPU, gloo). The model that is given is not changed.

        report = verify_tensor_parallel(make_model, tp_size=2)
        assert report.ok, report

    Args:
        model: any nn.Module that is whole and has values, or a function without
            arguments that makes one. New processes are sent either by pickle, a
            function by its name.
        tp_size: number of ranks to split over.
        example_inputs: a tuple (positional) or dict (keyword) for the model's forward,
            the same on every rank; small ones are made up if left out.
        plan: as for `apply_tensor_parallel`.
        loss: a scalar of what the forward returns; by default a sum in which every
            element of every output has a weight of its own.
        optimizer: makes one of parameters, as `torch.optim.AdamW` does; SGD by default.
        dtype: that the model and its inputs are converted to; None leaves theirs.
        tolerance: the greatest difference that is allowed, relative to the greatest
            element of the whole model's tensor; by the dtype if left out, 5e-7 in
            float64.

    Returns: Verification: `ok`, and the first module whose output and the first
    parameter whose gradient differs.
    Raises: TypeError, ValueError for what does not fit; RuntimeError where a new
    process failed, with its traceback; what the model raises.
    """
    given = Check(example_inputs, loss, optimizer, dtype, tolerance)
    launched = all(name in os.environ for name in LAUNCHED)
    if not dist.is_initialized() and not launched:
        arguments = {
            "model": model,
            "tp_size": tp_size,
            "plan": plan,
            **vars(given),
        }
        return on_processes(verify_tensor_parallel, tp_size, arguments)
    with ProcessGroupManager(tp_size) as ranks:
        return verify_on_ranks(
            lambda: copy.deepcopy(model) if isinstance(model, nn.Module) else model(),
            lambda whole, inputs: apply_tensor_parallel(
                whole, mesh=ranks.mesh, example_inputs=inputs, plan=plan
            ),
            ranks.mesh,
            given,
        )
