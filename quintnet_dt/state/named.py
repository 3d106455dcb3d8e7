"""What reading and writing safetensors files share: the tensors of a model by their
names, and a progress bar."""

import contextlib
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


def is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def tensor_names(model: nn.Module) -> dict[Tensor, list[str]]:
    """The tensors of a model's state_dict, with their names: several where they are
    tied."""
    found: dict[Tensor, list[str]] = {}
    for name, t in model.state_dict(keep_vars=True).items():
        if not isinstance(t, Tensor):
            raise ValueError(
                f"{name}: expected a tensor in the model's state_dict, found"
                f" {type(t).__name__}"
            )
        found.setdefault(t, []).append(name)
    return found


def progress_bar(total: int, what: str, progress: bool) -> Any:
    """tqdm's bar on rank 0; where it is not installed, none."""
    shown = progress and is_first()
    with contextlib.suppress(ImportError):
        from tqdm import tqdm

        return tqdm(
            total=total, desc=what, unit="B", unit_scale=True, disable=not shown
        )
    return contextlib.nullcontext(SimpleNamespace(update=lambda n: None))
