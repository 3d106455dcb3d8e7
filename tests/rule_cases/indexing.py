"""Indexing by tensors."""

import torch
import torch.nn.functional as F

from .inputs import a, ids, mask, r

I24 = ids(4, 2, 4)
INDEXING = {
    "index first": (lambda x, i: x[i], r(4, 6), ids(4, 2)),
    "index second": (lambda x, i: x[:, i], r(4, 6, 2), ids(6, 4)),
    "index 2d": (lambda x, i: x[:, i], r(4, 6, 2), ids(6, 2, 4)),
    "index 0d": (lambda x, i: a.index(x, [i]), r(4, 6), ids(4, 1)[0]),
    "index 0d and 1d": (
        lambda x, i, j: a.index(x, [i, j]),
        r(4, 6, 2),
        ids(4, 1)[0],
        ids(6, 4),
    ),
    "index adjacent": (lambda x, i, j: x[:, i, j], r(2, 4, 6, 8), ids(4, 2), ids(6, 2)),
    "index apart": (lambda x, i, j: x[i, :, j], r(4, 2, 6, 8), ids(4, 2), ids(6, 2)),
    "index apart, inner": (
        lambda x, i, j: a.index(x, [None, i, None, j]),
        r(8, 4, 2, 6),
        ids(4, 2),
        ids(6, 2),
    ),
    "index broadcast": (
        lambda x, i, j: x[i, j],
        r(4, 6, 8),
        ids(4, 2, 1),
        ids(6, 1, 4),
    ),
    "index broadcast ranks": (
        lambda x, i, j: x[:, i, j],
        r(8, 4, 6),
        ids(4, 4),
        ids(6, 2, 4),
    ),
    "index same": (lambda x, i: x[i, i], r(4, 4, 6), ids(4, 2)),
    "index apart same size": (
        lambda x, i, j: x[i, :, j],
        r(4, 4, 4),
        ids(4, 4),
        ids(4, 4),
    ),
    "index arange": (lambda x, i: x[torch.arange(4), i], r(4, 6, 2), ids(6, 4)),
    "index bool": (lambda x, m: x[m], r(4, 6), mask(4)),
    "index_select": (lambda x, i: x.index_select(1, i), r(4, 6, 2), ids(6, 4)),
    "index_select 0d": (lambda x, i: a.index_select(x, 0, i), r(4, 6), ids(4, 1)[0]),
    "gather": (lambda x, i: x.gather(1, i), r(4, 6, 2), ids(6, 4, 3, 2)),
    "gather last": (lambda x, i: x.gather(-1, i), r(2, 4, 6), ids(6, 2, 4, 6)),
    "gather smaller": (lambda x, i: x.gather(1, i), r(4, 6, 2), ids(6, 2, 4, 2)),
    "gather one row": (lambda x, i: x.gather(1, i), r(4, 6, 2), ids(6, 1, 4, 2)),
    "gather 1d": (lambda x, i: x.gather(0, i), r(4), ids(4, 2)),
    "scatter": (lambda x, i, y: x.scatter(1, i, y), r(4, 6), ids(6, 4, 1), r(4, 1)),
    "scatter value": (lambda x, i: x.scatter(1, i, 2.0), r(4, 6), ids(6, 4, 1)),
    "scatter smaller": (
        lambda x, i, y: x.scatter(1, i, y),
        r(4, 6),
        ids(6, 2, 1),
        r(4, 6),
    ),
    "scatter larger source": (
        lambda x, i, y: x.scatter(0, i, y),
        r(4, 6),
        ids(4, 1, 6),
        r(4, 8),
    ),
    "scatter_": (
        lambda x, i, y: x.clone().scatter_(1, i, y),
        r(4, 6),
        ids(6, 4, 1),
        r(4, 1),
    ),
    "scatter_add": (
        lambda x, i, y: x.scatter_add(0, i, y),
        r(4, 6),
        ids(4, 2, 6),
        r(2, 6),
    ),
    "scatter_add_": (
        lambda x, i, y: x.clone().scatter_add_(0, i, y),
        r(4, 6),
        ids(4, 2, 6),
        r(2, 6),
    ),
    "scatter_reduce": (
        lambda x, i, y: x.scatter_reduce(0, i, y, "mean"),
        r(4, 6),
        ids(4, 2, 6),
        r(2, 6),
    ),
    "scatter_reduce_": (
        lambda x, i, y: x.clone().scatter_reduce_(0, i, y, "amax"),
        r(4, 6),
        ids(4, 2, 6),
        r(2, 6),
    ),
    "index_add": (lambda x, i, y: x.index_add(0, i, y), r(4, 6), ids(4, 2), r(2, 6)),
    "index_add_": (
        lambda x, i, y: x.clone().index_add_(1, i, y),
        r(4, 6),
        ids(6, 2),
        r(4, 2),
    ),
    "index_add 1d": (lambda x, i, y: x.index_add(0, i, y), r(4), ids(4, 4), r(4)),
    "index_add same": (
        lambda x, i, y: x.index_add(0, i, y),
        r(4, 4),
        ids(4, 4),
        r(4, 4),
    ),
    "index_put": (lambda x, i, y: x.index_put((i,), y), r(4, 6), ids(4, 2), r(2, 6)),
    "index_copy": (
        lambda x, i, y: x.index_copy(0, i, y),
        r(4, 6),
        torch.tensor([2, 0]),
        r(2, 6),
    ),
    "index_fill": (lambda x, i: x.index_fill(0, i, 1.0), r(4, 6), ids(4, 2)),
    "masked_scatter": (
        lambda x, m, y: x.masked_scatter(m, y),
        r(4, 6),
        mask(4, 6),
        r(4, 6),
    ),
    "take_along_dim": (lambda x, i: x.take_along_dim(i, 1), r(4, 6), ids(6, 4, 2)),
    "embedding_bag": (F.embedding_bag, ids(8, 2, 4), r(8, 6)),
    "embedding_bag max": (
        lambda i, w: F.embedding_bag(i, w, torch.tensor([0, 2]), mode="max"),
        ids(8, 6),
        r(8, 6),
    ),
    "embedding_bag weighted": (
        lambda i, w, p: F.embedding_bag(i, w, per_sample_weights=p, mode="sum"),
        ids(8, 2, 4),
        r(8, 6),
        r(2, 4),
    ),
}
