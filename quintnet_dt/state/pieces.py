"""torch.distributed.checkpoint on weights that are held as a part of each fused piece.

Its planners ask a tensor which blocks of the whole it holds (the methods of torch's
Checkpointable protocol, which DTensor has). DTensor answers with one block, which is
not so for `_StridedShard(dim, k)`: k parts of as many pieces. So `dcp.save` raises, for
blocks that overlap. DTensor is taught here to answer rightly for these; for all others
it answers itself.
"""

from typing import Any

from torch.distributed.tensor import DTensor

from ..private import _StridedShard
from .dcp import Blocks


def teach_pieces() -> None:
    """Let `torch.distributed.checkpoint` save and load fused pieces, of parameters and
    of what optimizers keep for them. (On the class: a state dict's tensors are new
    ones.)"""
    _teach("__create_chunk_list__")
    _teach("__create_write_items__")
    _teach("__get_tensor_shard__")


def _teach(name: str) -> None:
    own = getattr(DTensor, name, None)
    if own is None or hasattr(own, "own"):  # taught already
        return

    def answer(tensor: DTensor, *args: Any) -> Any:
        if isinstance(tensor.placements[-1], _StridedShard):
            return getattr(Blocks.of(tensor), name)(*args)
        return own(tensor, *args)

    setattr(answer, "own", own)
    setattr(DTensor, name, answer)
