"""Operators: how they are seen as a forward runs, and those without a public name."""

import torch

from .absent import absent

# Every operator of a forward as it is dispatched: documented, and used by many, under
# this name.
try:
    from torch.utils._python_dispatch import TorchDispatchMode
except ImportError:
    TorchDispatchMode = absent("torch.utils._python_dispatch.TorchDispatchMode")

# Operators that are given functions (torch.cond, flex_attention).
try:
    from torch._ops import HigherOrderOperator
except ImportError:  # none is known
    HigherOrderOperator = absent("torch._ops.HigherOrderOperator")

# The softmax within F.scaled_dot_product_attention: zeros for a row that is all masked.
try:
    safe_softmax = torch.ops.aten._safe_softmax
except AttributeError:
    safe_softmax = absent("torch.ops.aten._safe_softmax")

# What torch.autograd.detect_anomaly asks of gradients.
is_any_true = (
    getattr(torch.ops.aten, "_is_any_true", None)
    and torch.ops.aten._is_any_true.default
)
