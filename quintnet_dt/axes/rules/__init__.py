"""The rules: for each ATen operator, which dims of its inputs and outputs are the same
axis."""

import re
from typing import Any

import torch
from torch.library import CustomOpDef

from ...tracing.graph import Node
from ...utils import OPERATORS
from . import (  # noqa: F401  each adds its rules to the table
    dims,
    indexing,
    lines,
    views,
)
from .apply import rule_of_line
from .faults import faults
from .notation import parse
from .pointwise import pointwise
from .table import RULES, Rule, unknown


def rule_of(node: Node) -> Rule:
    """The rule for a node: the operator's own, the common one of pointwise operators,
    or 'needs everything whole'."""
    # others keep their namespace: mylib::linear is not linear
    name = node.op._schema.name.removeprefix("aten::")
    return RULES.get(
        name, pointwise if torch.Tag.pointwise in node.op.tags else unknown
    )


def register_axis_rule(op: Any, rule: str | Rule) -> None:
    """Tell which dims of an operator of your own are one axis, so that what is sharded
    can stay so through it.

    An operator without a rule is taken to need its inputs whole: right, but gathered.
    (One of torch.Tag.pointwise has one.)

    Args:
        op: `torch.ops.mylib.op`, one of its overloads (all share the rule), what
            torch.library.custom_op made, or its name, "mylib::op".
        rule: a line that names the dims of each tensor argument and, after `->`, of
            each result. A dim on both sides is one axis: the operator does the same at
            each place along it. One on the left alone is summed over, so that the sum
            over shards is the whole. `k!`: dim k is needed whole. `+k`, before an
            input's first dim: an addend, to be added once when something is summed.
            `...`: any further dims. `_`: a dim that is an axis of its own in this place
            alone (`_...`: any number of them), such as the height of an image, which a
            convolution needs whole and makes anew. `(g c)`: a dim that is g blocks of
            c. Lengths that no other dim tells come after `;`: the name of an argument
            of the operator, or a number. Or a function (node, axes), as in
            quintnet_dt/axes/rules.

    Raises: TypeError, ValueError where `op` is no operator or the rule does not fit it.

    Examples::

        # mix(Tensor x, Tensor weight, Tensor scale) -> Tensor
        # of shapes (batch, n, i), (o, i), (n,)
        register_axis_rule("mylib::mix", "b n i, o i, n! -> b n o")

        # conv(Tensor x, Tensor weight, Tensor? bias, int groups) -> Tensor
        # of images in (batch, channels, height, width), with groups of channels
        register_axis_rule(
            "mylib::conv", "b (g i) _! _!, (g o) i _! _!, +(g o) -> b (g o) _ _;
            g=groups"
        )
    """
    expected = "register_axis_rule: expected"
    valid = isinstance(op, (str, CustomOpDef, *OPERATORS))
    match = re.search(r"(\w+)(?:::|\.)(\w+)", str(op)) if valid else None
    if match is None:
        raise (ValueError if isinstance(op, str) else TypeError)(
            f"{expected} an operator such as torch.ops.mylib.op, or 'mylib::op', found"
            f" {op!r}"
        )
    name = "::".join(match.groups())
    packet = getattr(getattr(torch.ops, match[1]), match[2], None)
    if packet is None:
        raise ValueError(
            f"{expected} an operator, but torch has no {name}; define it before its"
            " rule"
        )
    if isinstance(rule, str):
        rule = _rule_of_line(
            rule, name, [getattr(packet, o)._schema for o in packet.overloads()]
        )
    elif not callable(rule):
        raise TypeError(
            f"{expected} a line or a function (node, axes) as the rule of {name}, found"
            f" {rule!r}"
        )
    RULES[name.removeprefix("aten::")] = rule


def _rule_of_line(text: str, name: str, schemas: list[Any]) -> Rule:
    """The rule of a user's line for an operator, one of whose schemas it must fit."""
    where = f"the rule {text!r} of {name}"
    try:
        line = parse(text)
        found = [list(faults(line, schema)) for schema in schemas]
        if all(found):
            raise ValueError("; ".join(found[0]))
    except ValueError as error:
        raise ValueError(
            f"{where} does not fit: {error} (see register_axis_rule)"
        ) from None
    return rule_of_line(line, user=where)
