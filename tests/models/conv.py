"""What is built of convolutions in image and audio models."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

IMAGE = (2, 3, 8, 8)


def conv(i, o, k=1, norm=True, act=nn.ReLU, dim=2, **kw):
    """Convolution, norm, activation."""
    layer, batch_norm = [
        (nn.Conv1d, nn.BatchNorm1d),
        (nn.Conv2d, nn.BatchNorm2d),
        (nn.Conv3d, nn.BatchNorm3d),
    ][dim - 1]
    kw.setdefault("padding", k // 2)
    norm = batch_norm(o) if norm is True else norm
    return nn.Sequential(
        layer(i, o, k, bias=not norm, **kw),
        norm or nn.Identity(),
        act() if act else nn.Identity(),
    )


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Net(nn.Sequential):
    """A stem, blocks of `c` channels, pooling, a head."""

    def __init__(self, *blocks, c=12, classes=5):
        super().__init__(
            conv(3, c, 3),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(c, classes),
        )


def basic(c=12, h=24):
    return Residual(conv(c, h, 3), conv(h, c, 3, act=None))


def bottleneck(c=12, h=24, groups=1, k=3):
    return Residual(conv(c, h), conv(h, h, k, groups=groups), conv(h, c, act=None))


class SqueezeExcite(nn.Module):
    def __init__(self, c, r, linear=False):
        super().__init__()
        self.linear = linear
        layer = nn.Linear if linear else partial(nn.Conv2d, kernel_size=1)
        self.reduce, self.expand, self.act = (
            layer(c, r),
            layer(r, c),
            nn.ReLU(inplace=True),
        )

    def forward(self, x):
        s = x.mean((2, 3)) if self.linear else F.adaptive_avg_pool2d(x, 1)
        s = torch.sigmoid(self.expand(self.act(self.reduce(s))))
        return x * (s[:, :, None, None] if self.linear else s)


def inverted(c=12, h=48, linear=False, act=nn.Hardswish):
    return Residual(
        conv(c, h, act=act),
        conv(h, h, 3, groups=h, act=act),
        SqueezeExcite(h, 6, linear),
        conv(h, c, act=None),
    )


class Channels(nn.Module):
    """ECA: a convolution over the channels of the pooled image; LocalResponseNorm; a
    blur of each channel; max pooling."""

    def __init__(self):
        super().__init__()
        self.eca, self.norm = nn.Conv1d(
            1, 1, 3, padding=1, bias=False
        ), nn.LocalResponseNorm(3)
        self.register_buffer(
            "blur",
            torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])) / 16,
        )

    def forward(self, x):
        y = self.eca(x.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1)
        x = self.norm(x * y.sigmoid().expand_as(x))
        blur = self.blur[None, None].expand(x.shape[1], 1, 3, 3)
        return F.conv2d(
            F.pad(F.max_pool2d(x, 2, 1), (1, 1, 1, 1), "reflect"),
            blur,
            stride=2,
            groups=x.shape[1],
        )


class ConvNeXt(nn.Module):
    def __init__(self, c=192):
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(
            c, c, 3, padding=1, groups=c
        ), nn.LayerNorm(c)
        self.up, self.down, self.gamma = (
            nn.Linear(c, 4 * c),
            nn.Linear(4 * c, c),
            nn.Parameter(torch.full((c,), 0.1)),
        )

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


class UNet(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.a, self.b, self.c = (
            conv(3, 12, 3),
            conv(12, 24, 3, groups=groups),
            conv(24, 48, 3),
        )
        self.up1 = nn.ConvTranspose2d(48, 24, 2, stride=2, groups=groups)
        self.up2 = nn.ConvTranspose2d(24, 12, 3, stride=2, padding=1, output_padding=1)
        self.d1, self.d2, self.out = (
            conv(48, 24, 3),
            conv(24, 12, 3),
            nn.Conv2d(12, 2, 1),
        )

    def forward(self, x):
        a = self.a(x)
        b = self.b(F.max_pool2d(a, 2))
        c = self.c(F.avg_pool2d(b, 2))
        x = self.d1(torch.cat([self.up1(c), b], 1))
        x = self.d2(torch.cat([self.up2(x), a], 1))
        return F.interpolate(
            self.out(x), scale_factor=2, mode="bilinear", align_corners=False
        )


class Transposed(nn.Sequential):
    """A decoder: transposed convolutions by channels, by groups, and of each channel;
    pixels from channels."""

    def __init__(self, groups=6):
        super().__init__(
            nn.ConvTranspose2d(3, 24, 2, stride=2),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.ConvTranspose2d(24, 24, 3, padding=1, groups=24),
            nn.GELU(),
            nn.ConvTranspose2d(24, 48, 3, padding=1, groups=groups),
            nn.PixelShuffle(2),
            nn.PReLU(12),
            nn.Upsample(scale_factor=0.5),
            nn.ConvTranspose2d(12, 3, 1),
        )


class GroupNorms(nn.Module):
    def __init__(self, groups=6):
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(3, 24, 3),
            nn.Conv2d(24, 36, 3),
            nn.Conv2d(36, 8, 1),
        )
        self.norm_a, self.norm_b = nn.GroupNorm(groups, 24), nn.GroupNorm(36, 36)

    def forward(self, x):
        x = F.group_norm(
            self.a(x),
            weight=self.norm_a.weight,
            bias=self.norm_a.bias,
            num_groups=self.norm_a.num_groups,
        )
        return self.c(F.silu(self.norm_b(self.b(F.silu(x)))))


class Instances(nn.Module):
    """InstanceNorm, with statistics of its own or running ones; BatchNorm without
    running statistics, or without weights."""

    def __init__(self):
        super().__init__()
        norms = nn.InstanceNorm2d(24, affine=True), nn.InstanceNorm2d(
            24, affine=True, track_running_stats=True
        )
        norms += nn.BatchNorm2d(24, track_running_stats=False), nn.BatchNorm2d(
            24, affine=False
        )
        norms += nn.BatchNorm2d(24, momentum=None), nn.BatchNorm2d(24, momentum=0.5)
        self.layers = nn.Sequential(
            *(
                Residual(
                    nn.Conv2d(12, 24, 1),
                    norm,
                    nn.ReLU(),
                    nn.Conv2d(24, 12, 3, padding=1),
                )
                for norm in norms
            )
        )
        self.stem = nn.Conv2d(3, 12, 1)

    def forward(self, x):
        return self.layers(self.stem(x))


class Wave(nn.Module):
    """A codec's 1-D convolutions: weights with norms, a gate by halves, groups of
    positions; then 3-D."""

    def __init__(self, c=12, normed=True):
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm if normed else lambda m: m
        self.inp, self.position = norm(nn.Conv1d(3, c, 3, padding="same")), norm(
            nn.Conv1d(c, c, 4, padding=2, groups=6)
        )
        self.gate, self.depth = norm(nn.Conv1d(c, 8 * c, 1)), nn.Conv1d(
            4 * c, 4 * c, 5, padding=2, groups=4 * c
        )
        self.bn, self.out = nn.BatchNorm1d(4 * c), nn.Conv1d(4 * c, c, 1)
        self.wide = nn.Sequential(
            conv(1, 12, 3, dim=3), conv(12, 12, 3, dim=3, groups=6), nn.Conv3d(12, 2, 1)
        )

    def forward(self, x):
        x = self.inp(x)
        x = x + F.gelu(self.position(x)[..., :-1])
        x = x + self.out(F.silu(self.bn(self.depth(F.glu(self.gate(x), 1)))))
        return self.wide(x.unflatten(2, (4, 4)).unsqueeze(1))


class Shuffled(nn.Module):
    """ShuffleNet: grouped convolutions whose groups' channels are mixed in between, and
    halves of channels that rest."""

    def __init__(self, groups=6):
        super().__init__()
        self.groups, self.a = groups, conv(3, 24)
        self.b, self.c, self.d = (
            conv(24, 48, groups=groups),
            conv(48, 48, 3, groups=48),
            conv(48, 24, groups=groups),
        )
        self.last = conv(12, 12, 3)

    def forward(self, x):
        x = self.a(x)
        y = self.b(x)
        b, c, h, w = y.shape
        x = x + self.d(
            self.c(
                y.view(b, self.groups, c // self.groups, h, w)
                .transpose(1, 2)
                .reshape(b, -1, h, w)
            )
        )
        rest, x = x.chunk(2, 1)
        return torch.cat([rest, self.last(x)], 1)


class Windows(nn.Module):
    """Swin: shifted windows, a bias by relative position, patches merged."""

    def __init__(self, d=24, heads=6, window=4):
        super().__init__()
        self.heads, self.window = heads, window
        self.patch, self.norm = nn.Conv2d(3, d, 1), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.1)
        at = torch.stack(
            torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        ).flatten(1)
        at = at[:, :, None] - at[:, None] + window - 1
        self.register_buffer("index", at[0] * (2 * window - 1) + at[1])
        self.merge = nn.Linear(4 * d, 2 * d, bias=False)

    def forward(self, x):
        x = self.patch(x).permute(0, 2, 3, 1)
        b, h, w, d = x.shape
        k = self.window
        y = torch.roll(self.norm(x), (-2, -2), (1, 2)).view(b, h // k, k, w // k, k, d)
        y = y.transpose(2, 3).reshape(-1, k * k, d)
        q, key, v = (
            self.qkv(y).reshape(len(y), k * k, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )
        bias = self.table[self.index.view(-1)].view(k * k, k * k, -1).permute(2, 0, 1)
        a = (q @ key.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias).softmax(-1)
        y = self.proj((a @ v).transpose(1, 2).reshape(len(y), k * k, d))
        y = y.view(b, h // k, w // k, k, k, d).transpose(2, 3).reshape(b, h, w, d)
        x = x + torch.roll(y, (2, 2), (1, 2))
        return self.merge(
            torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1)
        )


class Standardized(nn.Conv2d):
    """A convolution whose weight is standardised before each use."""

    def forward(self, x):
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1),
            None,
            None,
            training=True,
            momentum=0.0,
        )
        return F.conv2d(
            x,
            weight.reshape_as(self.weight),
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )


def standardized(c=12):
    norms = [nn.GroupNorm(6, n) for n in (c, 24, 48)]
    layers = (
        Standardized(c, 24, 1),
        Standardized(24, 48, 3, padding=1),
        Standardized(48, c, 1),
    )
    return Residual(*(x for pair in zip(norms, [nn.ReLU()] * 3, layers) for x in pair))


class Bags(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.bag, self.out, self.mode = (
            nn.EmbeddingBag(40, 12, mode=mode, padding_idx=3),
            nn.Linear(12, 24),
            mode,
        )

    def forward(self, ids, offsets, weights):
        return self.out(self.bag(ids, offsets, weights if self.mode == "sum" else None))


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.both = (
            nn.Linear(8, 24),
            nn.Linear(8, 24),
            nn.Bilinear(24, 24, 12),
        )
        self.gate, self.out = nn.Sequential(
            nn.Linear(12, 48), nn.GLU(), nn.PReLU(24), nn.LogSigmoid()
        ), nn.Linear(24, 12)

    def forward(self, x, y):
        x, y = self.a(x), self.b(y)
        z = self.out(self.gate(self.both(x, y).flatten(0, 1)))
        return (
            z,
            F.cosine_similarity(x, y, -1),
            F.normalize(x, dim=-1),
            F.pairwise_distance(x, y),
        )


def image(*shape):
    return lambda: (torch.randn(*(shape or IMAGE)),)


def bags():
    return torch.randint(40, (9,)), torch.tensor([0, 4, 4]), torch.randn(9)


# name -> (how it is built, its inputs, modules whose weights compute on shards of an
# axis that runs through).
MODELS = {
    "ResNet": (lambda: Net(basic(), bottleneck()), image(), ["1.0.0", "1.1.0"]),
    "ResNeXt": (
        lambda: Net(bottleneck(groups=6)),
        image(),
        ["1.0.0", "1.1.0", "1.2.0"],
    ),
    "MobileNet": (
        lambda: Net(inverted()),
        image(),
        ["1.0.0", "1.1.0", "1.2.reduce", "1.2.expand", "1.3.0"],
    ),
    "squeeze-excite of Linears": (
        lambda: Net(inverted(linear=True, act=nn.SiLU)),
        image(),
        ["1.0.0", "1.2.reduce", "1.2.expand", "1.3.0"],
    ),
    "channels": (
        lambda: Net(Residual(conv(12, 24), Channels(), nn.Upsample(8), conv(24, 12))),
        image(),
        [],
    ),
    "ConvNeXt": (
        lambda: Net(ConvNeXt(), ConvNeXt(), c=192),
        image(),
        ["1.up", "1.down", "2.up", "2.down"],
    ),
    "U-Net": (UNet, image(), []),
    "U-Net with groups": (lambda: UNet(6), image(), []),
    "transposed": (Transposed, image(), ["0", "3"]),
    "group norm": (GroupNorms, image(), []),
    "other norms": (
        Instances,
        image(),
        ["layers.2.0", "layers.3.0", "layers.3.3", "layers.5.3"],
    ),
    "1-D and 3-D": (
        Wave,
        image(2, 3, 16),
        ["depth", "out", "wide.0.0", "wide.1.0", "wide.2"],
    ),
    "1-D plain": (
        lambda: Wave(normed=False),
        image(2, 3, 16),
        ["gate", "depth", "out"],
    ),
    "shuffled": (Shuffled, image(), []),
    "Swin": (Windows, image(), ["qkv", "proj"]),
    "standardised": (lambda: Net(standardized(), standardized()), image(), []),
    "bags by sum": (lambda: Bags("sum"), bags, []),
    "bags by mean": (lambda: Bags("mean"), bags, []),
    "bags by max": (lambda: Bags("max"), bags, []),
    "pairs": (
        Pairs,
        lambda: (torch.randn(2, 4, 8), torch.randn(2, 4, 8)),
        ["gate.0", "out"],
    ),
}
