"""Operators on each element."""

import torch
import torch.nn.functional as F

from .inputs import a, ids, mask, r

POINTWISE = {
    "add": (lambda x, y: x + y, r(4, 6), r(4, 6)),
    "add broadcast": (lambda x, y: x + y, r(4, 1), r(1, 6)),
    "add rank": (lambda x, y: x + y, r(2, 4, 6), r(6)),
    "add left rank": (lambda x, y: x + y, r(6), r(2, 4, 6)),
    "add scalar": (lambda x: x + 2, r(4, 6)),
    "add 0d": (lambda x, y: torch.add(x, y, alpha=3), r(4, 6), r(1)[0]),
    "add itself transposed": (lambda x: x + x.t(), r(4, 4)),
    "outer difference": (lambda x: x[:, None] - x[None, :], r(4)),
    "add factored": (
        lambda x, y: x.view(4, 3, 2).reshape(4, 6) + y.view(4, 2, 3).reshape(4, 6),
        r(4, 6),
        r(24),
    ),
    "mul": (lambda x, y: x * y, r(4, 6), r(4, 1)),
    "where": (torch.where, mask(4, 1), r(6), r(4, 6)),
    "where scalar": (lambda m, x: torch.where(m, x, 0.0), mask(4, 6), r(4, 6)),
    "masked_fill": (lambda x, m: x.masked_fill(m, -9.0), r(2, 4, 6), mask(4, 6)),
    "masked_fill broadcasts self": (
        lambda x, m: x.masked_fill(m, -9.0),
        r(6),
        mask(4, 6),
    ),
    "masked_fill 0d": (
        lambda x, m, y: x.masked_fill(m, y),
        r(4, 6),
        mask(4, 6),
        r(1)[0],
    ),
    "masked_fill_": (
        lambda x, m: x.clone().masked_fill_(m, -9.0),
        r(2, 4, 6),
        mask(4, 6),
    ),
    "add_": (lambda x, y: x.clone().add_(y), r(4, 6), r(6)),
    "mul_ 0d": (lambda x, y: x.clone().mul_(y), r(4, 6), r(1)[0]),
    "add_ view": (lambda x, y: x.clone().view(2, 2, 6).add_(y), r(4, 6), r(2, 6)),
    "copy_": (lambda x, y: x.clone().copy_(y), r(2, 4, 6), r(4, 1)),
    "copy_ square": (lambda x, y: x.clone().copy_(y), r(4, 4), r(4, 1)),
    "zero_": (lambda x: x.clone().zero_(), r(4, 6)),
    "fill_": (lambda x: x.clone().fill_(2.0), r(4, 6)),
    "fill_ tensor": (lambda x, y: x.clone().fill_(y), r(4, 6), r(1)[0]),
    "setitem": (
        lambda x, y: x.clone().__setitem__((slice(None), slice(0, 3)), y),
        r(4, 6),
        r(4, 3),
    ),
    "to": (lambda x: x.to(torch.float32).double(), r(4, 6)),
    "clone": (lambda x: x.clone().contiguous(), r(4, 6)),
    "detach": (lambda x: x.detach(), r(4, 6)),
    "alias": (lambda x: a.alias(x), r(4, 6)),
    "lift": (lambda x: a.lift_fresh(x), r(4, 6)),
    "likes": (
        lambda x: (torch.zeros_like(x), torch.ones_like(x), torch.full_like(x, 3.0)),
        r(4, 6),
    ),
    "new_zeros": (lambda x: x.new_zeros(4, 6) + x, r(4, 6)),
    "lerp": (torch.lerp, r(4, 6), r(4, 6) * 2, r(6)),
    "addcmul": (torch.addcmul, r(4, 6), r(4, 1), r(6)),
    "clamp": (lambda x, y: x.clamp(min=y), r(4, 6), r(6)),
    "frexp": (torch.frexp, r(4, 6)),
    "prelu": (F.prelu, r(2, 4, 6), r(4)),
    "prelu one": (F.prelu, r(2, 4, 6), r(1)),
    "glu": (lambda x: F.glu(x, -1), r(4, 8)),
    "glu first": (lambda x: F.glu(x, 1), r(4, 8, 2)),
    "swiglu": (lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], r(4, 8)),
    "logsigmoid": (F.logsigmoid, r(4, 6)),
    "dropout eval": (lambda x: F.dropout(x, 0.5, False), r(4, 6)),
    "maximum": (torch.maximum, r(4, 6), r(6)),
    "complex": (lambda x, y: torch.complex(x, y), r(4, 6), r(4, 6) * 2),
    "polar": (lambda x, y: torch.polar(x, y), r(4, 6), r(4, 6) * 2),
    "real": (lambda x: torch.complex(x, x).real, r(4, 6)),
    "isin": (lambda x: torch.isin(x, torch.tensor([1, 2])), ids(4, 4, 6)),
    "bucketize": (lambda x, y: torch.bucketize(x, y), r(4, 6), r(4).sort()[0]),
    "nan_to_num": (torch.nan_to_num, r(4, 6)),
    "new": (
        lambda x: (
            x.new_ones(4, 2),
            x.new_full((4, 6, 2), 3.0),
            x.new_empty(4, 6).fill_(2) + x,
        ),
        r(4, 6),
    ),
    "hardswish_": (lambda x: F.hardswish(x.clone(), inplace=True), r(4, 6)),
}
for name in (
    "relu gelu silu mish tanh sigmoid hardtanh hardswish hardsigmoid leaky_relu elu"
    " selu celu softplus softsign relu6 logsigmoid tanhshrink softshrink hardshrink"
    " threshold rrelu"
).split():
    kw = {"threshold": (0.1, 3.0)}.get(name, ())
    POINTWISE[name] = (lambda x, n=name, kw=kw: getattr(F, n)(x, *kw), r(4, 6))
for (
    name
) in "exp log1p sqrt rsqrt abs neg sin cos erf floor round sign reciprocal square logical_not isnan atan".split():
    POINTWISE[name] = (lambda x, n=name: getattr(torch, n)(x.abs() + 1), r(4, 6))
for (
    name
) in "sub div pow atan2 fmod remainder eq lt logical_and minimum hypot xlogy logaddexp copysign floor_divide".split():
    POINTWISE[name] = (
        lambda x, y, n=name: getattr(torch, n)(x, y),
        r(4, 6).abs() + 1,
        r(6).abs() + 1,
    )
