"""TARGET of the command line: what makes the model that is meant, and inputs for it."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


class Unusable(Exception):
    """What a user wrote on the command line does not do; told in one line."""


@dataclass(frozen=True)
class Target:
    """`package.module:factory`, `file.py:factory`, or a folder or file of a Hugging Face
    config. Called, it makes the model; it can be sent to other processes."""

    text: str

    def __call__(self) -> nn.Module:
        """The model, on the default device. Raises Unusable."""
        try:
            made = self._factory()()
        except Unusable:
            raise
        except Exception as e:
            raise Unusable(f"{self.text}: {type(e).__name__}: {e}") from e
        if not isinstance(made, nn.Module):
            raise Unusable(
                f"{self.text}: expected a function without arguments that returns an"
                f" nn.Module, found that it returns a {type(made).__name__}"
            )
        return made

    def on_meta(self) -> nn.Module:
        """The model without memory, where it can be made so; else with it."""
        try:
            with torch.device("meta"):
                return self()
        except Unusable:
            return self()

    def _factory(self) -> Callable[[], Any]:
        if Path(self.text).exists():
            return lambda: _of_config(Path(self.text))
        place, colon, name = self.text.rpartition(":")
        if not colon:
            raise Unusable(
                f"{self.text}: expected package.module:factory, file.py:factory, or a"
                " folder or config.json of Hugging Face, found none of them"
            )
        module = _of_file(Path(place)) if place.endswith(".py") else _of_name(place)
        if not hasattr(module, name):
            raise Unusable(f"{self.text}: expected {name} in {place}, found none")
        found = getattr(module, name)
        return (lambda: found) if isinstance(found, nn.Module) else found


def _of_name(name: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return importlib.import_module(name)


def _of_file(path: Path) -> Any:
    """A file as a module, which may import those beside it."""
    if not path.is_file():
        raise Unusable(f"{path}: expected a file, found none")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(path.stem)


def _of_config(path: Path) -> nn.Module:
    """The model of a config of Hugging Face, with random weights."""
    try:
        import transformers
    except ImportError as e:
        raise Unusable(
            f"{path}: a config needs transformers: pip install transformers"
        ) from e
    config = transformers.AutoConfig.from_pretrained(path)
    names = getattr(config, "architectures", None) or ["AutoModel"]
    kind = getattr(transformers, names[0])
    make = kind.from_config if names[0].startswith("Auto") else kind
    model = make(config)
    dtype = getattr(config, "dtype", None)
    return model.to(dtype) if isinstance(dtype, torch.dtype) else model


def example_inputs(texts: list[str]) -> tuple | dict[str, torch.Tensor] | None:
    """Inputs of `2,16,48:float32` (positional) or `name=2,16:int64` (keyword); None of
    none. Raises Unusable."""
    named: dict[str, torch.Tensor] = {}
    for text in texts:
        name, _, shape = text.rpartition("=")
        named[name or str(len(named))] = _input(text, shape)
    with_names = sum("=" in text for text in texts)
    if with_names not in (0, len(texts)):
        raise Unusable("--input: expected all inputs with names, or none, found both")
    if with_names:
        return named
    return tuple(named.values()) or None


def _input(text: str, shape: str) -> torch.Tensor:
    sizes, _, name = shape.partition(":")
    dtype = dtype_of(name or "float32", text)
    try:
        size = tuple(map(int, filter(None, sizes.split(","))))
        if dtype.is_floating_point:
            return torch.randn(size).to(dtype)
        return torch.ones(size, dtype=dtype)
    except (ValueError, RuntimeError) as e:
        raise Unusable(
            f"--input {text}: expected a shape and a dtype such as 2,16,48:float32 or"
            f" input_ids=2,128:int64: {e}"
        ) from e


def dtype_of(name: str, text: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise Unusable(f"{text}: expected a dtype of torch, found {name!r}")
    return found
