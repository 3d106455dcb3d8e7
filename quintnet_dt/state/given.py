"""What the functions of state are given: checked before anything else, with what was
expected and what was found."""

import os
from pathlib import Path

import torch
from torch import nn


def check_model(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, found {_what(model)}")


def check_optimizer(optimizer):
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            "optimizer: expected a torch.optim.Optimizer or None, found"
            f" {_what(optimizer)}"
        )


def check_function(name, function):
    if function is not None and not callable(function):
        raise TypeError(f"{name}: expected a function or None, found {_what(function)}")


def check_device(device):
    """The torch.device that is meant, None for None."""
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as e:
        raise ValueError(
            f"device: expected a torch.device or its name, found {device!r}"
        ) from e


def path_of(name, given):
    """The Path that is meant."""
    if (
        not isinstance(given, (str, os.PathLike))
        or isinstance(given, os.PathLike)
        and isinstance(given.__fspath__(), bytes)
    ):
        raise TypeError(f"{name}: expected a path, found {_what(given)}")
    if not os.fspath(given):
        raise ValueError(f"{name}: expected a path, found an empty text")
    return Path(given)


def _what(x):
    """None of None, `a str, 'gpt2'`, `a Tensor`, `the class Linear`."""
    if x is None:
        return "None"
    if isinstance(x, type):
        return f"the class {x.__name__}"
    return (
        f"a {type(x).__name__}, {x!r}"
        if isinstance(x, (str, int, float))
        else f"a {type(x).__name__}"
    )
