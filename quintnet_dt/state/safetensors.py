"""Weights in safetensors files, as models are shared: each rank reads and writes its
own shards' bytes only.

torch.distributed.checkpoint has a reader and a writer of such files: they are silently
wrong with several blocks a rank, and what is written must be consolidated by one
process.
"""

import os
from typing import Any, Callable

import torch
from torch import Tensor, nn

from ..together import together
from .chunks import chunks
from .files import Entry, entries_of, read
from .given import check_device, check_function, check_model, path_of
from .meta import Places, materialize
from .named import progress_bar, tensor_names


def load_safetensors(
    source: str | os.PathLike,
    model: nn.Module,
    *,
    strict: bool = True,
    device: torch.device | str | None = None,
    init: Callable[[nn.Module], object] | None = None,
    progress: bool = True,
) -> tuple[list[str], list[str]]:
    """Fill a model, whole or sharded, live or on the meta device, from safetensors
    files; each rank reads the bytes of its own shards.

    Beside the shards a rank needs 2 % of them, or 1 MB. Values are cast to the model's
    dtype, as by `load_state_dict`. Of tied weights the file may hold any one (of
    several, the last is read). Names are those of the model's state_dict; no prefix is
    guessed. Call it on every rank of the world.

    Args:
        source: a .safetensors file, an index (.safetensors.index.json), or a folder
            with one of them.
        model: an nn.Module. What is on the meta device is given memory, for its shards
            only; such parameters become new objects: make optimizers afterwards.
        strict: whether the file must have exactly the model's names.
        device: of tensors that were on meta; that of the mesh, or the CPU, by default.
        init: for what is on meta and not in the file (non-persistent buffers; with
            strict=False, missing weights): see `materialize`.
        progress: a bar on rank 0, if tqdm is installed.

    Returns: (missing, unexpected), lists of names as load_state_dict has them.
    Raises: on every rank, before anything is written to the model: FileNotFoundError;
    TypeError; ValueError for files that are not safetensors, or that lists every name
    that is missing or unexpected and every shape that differs; ImportError without the
    safetensors package. OSError where reading fails later.
    """
    with together():
        check_model(model)
        check_function("init", init)
        device = check_device(device)
        entries = entries_of(path_of("source", source))
        names_of = tensor_names(model)
        places = Places(model)
        # Of several names of a tensor that are in the files, the last.
        wanted = {
            t: entries[n]
            for t, names in names_of.items()
            for n in names
            if n in entries
        }
        missing = [
            " = ".join(names) for t, names in names_of.items() if t not in wanted
        ]
        unexpected = sorted(
            entries.keys() - {n for names in names_of.values() for n in names}
        )
        _check_fit(source, wanted, *((missing, unexpected) if strict else ([], [])))
    with together():
        device = device or places.device()
        filled = {
            (
                places.fill(t, torch.empty_like(t.detach(), device=device))
                if t.is_meta
                else t
            ): entry
            for t, entry in wanted.items()
        }
        total = sum(c.tensor.nbytes for t in filled for c in chunks(t))
        with progress_bar(total, "reading", progress) as bar:
            read(filled, total, bar)
    materialize(model, init, device=device)
    return missing, unexpected


def _check_fit(
    source: Any, wanted: dict[Tensor, Entry], missing: list[str], unexpected: list[str]
) -> None:
    """Raise one error for all that does not fit."""
    wrong = [
        *(f"{name}: missing from the file" for name in missing),
        *(f"{name}: not in the model" for name in unexpected),
        *(
            f"{entry.name}: expected shape {tuple(t.shape)}, found {entry.shape}"
            for t, entry in wanted.items()
            if tuple(t.shape) != entry.shape
        ),
    ]
    if wrong:
        head = f"{source} does not fit the model, {len(wrong)} of its tensors differ:"
        raise ValueError("\n  ".join([head, *wrong]))
    for t in wanted:
        chunks(t)  # raises for a layout that it does not know
