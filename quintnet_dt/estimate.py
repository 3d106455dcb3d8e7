"""Estimate: what a training step takes of a rank's memory and time, before it is run."""

from dataclasses import dataclass

import torch

from .costs import Collective, Cost, Step, duration


@dataclass(frozen=True)
class _Optimizer:
    """What an optimizer keeps of each parameter: tensors like it, and scalars of 4
    bytes. `temporary`: tensors like all parameters that its step makes and lets go of,
    where it runs over all at once (foreach, the default on a GPU)."""

    tensors: int = 0
    scalars: int = 0
    temporary: int = 0


# torch.optim's, as they are by default (`sgd-momentum`: momentum > 0).
OPTIMIZERS = {
    "none": _Optimizer(),
    "sgd": _Optimizer(),
    "sgd-momentum": _Optimizer(tensors=1),
    "adagrad": _Optimizer(tensors=1, scalars=1, temporary=1),
    "adam": _Optimizer(tensors=2, scalars=1, temporary=1),
    "adamw": _Optimizer(tensors=2, scalars=1, temporary=1),
}


@dataclass(frozen=True)
class Estimate:
    """What one training step takes of the first rank, which has the most of every axis.

    Args:
        tp_size: how many ranks there are.
        parameters, gradients, optimizer_state: bytes; exact.
        activations: bytes that are held when the forward returns, for the backward: what
            autograd saves, and the outputs.
        activations_of: module path -> bytes of them that its own code made ("": the
            root's).
        peak: bytes, the most at any moment of a step but the first, inputs and buffers
            with it. A loss outside of the model is not counted, nor is what the
            allocator and the communication library keep for themselves.
        collectives: by kind, forward and backward apart: count and bytes sent. What
            ranks compare beside (inputs at first; random states, a few bytes, before a
            forward that draws) is not among them.
        compute_seconds, communication_seconds: of forward and backward, by `plan.cost`.
        device: the name of the DeviceSpec that these are counted for.
        inputs: the traced inputs' shapes and dtypes.
        optimizer: its name.
    """

    tp_size: int
    parameters: int
    gradients: int
    optimizer_state: int
    activations: int
    activations_of: dict[str, int]
    peak: int
    collectives: list[Collective]
    compute_seconds: float
    communication_seconds: float
    device: str
    inputs: str
    optimizer: str

    @property
    def bytes_sent(self) -> int:
        """By the first rank, in one forward and backward."""
        return sum(c.bytes for c in self.collectives)

    @property
    def seconds(self) -> float:
        """Of one forward and backward; nothing is taken to overlap."""
        return self.compute_seconds + self.communication_seconds

    def __str__(self) -> str:
        memory = [
            ("parameters", self.parameters),
            ("gradients", self.gradients),
            (f"optimizer ({self.optimizer})", self.optimizer_state),
            ("activations", self.activations),
            ("at the peak", self.peak),
        ]
        ranks = "1 rank" if self.tp_size == 1 else f"each of {self.tp_size} ranks"
        lines = [f"a training step on {self.inputs} takes of {ranks}:"]
        lines += [f"  {name:22}{size(nbytes):>10}" for name, nbytes in memory]
        lines += [
            f"  {c.count:>4} {c.name:10} {'backward' if c.backward else 'forward':8}"
            f"{size(c.bytes):>9} sent"
            for c in self.collectives
        ]
        lines.append(
            f"  about {duration(self.compute_seconds)} of computing and"
            f" {duration(self.communication_seconds)} of communication on {self.device}"
        )
        return "\n".join(lines)


def estimate(
    tp_size: int, cost: Cost, step: Step, optimizer: str, dtype: torch.dtype | None
) -> Estimate:
    """See `TensorParallelPlan.estimate`."""
    if optimizer not in OPTIMIZERS:
        raise ValueError(
            f"optimizer: expected one of {', '.join(OPTIMIZERS)}, found {optimizer!r}"
        )
    keeps = OPTIMIZERS[optimizer]
    times = 1.0
    if dtype is not None:
        times = dtype.itemsize * step.elements / max(step.parameters, 1)

    def scaled(nbytes: int) -> int:
        return round(nbytes * times)

    gradients = scaled(step.trained)
    state = keeps.tensors * gradients + 4 * keeps.scalars * step.tensors
    at_once = keeps.temporary if cost.device != "CPU" else 0
    in_optimizer = (1 + at_once) * gradients
    parameters = scaled(step.parameters)
    collectives = [
        Collective(c.name, c.backward, c.count, scaled(c.bytes))
        for c in step.collectives
    ]
    activations_of = {path: scaled(n) for path, n in step.activations.items()}
    return Estimate(
        tp_size=tp_size,
        parameters=parameters,
        gradients=gradients,
        optimizer_state=state,
        activations=sum(activations_of.values()),
        activations_of=activations_of,
        peak=parameters + state + max(scaled(step.peak), in_optimizer),
        collectives=collectives,
        compute_seconds=cost.compute_seconds,
        communication_seconds=cost.communication_seconds,
        device=cost.device,
        inputs=cost.inputs,
        optimizer=optimizer,
    )


def size(nbytes: float) -> str:
    """Bytes as a person reads them, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            break
        nbytes /= 1000
    else:
        unit = "TB"
    return f"{nbytes:.3g} {unit}" if nbytes < 999.5 else f"{nbytes:.0f} {unit}"
