"""The rules: for each ATen operator, which dims of its inputs and outputs are the same axis."""

import re

import torch
from torch.library import CustomOpDef

from ...utils import OPERATORS
from . import indexing, notation, products, views  # noqa: F401  each adds its rules to the table
from .pointwise import pointwise
from .table import RULES, unknown


def rule_of(node):
    """The rule for a node: the operator's own, the common one of pointwise operators, or 'needs
    everything whole'."""
    name = node.op._schema.name.removeprefix(
        "aten::"
    )  # others keep their namespace: mylib::linear is not linear
    if name in RULES:
        return RULES[name]
    if torch.Tag.pointwise in node.op.tags:
        return pointwise
    return unknown


def register_axis_rule(op, rule):
    """Tell which dims of an operator of your own are one axis, so that what is sharded can stay so
    through it.

    An operator without a rule is taken to need its inputs whole: right, but gathered. (One of
    torch.Tag.pointwise has one.)

    Args:
        op: `torch.ops.mylib.op`, one of its overloads (all share the rule), what
        torch.library.custom_op made, or its
            name, "mylib::op".
        rule: a line that names the dims of each tensor argument and, after `->`, of each result. A
        dim on both sides is
            one axis: the operator does the same at each place along it. One on the left alone is
            summed over, so that the sum over shards is the whole. `k!`: dim k is needed whole.
            `+k`, before an input's first dim: an addend, to be added once when something is summed.
            `...`: any further dims. Or a function (node, axes), as in quintnet_dt/axes/rules.

    Raises: TypeError, ValueError where `op` is no operator or the rule does not fit it.

    Example, for `mix(Tensor x, Tensor weight, Tensor scale) -> Tensor` of shapes (batch, n, i), (o,
    i), (n,)::

        register_axis_rule("mylib::mix", "b n i, o i, n! -> b n o")
    """
    where = "register_axis_rule: expected"
    match = (
        re.search(r"(\w+)(?:::|\.)(\w+)", str(op))
        if isinstance(op, (str, CustomOpDef, *OPERATORS))
        else None
    )
    if match is None:
        error = ValueError if isinstance(op, str) else TypeError
        raise error(f"{where} an operator such as torch.ops.mylib.op, or 'mylib::op', found {op!r}")
    name = "::".join(match.groups())
    packet = getattr(getattr(torch.ops, match[1]), match[2], None)
    if packet is None:
        raise ValueError(f"{where} an operator, but torch has no {name}; define it before its rule")
    if isinstance(rule, str):
        line = f"the rule {rule!r} of {name}"
        wrong = [notation.faults(rule, getattr(packet, o)._schema) for o in packet.overloads()]
        if all(wrong):
            raise ValueError(f"{line} does not fit: {'; '.join(wrong[0])} (see register_axis_rule)")
        rule = notation.from_notation(rule, user=line)
    elif not callable(rule):
        raise TypeError(
            f"{where} a line or a function (node, axes) as the rule of {name}, found {rule!r}"
        )
    RULES[name.removeprefix("aten::")] = rule
