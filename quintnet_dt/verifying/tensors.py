"""How far one tensor is from another."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Distance:
    """The greatest difference of two tensors' elements, over their scale too, and
    where."""

    greatest: float
    relative: float
    at: tuple[int, ...] | None = None
    note: str = ""


NOTHING_APART = Distance(0.0, 0.0)


def apart(note: str) -> Distance:
    """Of what cannot be compared."""
    return Distance(float("inf"), float("inf"), note=note)


def full(x: Tensor) -> Tensor:
    """The whole of a tensor, dense, without its graph; of a DTensor, every rank
    asks."""
    x = x.detach()
    x = x.full_tensor() if isinstance(x, DTensor) else x
    return x if x.layout == torch.strided else x.to_dense()


def largest(x: Tensor) -> float:
    """The greatest absolute value of a tensor, infinities and NaN aside."""
    if x.dtype == torch.bool or not x.numel():
        return 1.0
    return x.abs().double().nan_to_num(0, 0, 0).max().item()


def distance(found: Tensor, whole: Tensor, least_scale: float = 0.0) -> Distance:
    """How far `found` is from `whole`, whose greatest element is the scale."""
    if found.shape != whole.shape:
        shapes = f"{tuple(found.shape)}, expected {tuple(whole.shape)}"
        return apart(f"found shape {shapes}")
    if found.dtype != whole.dtype:
        return apart(f"found {found.dtype}, expected {whole.dtype}")
    if not whole.numel():
        return NOTHING_APART
    exact = not (whole.is_floating_point() or whole.is_complex())
    apart_by = _apart_by(found, whole, exact)
    index = apart_by.argmax()
    greatest = apart_by.flatten()[index].item()
    if not greatest:
        return NOTHING_APART
    scale = 1.0 if exact else max(largest(whole), least_scale)
    relative = greatest / scale if scale else float("inf")
    at = torch.unravel_index(index, whole.shape)
    return Distance(greatest, relative, tuple(map(int, at)))


def _apart_by(found: Tensor, whole: Tensor, exact: bool) -> Tensor:
    """The difference of each element; 1 where what is to be equal is not."""
    if exact:
        return (found != whole).double()
    both_nan = found.isnan() & whole.isnan()
    same = both_nan | (found == whole)
    apart_by = (found - whole).abs().double()
    infinite = apart_by.nan_to_num(float("inf"))
    return infinite.masked_fill(same, 0)
