"""Operators that are given functions (torch.cond, flex_attention), recorded like any
other: one without a rule, which needs all its inputs whole."""

from dataclasses import dataclass, field
from functools import cache

from ..utils import tensors


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
        """[(function, its arguments)] of torch.cond, whose functions are what it
        computes."""
        return (
            [(f, args[3]) for f in args[1:3]] if self.operator.name() == "cond" else []
        )

    def shards(self, args):
        """Whether it may be given shards: flex_attention, whose heads are computed each
        by itself where no function of the scores is given that could read a head's
        number, and the mask is one for all."""
        if (
            self.operator.name() != "flex_attention"
            or getattr(args[3], "__name__", "") != "_identity"
        ):
            return False
        one_mask = all(t.dim() < 2 or t.shape[1] == 1 for _, t in tensors(args[4]))
        buffers = [t for _, t in tensors(args[7:])]
        return (
            args[0].shape[1] == args[1].shape[1]
            and one_mask
            and not any(t.requires_grad for t in buffers)
        )

    def __call__(self, *args, **kwargs):
        return self.operator(*args, **kwargs)


@cache
def higher_order(operator):
    """A HigherOrder of one of torch's."""
    return HigherOrder(operator, _Schema(f"higher_order::{operator.name()}"))
