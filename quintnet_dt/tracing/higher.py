"""Operators that are given functions (torch.cond, flex_attention), recorded like any other: one without a rule, which
needs all its inputs whole."""

from dataclasses import dataclass, field
from functools import cache


@dataclass(frozen=True)
class _Schema:
    name: str
    arguments: tuple = ()
    returns: tuple = ()


@dataclass(frozen=True)
class HigherOrder:
    """What a Node's `op` is asked for, of an operator that has no schema of its own."""

    operator: object
    _schema: _Schema
    namespace: str = "higher_order"
    tags: frozenset = field(default=frozenset())

    def branches(self, args):
        """[(function, its arguments)] of torch.cond, whose functions are what it computes."""
        return [(f, args[3]) for f in args[1:3]] if self.operator.name() == "cond" else []

    def __call__(self, *args, **kwargs):
        return self.operator(*args, **kwargs)


@cache
def higher_order(operator):
    """A HigherOrder of one of torch's."""
    return HigherOrder(operator, _Schema(f"higher_order::{operator.name()}"))
