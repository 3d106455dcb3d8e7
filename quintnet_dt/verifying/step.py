"""One step of a model, with the outputs of all its modules kept."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..keys import ArgPath, ModulePath
from ..parts import named_modules
from ..utils import leaves, quiet, replace, tensors

SEED = 0  # of the random numbers of a step

Loss: TypeAlias = Callable[[Any], Tensor]
MakeOptimizer: TypeAlias = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class ModuleCall:
    """The `number`-th call of a module."""

    path: ModulePath
    number: int


Outputs: TypeAlias = dict[ModuleCall, dict[ArgPath, Tensor]]


@dataclass(frozen=True)
class Step:
    """A model after one step, its gradients still there, and the tensors that each call
    of a module returned, in the order of their ends."""

    model: nn.Module
    outputs: Outputs


class _Recorder:
    """Keeps what the modules of a model return."""

    def __init__(self) -> None:
        self.outputs: Outputs = {}
        self.counts: Counter[ModulePath] = Counter()


class _Keep:
    """The hook of one module: a method, which is told from a user's hook by the module
    that it is defined in."""

    def __init__(self, recorder: _Recorder, path: ModulePath):
        self.recorder, self.path = recorder, path

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        recorder = self.recorder
        call = ModuleCall(self.path, recorder.counts[self.path])
        recorder.counts[self.path] += 1
        with quiet():
            # what follows may write to it
            recorder.outputs[call] = {
                path: x.detach().clone() for path, x in tensors(output)
            }


def take_step(
    model: nn.Module,
    args: tuple,
    kwargs: dict,
    loss: Loss,
    make_optimizer: MakeOptimizer,
) -> Step:
    """One forward, backward and optimizer step of a model, on copies of these inputs;
    only the forward where nothing is to be trained."""
    args, kwargs = copy.deepcopy((args, kwargs))
    recorder = _Recorder()
    handles = [
        module.register_forward_hook(_Keep(recorder, path).after)
        for path, module in named_modules(model)
    ]
    torch.manual_seed(SEED)
    try:
        with torch.enable_grad():
            output = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    total = loss(_whole(output))
    if total.requires_grad:
        total.backward()
        make_optimizer(p for p in model.parameters() if p.requires_grad).step()
    return Step(model, recorder.outputs)


def _whole(output: Any) -> Any:
    """An output whose logits may be sharded (loss_parallel), whole."""
    sharded = {
        path: x.full_tensor() for path, x in tensors(output) if isinstance(x, DTensor)
    }
    return replace(output, sharded)


def weighted_sum(output: Any) -> Tensor:
    """A loss of which each element of an output has a part of its own."""
    generator = torch.Generator().manual_seed(SEED)
    total = torch.zeros(())
    for _, x in leaves(output):
        if isinstance(x, Tensor) and x.is_floating_point():
            weights = torch.randn(x.shape, generator=generator).to(x)
            total = total.to(x) + (x * weights).sum()
    return total


def step_of_sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)
