"""Of which fused weights a rank holds one block of the whole, and not a part of each
piece: those that FSDP2 will shard again on the same dim."""

from typing import Literal, TypeAlias

from .private import SINCE_2_13

Contiguous: TypeAlias = bool | Literal["first dim", "vectors"]
FIRST_DIM: Literal["first dim"] = "first dim"  # on which FSDP2 shards
VECTORS: Literal["vectors"] = (
    "vectors"  # FSDP2 shards matrices on another dim: see fsdp_shard_placement
)
_WORDS = FIRST_DIM, VECTORS


def in_one_block(contiguous: Contiguous, dim: int, ndim: int) -> bool:
    """Whether it says so of a weight of `ndim` dims that is split on `dim`."""
    if contiguous == FIRST_DIM:
        return dim == 0
    if contiguous == VECTORS:
        return ndim == 1
    return bool(contiguous)


def chosen(contiguous: Contiguous | None, split_again: bool = False) -> Contiguous:
    """What a user asks for, or the default where nothing is. `split_again`: by FSDP2.
    Raises ValueError for what it is not."""
    if contiguous is None:
        return (FIRST_DIM if split_again else False) if SINCE_2_13 else True
    if contiguous not in (True, False, *_WORDS):
        raise ValueError(
            f"contiguous: expected None, True, False, {' or '.join(map(repr, _WORDS))},"
            f" found {contiguous!r}"
        )
    return contiguous
