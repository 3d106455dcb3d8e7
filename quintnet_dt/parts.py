"""The parts of a model, less those that TorchScript runs.

A ScriptModule within a model is out of reach: its forward calls no Python, and its
parameters cannot be DTensors. It is left as it is, an operator of its caller's: it
computes the same on every rank, on whole tensors.
"""

from collections.abc import Iterator

import torch
from torch import nn


def scripts(model: nn.Module) -> list[torch.jit.ScriptModule]:
    """The ScriptModules within a model, in its order, which every rank has."""
    return [m for m in model.modules() if isinstance(m, torch.jit.ScriptModule)]


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As torch's own, but for ScriptModules."""
    return model.named_modules(set(scripts(model)))


def modules(model: nn.Module) -> Iterator[nn.Module]:
    for _, module in named_modules(model):
        yield module


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """As torch's own, but for those of ScriptModules."""
    aside = {id(p) for script in scripts(model) for p in script.parameters()}
    for name, p in model.named_parameters():
        if id(p) not in aside:
            yield name, p


def parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for _, p in named_parameters(model):
        yield p
