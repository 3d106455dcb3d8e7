"""Reductions, and other operators that are given dims."""

import torch
import torch.nn.functional as F

from .inputs import a, ids, r

REDUCTIONS = {}
for name in (
    "sum mean amax amin var std argmax argmin any all prod logsumexp max min median"
    " norm nansum nanmedian count_nonzero aminmax var_mean std_mean mode"
).split():
    for dim in ((), (0,), (1,), (-1,)):
        for keep in (False, True):
            if (
                (dim == () and (keep or name in ("logsumexp", "mode", "aminmax")))
                or name == "count_nonzero"
                and keep
            ):
                continue
            kw = {"dim": dim[0]} if dim else {}
            kw |= {"keepdim": True} if keep else {}
            REDUCTIONS[f"{name} {dim} {keep}"] = (
                lambda x, n=name, kw=kw: getattr(torch, n)(x, **kw),
                r(4, 6, 2),
            )
for name in (
    "sum",
    "mean",
    "amax",
    "var",
    "logsumexp",
    "nansum",
    "any",
    "var_mean",
    "std_mean",
):
    for dim in ((0, 2), (1, -1), (0, 1, 2)):
        for keep in (False, True):
            REDUCTIONS[f"{name} {dim} {keep}"] = (
                lambda x, n=name, d=dim, k=keep: getattr(torch, n)(x, dim=d, keepdim=k),
                r(4, 6, 2),
            )
REDUCTIONS |= {
    "sum of ones": (lambda x: x.sum(1), r(4, 1, 6)),
    "sum keep ones": (lambda x: x.sum(0, keepdim=True), r(4, 1, 6)),
    "sum 1d": (lambda x: x.sum(0), r(4)),
    "sum 0d": (lambda x: x.sum(0), r(1)[0]),
    "sum dtype": (lambda x: x.sum(-1, dtype=torch.float64), r(4, 6).round().long()),
    "mean of ones": (lambda x: x.mean(1), r(4, 1, 6)),
    "std correction": (lambda x: torch.std(x, dim=1, correction=0), r(4, 6)),
    "var unbiased": (lambda x: torch.var(x, 1, True), r(4, 6)),
    "vector_norm": (lambda x: torch.linalg.vector_norm(x, 3, dim=-1), r(4, 6)),
    "vector_norm all": (lambda x: torch.linalg.vector_norm(x), r(4, 6)),
    "max of two": (torch.max, r(4, 6), r(4, 6) * 0.5),
    "max of two broadcast": (torch.max, r(4, 6), r(6)),
    "normalize": (lambda x: F.normalize(x, dim=-1), r(4, 6)),
    "mse": (F.mse_loss, r(4, 6), r(4, 6) * 2),
    "mse none": (lambda x, y: F.mse_loss(x, y, reduction="none"), r(4, 6), r(4, 6) * 2),
    "smooth l1": (F.smooth_l1_loss, r(4, 6), r(4, 6) * 2),
    "huber": (F.huber_loss, r(4, 6), r(4, 6) * 2),
    "l1": (F.l1_loss, r(4, 6), r(4, 6) * 2),
    "bce": (F.binary_cross_entropy_with_logits, r(4, 6), r(4, 6).sigmoid()),
    "kl": (F.kl_div, r(4, 6), r(4, 6).sigmoid()),
    "nll": (F.nll_loss, r(4, 6), ids(6, 4)),
    "cross entropy": (F.cross_entropy, r(4, 6), ids(6, 4)),
    "cosine": (F.cosine_similarity, r(4, 6), r(4, 6) * 2 + 1),
    "cdist": (torch.cdist, r(2, 4, 6), r(2, 3, 6)),
}
for (
    name
) in (
    "softmax log_softmax cumsum cumprod logcumsumexp cummax cummin sort argsort".split()
):
    for dim in (0, 1, -1):
        REDUCTIONS[f"{name} {dim}"] = (
            lambda x, n=name, d=dim: getattr(torch, n)(x, d),
            r(4, 6, 2),
        )
REDUCTIONS |= {
    "softmax ones": (lambda x: x.softmax(1), r(4, 1, 6)),
    "safe softmax": (lambda x: a._safe_softmax(x, -1), r(4, 6)),
    "sort stable": (lambda x: torch.sort(x, dim=1, stable=True), r(4, 6)),
    "topk": (lambda x: x.topk(2, 1), r(4, 6, 2)),
    "topk all": (lambda x: x.topk(6), r(4, 6)),
    "topk one": (lambda x: x.topk(1, 0), r(4, 6)),
    "kthvalue": (lambda x: x.kthvalue(2, 1), r(4, 6)),
    "flip": (lambda x: x.flip(1), r(4, 6)),
    "flip two": (lambda x: x.flip((0, -1)), r(4, 6, 2)),
    "flip none": (lambda x: x.flip(()), r(4, 6)),
    "roll": (lambda x: x.roll(1, 1), r(4, 6)),
    "roll two": (lambda x: x.roll((1, -2), (0, 1)), r(4, 6, 2)),
    "roll flat": (lambda x: x.roll(1), r(4, 6)),
    "diff": (lambda x: x.diff(dim=1), r(4, 6)),
    "rot90": (lambda x: x.rot90(), r(4, 4)),
    "trace": (torch.trace, r(4, 4)),
    "diagonal": (lambda x: x.diagonal(), r(4, 4)),
    "equal": (lambda x, y: x * float(torch.equal(x, y)), r(4, 6), r(4, 6)),
}
