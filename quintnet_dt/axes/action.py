"""Actions: one collective on one tensor each, named by the change of placement in
DTensor's words.

`Partial` is a tensor that the ranks' tensors sum to. The gradient of a tensor changes
the other way
round: of what a shard becomes whole (Shard -> Replicate), each rank takes its part of
the gradient.
"""

from dataclasses import dataclass
from typing import Any

from .split import Split

# The identity, whose incoming gradient is Partial (each rank computed on its shard) and
# is summed.
SUM_GRADIENT = "gradient: Partial -> Replicate"
SUM = "Partial -> Replicate"
MEAN = "Partial(avg) -> Replicate"
GATHER = "Shard -> Replicate"
SPLIT = "Replicate -> Shard"
# Of key-value heads that the ranks do not share, those that this rank's query heads
# attend to; their gradient is Partial.
TAKE_HEADS = "Replicate -> this rank's heads"
# An addend of a sum over ranks, which is to count once: the first rank's, and zeros
# elsewhere.
ADD_ONCE = "Replicate -> Partial"
# A weight that is stored as one block, for one that is shared block by block.
EXCHANGE = "Shard -> Shard of each block"
TO_DTENSOR = "Shard -> DTensor"


@dataclass(frozen=True)
class Action:
    """One collective on one tensor: its kind is one of the names above, `split` says
    how the shard lies in the whole tensor where there is one; of a mean and of an
    addend, of which units the sum is."""

    kind: str
    split: Any = None  # a Split, or Heads


@dataclass(frozen=True)
class OnShard:
    """A call that running/on_shard.py runs in its own way, on this rank's shard."""

    call: str  # the name of the torch function
    split: Split
