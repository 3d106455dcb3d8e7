"""Calls of the collectives, with what each is of the whole: plain torch, no ranks."""

import itertools
from typing import NamedTuple

import torch

from quintnet_dt.axes.split import Segment, Split
from quintnet_dt.comm_ops import all_gather, all_reduce, copy_in, reduce_scatter, split
from quintnet_dt.exchange import exchange
from quintnet_dt.groups import chunk_sizes

VARIES_IN = "all_reduce", "all_gather", "gather_partial", "reduce_scatter", "exchange"
VARIES_OUT = "copy_in", "split", "gather_partial", "reduce_scatter", "exchange"
# each rank's input is a part of the whole
OF_PARTS = (
    "all_gather",
    "gather_partial",
    "exchange",
)

# The ranks' lengths along the dim: even, chunks, chunks with an empty one, odd ones.
SIZES = {
    2: [(2, 2), (2, 1), (1, 0), (0, 3)],
    4: [(1, 1, 1, 1), (3, 3, 3, 1), (1, 1, 1, 0), (0, 2, 0, 1)],
}


class Case(NamedTuple):
    """One call of one operator, on all n ranks."""

    op: str
    dim: int
    sizes: tuple[int, ...]
    given: bool  # whether sizes are given, or found
    contiguous: bool

    def call(self, x, group):
        sizes = self.sizes if self.given else None
        if self.op == "all_reduce":
            return all_reduce(x, group)
        if self.op == "copy_in":
            return copy_in(x, group)
        if self.op == "split":
            return split(x, self.dim, group, sizes)
        if self.op == "reduce_scatter":
            return reduce_scatter(x, self.dim, group, sizes)
        if self.op == "exchange":
            blocks = (Segment(3),)
            return exchange(x, Split(self.dim, sum(self.sizes) // 3, blocks), group)
        partial = self.op == "gather_partial"
        return all_gather(x, self.dim, group, sizes, partial_grad=partial)

    def positions(self):
        """For an exchange: each rank's part of each of three pieces of the dim."""
        n = len(self.sizes)
        return (
            torch.arange(sum(self.sizes)).view(3, n, -1).transpose(0, 1).reshape(n, -1)
        )

    def whole(self, xs):
        """Every rank's result, of every rank's input: plain torch, no ranks."""
        if self.op == "all_reduce":
            return [sum(xs)] * len(xs)
        if self.op == "copy_in":
            return xs
        if self.op == "exchange":
            return [
                torch.cat(xs, self.dim).index_select(self.dim, at)
                for at in self.positions()
            ]
        if self.op in OF_PARTS:
            return [torch.cat(xs, self.dim)] * len(xs)
        x = xs[0] if self.op == "split" else sum(xs)
        return x.split(self.sizes, self.dim)

    def input(self, rank):
        shape = [3, 4, 2]
        shape[self.dim] = self.sizes[rank] if self.op in OF_PARTS else sum(self.sizes)
        x = randn(shape, rank if self.op in VARIES_IN else 0)
        return x if self.contiguous else x.mT.contiguous().mT

    def weights(self, rank, x, y):
        """(w, v): what the loss and its gradient are multiplied with."""
        w = randn(y.shape, 10 + (rank if self.op in VARIES_OUT else 0))
        v = randn(x.shape, 20 + (rank if self.op in VARIES_IN else 0))
        return w.requires_grad_(), v


def randn(shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


def cases(n):
    for op in dict.fromkeys(VARIES_IN + VARIES_OUT):
        dims = (0,) if op in ("all_reduce", "copy_in") else (0, 1, -1)
        for dim, sizes in itertools.product(
            dims, [(6,) * n] if op == "exchange" else SIZES[n]
        ):
            even = len(set(sizes)) == 1
            found = (
                even if op in OF_PARTS else list(sizes) == chunk_sizes(sum(sizes), n)
            )
            for given in (True, False) if found else (True,):
                for contiguous in (True, False):
                    yield Case(op, dim, sizes, given, contiguous)
