"""Products and attention."""

import torch
import torch.nn.functional as F

from .inputs import a, ids, mask, r

E = torch.eye(4)

PRODUCTS = {
    "mm": (torch.mm, r(4, 6), r(6, 8)),
    "mm square": (lambda x: x @ x.t(), r(4, 4)),
    "mm gram": (lambda x: x @ x, r(4, 4)),
    "mv": (torch.mv, r(4, 6), r(6)),
    "dot": (torch.dot, r(6), r(6)),
    "bmm": (torch.bmm, r(2, 4, 6), r(2, 6, 8)),
    "bmm batch 1": (torch.bmm, r(1, 4, 6), r(1, 6, 8)),
    "matmul broadcast": (torch.matmul, r(4, 1, 2, 6), r(2, 6, 8)),
    "linear": (F.linear, r(2, 4, 6), r(8, 6), r(8)),
    "linear no bias": (F.linear, r(2, 4, 6), r(8, 6)),
    "linear one feature": (F.linear, r(2, 4, 6), r(1, 6), r(1)),
    "addmm": (
        lambda b, x, y: torch.addmm(b, x, y, alpha=2, beta=3),
        r(8),
        r(4, 6),
        r(6, 8),
    ),
    "addmm 2d bias": (
        lambda b, x, y: torch.addmm(b, x, y, beta=0.5),
        r(4, 8),
        r(4, 6),
        r(6, 8),
    ),
    "addmm row bias": (torch.addmm, r(1, 8), r(4, 6), r(6, 8)),
    "addmm column bias": (torch.addmm, r(4, 1), r(4, 6), r(6, 8)),
    "addmm one": (torch.addmm, r(1), r(4, 6), r(6, 8)),
    "addmm scalar bias": (torch.addmm, r(1)[0], r(4, 6), r(6, 8)),
    "addmm bias is an input": (lambda x, y: torch.addmm(x, x, y), r(4, 4), r(4, 4)),
    "addmv": (
        lambda b, x, y: torch.addmv(b, x, y, alpha=2, beta=3),
        r(4),
        r(4, 6),
        r(6),
    ),
    "baddbmm": (
        lambda b, x, y: torch.baddbmm(b, x, y, alpha=2, beta=3),
        r(2, 4, 8),
        r(2, 4, 6),
        r(2, 6, 8),
    ),
    "baddbmm row": (torch.baddbmm, r(1, 1, 8), r(2, 4, 6), r(2, 6, 8)),
    "baddbmm 1d": (torch.baddbmm, r(8), r(2, 4, 6), r(2, 6, 8)),
    "embedding": (F.embedding, ids(8, 2, 4), r(8, 6)),
    "embedding 1d": (lambda i, w: F.embedding(i, w, padding_idx=0), ids(8, 4), r(8, 6)),
    "embedding 0d": (F.embedding, ids(8, 1)[0], r(8, 6)),
    "einsum": (
        lambda x, y: torch.einsum("bhqd,bhkd->bhqk", x, y),
        r(2, 4, 3, 6),
        r(2, 4, 5, 6),
    ),
    "grouped_mm": (
        lambda x, w: F.grouped_mm(x, w, offs=torch.tensor([2, 8], dtype=torch.int32)),
        ids(3, 8, 16).bfloat16(),  # small integers: exact
        ids(2, 2, 16, 16).bfloat16(),
    ),
    "bilinear": (F.bilinear, r(2, 4, 6), r(2, 4, 8), r(4, 6, 8), r(4)),
}


def sdpa(**kw):
    return lambda q, k, v, *m: F.scaled_dot_product_attention(q, k, v, *m, **kw)


def q(h=4, n=4, d=8, b=2):
    return r(b, h, n, d)


