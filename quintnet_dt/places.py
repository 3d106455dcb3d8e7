"""Where a model's parameters are, and letting another tensor stand in the place of
one."""

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import nn

from .keys import ParamName
from .parts import modules, named_parameters


class Place(NamedTuple):
    """Where a parameter is: an attribute of a module."""

    owner: nn.Module
    attr: str


# The places of each parameter, by its name (the first of tied ones).
Owners: TypeAlias = dict[ParamName, list[Place]]


def parameter_owners(model: nn.Module) -> Owners:
    """Every place of every parameter of a model."""
    names = {id(p): name for name, p in named_parameters(model)}
    owners: Owners = {}
    for module in modules(model):
        for attr, p in module._parameters.items():
            if p is not None:
                owners.setdefault(names[id(p)], []).append(Place(module, attr))
    return owners


def put(owner: nn.Module, attr: str, tensor: torch.Tensor) -> None:
    """Let a module's parameter be `tensor`, by whatever way it is read."""
    if type(owner).__setattr__ is not nn.Module.__setattr__:
        _tell(owner, attr, tensor)
    owner._parameters[attr] = tensor


def _tell(owner: nn.Module, attr: str, tensor: torch.Tensor) -> None:
    """A module that notes what its attributes are set to, as nn.LSTM does in a list, is
    told. Its parameters stay in their order."""
    params = owner._parameters
    later = list(params)[list(params).index(attr) + 1 :]
    del params[attr]
    marked = vars(tensor).pop("_is_param", None)  # a Parameter would have to be a leaf
    setattr(owner, attr, tensor)
    if marked is not None:
        tensor._is_param = marked
    vars(owner).pop(attr, None)
    params[attr] = tensor
    for name in later:
        params[name] = params.pop(name)


def stand_in(model: nn.Module, stand_ins: Mapping[int, torch.Tensor]) -> None:
    """Let other tensors stand in the places of a model's parameters and buffers, each
    in every place that holds the one now: ties stay ties.

    `stand_ins`: by the id of the tensor that each takes the place of. To undo it, give
    the tensors themselves by the ids of their stand-ins: they return wherever those
    have been moved.
    """
    for module in model.modules():
        for attr, p in list(module._parameters.items()):
            if id(p) in stand_ins:
                put(module, attr, stand_ins[id(p)])
        for attr, buffer in list(module._buffers.items()):
            if id(buffer) in stand_ins:
                setattr(module, attr, stand_ins[id(buffer)])
