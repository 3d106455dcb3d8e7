"""How a tensor lies in memory: random numbers are drawn in that order, so a mask
depends on it."""

from collections.abc import Sequence

from torch import Tensor


def dims_in_memory(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """The dims that are longer than 1 of a tensor of this shape, outermost in memory
    first."""
    longer = [d for d, size in enumerate(shape) if size > 1]
    return tuple(sorted(longer, key=lambda d: strides[d], reverse=True))


def is_contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor's elements lie in memory in the order of its dims, with nothing
    between them."""
    expected = 1
    for size, stride in zip(shape[::-1], strides[::-1]):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def laid_out(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same tensor, dense, with its dims in this order in memory; those that are not
    named lie innermost."""
    dims = [*order, *(d for d in range(x.dim()) if d not in order)]
    back = [dims.index(d) for d in range(x.dim())]
    return x.permute(dims).contiguous().permute(back)
