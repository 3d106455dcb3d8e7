"""What the planner asks of ATen operators."""

from typing import Any

import torch

from ..tracing.graph import Node

LINEAR = set(
    "view _unsafe_view reshape t transpose permute unsqueeze squeeze clone alias detach"
    " expand add sub neg slice select".split()
)
# Linear in their first argument.
FIRST = {"div", "index", "index_select", "sum", "mean", "_to_copy"}
# Linear only where both are tensors: P + 1 is not the sum of the ranks' (P_r + 1).
ADDITIVE = {"add", "sub"}
# What surely works on an empty shard, beside pointwise operators and linear ones.
WORKS_ON_NOTHING = LINEAR | FIRST
WORKS_ON_NOTHING |= set(
    "mm addmm bmm baddbmm embedding cat split split_with_sizes unbind roll flip cumsum"
    " constant_pad_nd tril triu amax logsumexp _softmax _safe_softmax _log_softmax where"
    " copy_ native_layer_norm _fused_rms_norm repeat_interleave index_select dropout"
    " native_dropout bernoulli_ scalar_tensor empty_like zeros_like ones_like"
    " full_like".split()
)
# So does an attention, as on_shard.py has it.
_ATTENTION = "scaled_dot_product"


def op_name(op: Any) -> str:
    """The name of an ATen operator, less its namespace; one of another namespace keeps
    it."""
    return op._schema.name.removeprefix("aten::")


def linear(node: Node) -> bool:
    """Whether a node is linear in all its tensor inputs at once: a sum of partial
    results may then be taken after it."""
    name = op_name(node.op)
    return name in LINEAR and (name not in ADDITIVE or len(node.inputs) == 2)


def copes(node: Node) -> bool:
    """Whether a node surely works on an empty shard: convolutions and norms of nothing
    fail, or crash."""
    name = op_name(node.op)
    known = name in WORKS_ON_NOTHING or _ATTENTION in name
    return torch.Tag.pointwise in node.op.tags or known


def aligned_only(node: Node) -> bool:
    """Whether a node's kernel wants every tensor's rows to begin at multiples of 16
    bytes."""
    return op_name(node.op) == "_grouped_mm"
