"""The state of a tensor, seen from one rank."""

from enum import Enum
from typing import TypeAlias

from .sharding import Axis


class Sum(Enum):
    """What the ranks' tensors are where no axis lies in them, and yet they differ."""

    PARTIAL = "the tensor is their sum"
    AVERAGED = "the tensor is their mean"
    LOST = (
        "within a call: each rank's is of its shard, and no collective makes the tensor"
        " of them"
    )


PARTIAL, AVERAGED, LOST = Sum.PARTIAL, Sum.AVERAGED, Sum.LOST

# None: replicated; an Axis: a shard of it.
State: TypeAlias = Axis | Sum | None
