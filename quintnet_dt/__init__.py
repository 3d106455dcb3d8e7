"""Tensor parallelism for any PyTorch model in one call: `apply_tensor_parallel(model,
tp_size=4)`."""

import importlib
import logging
from typing import Any

__version__ = "0.1.0"

# What is planned, traced again and given up, and why, at INFO; silent by default.
logging.getLogger(__name__).addHandler(logging.NullHandler())

# Where each public name lives; loaded when first asked for, since
# torch.distributed.tensor alone takes most of a second to import.
_PUBLIC = {
    "ColumnParallelLinear": "layers",
    "ProcessGroupManager": "processgroup",
    "RowParallelLinear": "layers",
    "TensorParallelPlan": "plan",
    "VocabParallelEmbedding": "layers",
    "Verification": "verifying.report",
    "apply_tensor_parallel": "rewrite",
    "check_batch": "agreement",
    "compare_tp_sizes": "compare",
    "export_safetensors": "state.export",
    "fsdp_shard_placement": "fsdp",
    "load_checkpoint": "state.checkpoint",
    "load_safetensors": "state.safetensors",
    "materialize": "state.meta",
    "plan_tensor_parallel": "rewrite",
    "register_axis_rule": "axes.rules",
    "register_forward_method": "methods",
    "save_checkpoint": "state.checkpoint",
    "verify_tensor_parallel": "verification",
    "whole_shapes": "state.shapes",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
