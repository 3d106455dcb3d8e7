"""Normalizations and losses."""

import torch
import torch.nn.functional as F

from .inputs import a, r

bn = dict(training=True)
NORMS = {
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (6,), w, b), r(2, 4, 6), r(6), r(6)),
    "layer_norm plain": (lambda x: F.layer_norm(x, (4, 6)), r(2, 4, 6)),
    "layer_norm all": (lambda x: F.layer_norm(x, (4, 6)), r(4, 6)),
    "layer_norm square": (
        lambda x, w, b: F.layer_norm(x, (6,), w, b),
        r(6, 6),
        r(6),
        r(6),
    ),
    "rms_norm": (lambda x, w: F.rms_norm(x, (6,), w), r(2, 4, 6), r(6)),
    "rms_norm plain": (lambda x: F.rms_norm(x, (4, 6)), r(2, 4, 6)),
    "fused rms_norm": (
        lambda x, w: a._fused_rms_norm(x, [6], w, 1e-5),
        r(2, 4, 6),
        r(6),
    ),
    "rms_norm by hand": (
        lambda x, w: w * (x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()),
        r(2, 4, 6),
        r(6),
    ),
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b), r(2, 4, 6), r(4), r(4)),
    "group_norm 2d": (lambda x: F.group_norm(x, 4), r(4, 4, 4, 2)),
    "group_norm flat": (lambda x, w, b: F.group_norm(x, 2, w, b), r(4, 4), r(4), r(4)),
    "batch_norm": (
        lambda x, m, v, w, b: F.batch_norm(x, m, v, w, b, **bn),
        r(4, 6, 4),
        r(6),
        r(6) ** 2,
        r(6),
        r(6),
    ),
    "batch_norm 2d input": (
        lambda x, m, v: F.batch_norm(x, m, v, **bn),
        r(4, 6),
        r(6),
        r(6) ** 2,
    ),
    "batch_norm square": (
        lambda x, m, v, w, b: F.batch_norm(x, m, v, w, b, **bn),
        r(4, 4),
        *[r(4) ** 2] * 4,
    ),
    "batch_norm no stats": (
        lambda x: F.batch_norm(x, None, None, training=True),
        r(4, 6, 4),
    ),
    "batch_norm eval": (
        lambda x, m, v, w, b: F.batch_norm(x, m, v, w, b),
        r(4, 6, 4),
        r(6),
        r(6) ** 2,
        r(6),
        r(6),
    ),
    "batch_norm legit": (
        lambda x, w, b, m, v: a._native_batch_norm_legit(
            x, w, b, m.clone(), v.clone(), True, 0.1, 1e-5
        ),
        r(4, 6, 2),
        *[r(6) ** 2] * 4,
    ),
    "batch_norm legit no stats": (
        lambda x, w, b: a._native_batch_norm_legit.no_stats(x, w, b, True, 0.1, 1e-5),
        r(4, 6, 2),
        *[r(6) ** 2] * 2,
    ),
    "batch_norm legit functional": (
        lambda x, w, b, m, v: a._native_batch_norm_legit_functional(
            x, w, b, m, v, True, 0.1, 1e-5
        ),
        r(4, 6, 2),
        *[r(6) ** 2] * 4,
    ),
    "batch_norm legit eval": (
        lambda x, w, b, m, v: a._native_batch_norm_legit_no_training(
            x, w, b, m, v, 0.1, 1e-5
        ),
        r(4, 6, 2),
        *[r(6) ** 2] * 4,
    ),
    "batch_norm update": (
        lambda x, w, b, m, v: a._batch_norm_with_update(
            x, w, b, m.clone(), v.clone(), 0.1, 1e-5
        ),
        r(4, 6, 2),
        *[r(6) ** 2] * 4,
    ),
    "local_response_norm": (lambda x: F.local_response_norm(x, 2), r(2, 4, 6)),
    "weight_norm": (lambda v, g: torch._weight_norm(v, g, 0), r(4, 6, 2), r(4, 1, 1)),
    "weight_norm last": (
        lambda v, g: torch._weight_norm(v, g, 2),
        r(4, 6, 8),
        r(1, 1, 8),
    ),
    "group_norm groups of one": (lambda x, w: F.group_norm(x, 4, w), r(2, 4, 6), r(4)),
    "instance_norm": (
        lambda x, w, b: F.instance_norm(x, weight=w, bias=b),
        r(2, 4, 6),
        r(4),
        r(4),
    ),
}
