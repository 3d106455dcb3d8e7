"""The rules: for each ATen operator, which dims of its inputs and outputs are the same axis."""

import torch

from . import indexing, notation, products, views  # noqa: F401  each adds its rules to the table
from .pointwise import pointwise
from .table import RULES, unknown


def rule_of(node):
    """The rule for a node: the operator's own, the common one of pointwise operators, or 'needs everything whole'."""
    name = node.op._schema.name.removeprefix("aten::")
    if name in RULES:
        return RULES[name]
    if torch.Tag.pointwise in node.op.tags:
        return pointwise
    return unknown
