"""What a checkpoint holds, read without a model: to look at, and to write as
safetensors."""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from .dcp import Blocks, Reader, run_dcp
from .export import export_safetensors
from .folder import INDEX, STATE
from .given import path_of
from .index import check_whole, read_index
from .opened import opened

_PARTS = {"objects", "optimizer", "random", "extra"}
_MODEL = "model."


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds: every tensor's shape and dtype by its name
    (`model.<name>`, `optimizer.state.<name>.<key>`), and `extra` of save_checkpoint."""

    tensors: dict[str, TensorStorageMetadata]
    extra: Any


def read_saved(path: str | os.PathLike) -> Saved:
    """What a checkpoint holds; no tensor of the model or the optimizer is read. Raises
    what load_checkpoint does."""
    with opened(_path(path)) as checkpoint:
        index, state = index_of(checkpoint), state_of(checkpoint)
    found = index.state_dict_metadata.items()
    tensors = {n: t for n, t in found if isinstance(t, TensorStorageMetadata)}
    return Saved(tensors, state["extra"])


def export_checkpoint(path: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Write the model of a checkpoint as whole safetensors files, in one process, which
    holds the whole model. Raises what load_checkpoint and export_safetensors do."""
    with opened(_path(path)) as checkpoint:
        checkpoint.verify()
        index = index_of(checkpoint)
        saved = index.state_dict_metadata
        names = [n for n in saved if n.startswith(_MODEL)]
        check_whole(checkpoint.path / INDEX, index, names, checkpoint.files)
        whole = {
            n: torch.empty(saved[n].size, dtype=saved[n].properties.dtype)
            for n in names
        }
        blocks = {n: Blocks.of(t) for n, t in whole.items()}
        run_dcp(dcp.load, blocks, storage_reader=Reader(checkpoint, index))
    export_safetensors(folder, _module_of(whole))


def _path(path: str | os.PathLike) -> Path:
    return Path(os.path.realpath(path_of("path", path)))


def _module_of(tensors: dict[str, torch.Tensor]) -> nn.Module:
    """A module whose state_dict is these tensors, named as in a checkpoint."""
    root = nn.Module()
    for name, t in tensors.items():
        *path, leaf = name.removeprefix(_MODEL).split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_buffer(leaf, t)
    return root


def index_of(checkpoint):
    try:
        return read_index(checkpoint.read(INDEX))
    except ValueError as e:
        raise ValueError(
            f"{checkpoint.path / INDEX}: expected the index of a checkpoint: {e}"
        ) from e


def state_of(checkpoint):
    """All that is no tensor of the model or the optimizer."""
    path, data = checkpoint.path / STATE, checkpoint.read(STATE)
    try:
        state = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as e:
        raise ValueError(
            f"{path}: expected what save_checkpoint writes, cannot be read:"
            f" {type(e).__name__}: {e}"
        ) from e
    if not isinstance(state, dict) or _PARTS - state.keys():
        raise ValueError(f"{path}: expected {sorted(_PARTS)}, found something else")
    return state
