"""One model over several numbers of ranks, side by side: to choose tp_size by."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .around import undisturbed
from .costs import duration
from .devices import DeviceSpec, device_spec
from .estimate import Estimate, size
from .make_plan import (
    Forward,
    Request,
    check_model,
    check_tp_size,
    make_plan,
    where_it_lies,
)

_COLUMNS: tuple[str, ...] = (
    "ranks",
    "params",
    "grads",
    "optimizer",
    "activations",
    "peak",
    "sent",
    "compute",
    "communication",
)


@dataclass(frozen=True)
class Comparison:
    """An Estimate for each number of ranks, in the order asked for; `str` of it is a
    table, one line each."""

    estimates: tuple[Estimate, ...]

    def __str__(self) -> str:
        first = self.estimates[0]
        rows = [_COLUMNS, *map(_row, self.estimates)]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths))
            for row in rows
        ]
        head = (
            f"a training step on {first.inputs}, with {first.optimizer}, on"
            f" {first.device}, takes of a rank:"
        )
        return "\n".join([head, *lines])


def _row(e: Estimate) -> tuple[str, ...]:
    nbytes = (
        e.parameters,
        e.gradients,
        e.optimizer_state,
        e.activations,
        e.peak,
        e.bytes_sent,
    )
    seconds = (e.compute_seconds, e.communication_seconds)
    return (str(e.tp_size), *map(size, nbytes), *map(duration, seconds))


@undisturbed
def compare_tp_sizes(
    model: nn.Module,
    sizes: Sequence[int] = (1, 2, 4, 8),
    *,
    example_inputs: tuple | dict[str, Any] | None = None,
    optimizer: str = "adamw",
    dtype: torch.dtype | None = None,
    device: str | DeviceSpec | None = None,
) -> Comparison:
    """What a training step takes of a rank, for several numbers of ranks. The model is
    traced once, and planned for each.

    Args:
        model, example_inputs, device: as for `plan_tensor_parallel`.
        sizes: the numbers of ranks.
        optimizer, dtype: as for `TensorParallelPlan.estimate`.

    Returns: Comparison.
    Raises: what `plan_tensor_parallel` and `TensorParallelPlan.estimate` do.
    """
    check_model(model)
    if not sizes:
        raise ValueError("sizes: expected at least one number of ranks, found none")
    for n in sizes:
        check_tp_size(n)
    spec = device_spec(device, where_it_lies(model))
    forward: Forward | None = None
    estimates = []
    for n in sizes:
        request = Request(n, example_inputs, None, False, False, spec)
        made = make_plan(model, request, forward)
        forward = made.forward
        made.plan.dry_run = made.dry_run
        estimates.append(made.plan.estimate(optimizer, dtype))
    return Comparison(tuple(estimates))
