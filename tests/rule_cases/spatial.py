"""Pooling, padding and resampling."""

import torch
import torch.nn.functional as F

from .inputs import r

X4, X3, X5 = r(2, 4, 8, 6), r(2, 4, 8), r(2, 4, 4, 4, 4)
SPATIAL = {
    "max_pool1d": (lambda x: F.max_pool1d(x, 2), X3),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), X4),
    "max_pool2d unbatched": (lambda x: F.max_pool2d(x, 2), r(4, 8, 6)),
    "max_pool2d indices": (lambda x: F.max_pool2d(x, 2, return_indices=True), X4),
    "max_pool2d same size": (lambda x: F.max_pool2d(x, 3, 1, 1), r(4, 4, 4, 4)),
    "max_pool3d": (lambda x: F.max_pool3d(x, 2, return_indices=True), X5),
    "avg_pool1d": (lambda x: F.avg_pool1d(x, 2), X3),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), X4),
    "avg_pool2d unbatched": (lambda x: F.avg_pool2d(x, 2), r(4, 8, 6)),
    "avg_pool3d": (lambda x: F.avg_pool3d(x, 2), X5),
    "adaptive_avg_pool1d": (lambda x: F.adaptive_avg_pool1d(x, 3), X3),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (3, 2)), X4),
    "adaptive_avg_pool2d one": (lambda x: F.adaptive_avg_pool2d(x, 1), X4),
    "adaptive_avg_pool3d": (lambda x: F.adaptive_avg_pool3d(x, 3), X5),
    "adaptive_max_pool1d": (lambda x: F.adaptive_max_pool1d(x, 3), X3),
    "adaptive_max_pool2d": (
        lambda x: F.adaptive_max_pool2d(x, 3, return_indices=True),
        X4,
    ),
    "adaptive_max_pool3d uneven": (lambda x: F.adaptive_max_pool3d(x, 3), X5),
    "upsample_nearest1d": (lambda x: F.interpolate(x, scale_factor=2), X3),
    "upsample_nearest2d": (lambda x: F.interpolate(x, size=(8, 6)), X4),
    "upsample_nearest2d scale": (lambda x: F.interpolate(x, scale_factor=2), X4),
    "upsample_nearest3d": (lambda x: F.interpolate(x, scale_factor=2), X5),
    "upsample_linear1d": (
        lambda x: F.interpolate(x, scale_factor=2, mode="linear"),
        X3,
    ),
    "upsample_bilinear2d": (
        lambda x: F.interpolate(x, size=(4, 4), mode="bilinear"),
        X4,
    ),
    "upsample_bicubic2d": (
        lambda x: F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=True),
        X4,
    ),
    "upsample_trilinear3d": (
        lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"),
        X5,
    ),
    "pad": (lambda x: F.pad(x, (1, 2)), X4),
    "pad channels": (lambda x: F.pad(x, (0, 0, 1, 1, 0, 2)), X4),
    "pad crop": (lambda x: F.pad(x, (-1, 0, -2, 1), value=3.0), X4),
    "pad shift": (lambda x: F.pad(x, (-1, 1)), X4),
    "pad none": (lambda x: F.pad(x, (0, 0)), X4),
    "reflection_pad1d": (lambda x: F.pad(x, (1, 2), mode="reflect"), X3),
    "reflection_pad1d unbatched": (lambda x: F.pad(x, (1, 2), mode="reflect"), r(4, 6)),
    "reflection_pad2d": (lambda x: F.pad(x, (1, 2, 1, 1), mode="reflect"), X4),
    "replication_pad1d": (lambda x: F.pad(x, (1, 2), mode="replicate"), X3),
    "replication_pad2d": (lambda x: F.pad(x, (1, 2, 1, 1), mode="replicate"), X4),
    "replication_pad3d": (lambda x: F.pad(x, (1, 2, 1, 1, 0, 1), mode="replicate"), X5),
    "circular pad": (lambda x: F.pad(x, (1, 2), mode="circular"), X3),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), r(2, 8, 4, 4)),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), r(2, 4, 4, 4)),
    "channel_shuffle": (lambda x: torch.channel_shuffle(x, 2), r(2, 4, 4, 4)),
    "unfold": (lambda x: F.unfold(x, 2), X4),
    "fold": (lambda x: F.fold(x, (4, 4), 2, stride=2), r(2, 16, 4)),
    "tensor unfold": (lambda x: x.unfold(1, 2, 2), r(4, 6)),
    "grid_sample": (
        lambda x, g: F.grid_sample(x, g.tanh(), align_corners=False),
        X4,
        r(2, 4, 4, 2),
    ),
    "lp_pool": (lambda x: F.lp_pool2d(x.abs(), 2, 2), X4),
    **{
        f"{m} {n}": (
            lambda x, m=m: F.interpolate(x, scale_factor=2, mode=m),
            r(2, 4, *[4] * n),
        )
        for m in ["nearest-exact"]
        for n in (1, 2, 3)
    },
    **{
        f"{m} aa": (
            lambda x, m=m: F.interpolate(x, scale_factor=0.5, mode=m, antialias=True),
            X4,
        )
        for m in ("bilinear", "bicubic")
    },
    "reflection_pad3d": (
        lambda x: F.pad(x, (1, 1, 1, 1, 1, 1), mode="reflect"),
        r(2, 4, 4, 4, 4),
    ),
    "adaptive_max_pool3d": (lambda x: F.adaptive_max_pool3d(x, 2), r(2, 4, 4, 4, 4)),
    "grid_sample 3d": (
        lambda x, g: F.grid_sample(x, g.tanh(), align_corners=False),
        r(2, 4, 4, 4, 4),
        r(2, 2, 4, 2, 3),
    ),
    "pixel_shuffle 3": (lambda x: F.pixel_shuffle(x, 3), r(2, 36, 4, 2)),
    "pixel_shuffle one": (lambda x: F.pixel_shuffle(x, 2), r(4, 1, 1)),
    "pixel_unshuffle 3d": (lambda x: F.pixel_unshuffle(x, 2), r(4, 4, 6)),
    "unfold unbatched": (lambda x: F.unfold(x, 2), r(4, 4, 4)),
    "fold unbatched": (lambda x: F.fold(x, (4, 4), 2, stride=2), r(16, 4)),
    "fft": (
        lambda x: torch.fft.ifft(
            torch.fft.fft(torch.fft.irfft(torch.fft.rfft(x), n=6), dim=1), dim=0
        ),
        r(2, 4, 6),
    ),
    "rfft2": (lambda x: torch.fft.rfft2(x, dim=(1, 2)), r(2, 4, 6, 4)),
}