PRODUCTS |= {
    "sdpa": (sdpa(), q(), q(n=6) * 0.9, q(n=6)),
    "sdpa causal": (sdpa(is_causal=True), q(), q() * 0.9, q() * 0.8),
    "sdpa scale": (sdpa(scale=0.3), q(), q() * 0.9, q() * 0.8),
    "sdpa gqa": (sdpa(enable_gqa=True), q(4), q(2), q(2) * 0.8),
    **{
        f"sdpa mask {s}": (sdpa(), q(), q(n=6) * 0.9, q(n=6), r(*s))
        for s in [
            (2, 4, 4, 6),
            (1, 1, 4, 6),
            (2, 1, 4, 6),
            (2, 1, 1, 6),
            (1, 4, 4, 6),
            (4, 6),
            (4, 1, 6),
            (1, 6),
        ]
    },
    "sdpa bool mask": (
        sdpa(),
        q(),
        q(n=6) * 0.9,
        q(n=6),
        mask(2, 1, 4, 6) | torch.eye(4, 6, dtype=torch.bool),
    ),
    "sdpa 3d": (sdpa(), r(4, 6, 8), r(4, 6, 8), r(4, 6, 8)),
    "sdpa math": (
        lambda q, k, v: a._scaled_dot_product_attention_math(q, k, v),
        q(),
        q() * 0.9,
        q(),
    ),
    "conv1d": (
        lambda x, w, b: F.conv1d(x, w, b, padding=1),
        r(2, 4, 8),
        r(6, 4, 3),
        r(6),
    ),
    "conv2d": (
        lambda x, w, b: F.conv2d(x, w, b, stride=2),
        r(2, 4, 8, 6),
        r(6, 4, 2, 2),
        r(6),
    ),
    "conv2d no bias": (
        lambda x, w: F.conv2d(x, w, dilation=2),
        r(2, 4, 8, 6),
        r(6, 4, 2, 2),
    ),
    "conv2d unbatched": (
        lambda x, w, b: F.conv2d(x, w, b),
        r(4, 8, 6),
        r(6, 4, 2, 2),
        r(6),
    ),
    "conv2d groups": (
        lambda x, w, b: F.conv2d(x, w, b, groups=2),
        r(2, 4, 8, 6),
        r(6, 2, 2, 2),
        r(6),
    ),
    "conv2d depthwise": (
        lambda x, w, b: F.conv2d(x, w, b, groups=4),
        r(2, 4, 8, 6),
        r(8, 1, 2, 2),
        r(8),
    ),
    "conv2d depthwise 1": (
        lambda x, w: F.conv2d(x, w, groups=4),
        r(2, 4, 8, 6),
        r(4, 1, 2, 2),
    ),
    "conv2d one in": (
        lambda x, w, b: F.conv2d(x, w, b),
        r(2, 1, 8, 6),
        r(4, 1, 2, 2),
        r(4),
    ),
    "conv2d 1x1": (
        lambda x, w, b: F.conv2d(x, w, b),
        r(4, 4, 4, 4),
        r(4, 4, 1, 1),
        r(4),
    ),
    "conv3d": (
        lambda x, w, b: F.conv3d(x, w, b),
        r(2, 4, 4, 4, 4),
        r(6, 4, 2, 2, 2),
        r(6),
    ),
    "convt1d": (
        lambda x, w, b: F.conv_transpose1d(x, w, b, stride=2),
        r(2, 4, 8),
        r(4, 6, 3),
        r(6),
    ),
    "convt2d": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2),
        r(2, 4, 8, 6),
        r(4, 6, 2, 2),
        r(6),
    ),
    "convt2d groups": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, groups=2),
        r(2, 4, 8, 6),
        r(4, 3, 2, 2),
        r(6),
    ),
    "convt2d depthwise": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, groups=4),
        r(2, 4, 8, 6),
        r(4, 1, 2, 2),
        r(4),
    ),
    "convt3d": (
        lambda x, w, b: F.conv_transpose3d(x, w, b),
        r(2, 4, 4, 4, 4),
        r(4, 6, 2, 2, 2),
        r(6),
    ),
    "solve triangular": (
        lambda a, b: torch.linalg.solve_triangular(a + 9 * E, b, upper=False),
        r(4, 4, 4),
        r(4, 4, 6),
    ),
    "inverse": (lambda a: torch.linalg.inv(a + 9 * E), r(6, 4, 4)),
    "cholesky": (lambda a: torch.linalg.cholesky(a @ a.mT + E), r(6, 4, 4)),
    "det": (lambda a: torch.linalg.det(a + 3 * E), r(6, 4, 4)),
    "slogdet": (lambda a: torch.linalg.slogdet(a + 3 * E)[1], r(6, 4, 4)),
    "eigh": (lambda a: torch.linalg.eigh(a + a.mT)[0], r(6, 4, 4)),
    "svd": (lambda a: torch.linalg.svd(a, full_matrices=False)[1], r(6, 4, 2)),
    "qr": (lambda a: torch.linalg.qr(a)[0], r(6, 4, 2)),
    "matrix exp": (lambda a: torch.linalg.matrix_exp(a), r(6, 4, 4)),
    "tril": (lambda x: torch.tril(x, 1), r(2, 4, 6)),
    "triu": (lambda x: torch.triu(x), r(2, 4, 6)),
    "complex": (
        lambda x: torch.view_as_real(torch.view_as_complex(x) * 2j),
        r(2, 4, 2),
    ),
    "complex rotary": (
        lambda x, f: torch.view_as_real(
            torch.view_as_complex(x.reshape(2, 4, 4, 2)) * torch.view_as_complex(f)
        ),
        r(2, 4, 8),
        r(4, 4, 2),
    ),
}
