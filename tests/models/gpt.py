"""A GPT and its parts, in the ways in which attention and MLPs are written."""

import torch
import torch.nn.functional as F
from torch import nn


def features(*shape):
    return lambda: (torch.randn(*shape),)


def ids(high, *shape):
    return lambda: (torch.randint(0, high, shape),)


def mlp(d=16, h=32, bias=True):
    return nn.Sequential(
        nn.Linear(d, h, bias=bias), nn.GELU(), nn.Linear(h, d, bias=bias)
    )


class Attention(nn.Module):
    """Attention with separate q, k, v; `style` is how its sizes are written."""

    def __init__(
        self,
        d=32,
        heads=4,
        kv_heads=None,
        style="infer",
        bias=True,
        norm=False,
        dropout=0.0,
    ):
        super().__init__()
        self.num_heads, self.kv_heads, self.head_dim = (
            heads,
            kv_heads or heads,
            d // heads,
        )
        self.hidden, self.style, self.dropout = d, style, nn.Dropout(dropout)
        self.q = nn.Linear(d, heads * self.head_dim, bias=bias)
        self.k = nn.Linear(d, self.kv_heads * self.head_dim, bias=bias)
        self.v = nn.Linear(d, self.kv_heads * self.head_dim, bias=bias)
        self.o = nn.Linear(heads * self.head_dim, d, bias=bias)
        self.q_norm = nn.RMSNorm(self.head_dim) if norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim) if norm else nn.Identity()

    def heads(self, x, n):
        b, t, _ = x.shape
        return x.view(b, t, -1 if self.style == "infer" else n, self.head_dim)

    def forward(self, x, mask=None):
        b, t, _ = x.shape
        q = self.q_norm(self.heads(self.q(x), self.num_heads)).transpose(1, 2)
        k = self.k_norm(self.heads(self.k(x), self.kv_heads)).transpose(1, 2)
        v = self.heads(self.v(x), self.kv_heads).transpose(1, 2)
        groups = self.num_heads // self.kv_heads
        if groups > 1:  # as transformers' repeat_kv
            k = (
                k[:, :, None]
                .expand(b, k.shape[1], groups, t, self.head_dim)
                .reshape(b, -1, t, self.head_dim)
            )
            v = (
                v[:, :, None]
                .expand(b, v.shape[1], groups, t, self.head_dim)
                .reshape(b, -1, t, self.head_dim)
            )
        scores = q @ k.transpose(-1, -2) / self.head_dim**0.5
        causal = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        scores = scores.masked_fill(~causal, float("-inf"))
        if mask is not None:
            scores = scores + mask
        out = (self.dropout(scores.softmax(-1)) @ v).transpose(1, 2)
        return self.o(out.reshape(b, t, -1 if self.style == "infer" else self.hidden))


class Block(nn.Module):
    def __init__(self, d=32, h=64, dropout=0.0, parallel=False, **options):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = Attention(d, dropout=dropout, **options)
        self.mlp = nn.Sequential(
            nn.Linear(d, h), nn.GELU(), nn.Dropout(dropout), nn.Linear(h, d)
        )
        self.parallel = parallel

    def forward(self, x, mask=None):
        if self.parallel:
            return x + self.attn(self.ln_1(x), mask) + self.mlp(self.ln_2(x))
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, vocab=64, d=32, layers=1, tied=False, **options):
        super().__init__()
        self.wte = nn.Embedding(vocab, d)
        self.blocks = nn.ModuleList(Block(d, **options) for _ in range(layers))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocab, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, ids, mask=None):
        x = self.wte(ids)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


class GatedMLP(nn.Module):
    def __init__(self, d=16, h=32, how="chunk"):
        super().__init__()
        self.gate_up, self.down, self.how, self.h = (
            nn.Linear(d, 2 * h),
            nn.Linear(h, d),
            how,
            h,
        )

    def forward(self, x):
        x = self.gate_up(x)
        if self.how == "chunk":
            gate, up = x.chunk(2, dim=-1)
        elif self.how == "split":
            gate, up = x.split(self.h, dim=-1)
        elif self.how == "slice":
            gate, up = x[..., : self.h], x[..., self.h :]
        else:
            gate, up = x[..., ::2], x[..., 1::2]
        return self.down(F.silu(gate) * up)


class FusedAttention(nn.Module):
    """One projection for q, k and v. `kind`: equal pieces, grouped pieces of unequal
    size, or interleaved by head."""

    def __init__(self, d=32, heads=4, kv_heads=4, kind="split"):
        super().__init__()
        self.heads, self.kv_heads, self.dim, self.kind = (
            heads,
            kv_heads,
            d // heads,
            kind,
        )
        self.embed_dim = d
        self.sizes = [heads * self.dim, kv_heads * self.dim, kv_heads * self.dim]
        self.qkv, self.proj = nn.Linear(d, sum(self.sizes)), nn.Linear(d, d)

    def forward(self, x):
        b, t, d = x.shape
        x = self.qkv(x)
        if self.kind == "split":
            q, k, v = x.split(self.sizes, dim=-1)
        elif self.kind == "width":
            q, k, v = x.split(self.embed_dim, dim=2)
        elif self.kind == "timm":
            q, k, v = (
                y.flatten(2) for y in x.reshape(b, t, 3, self.heads, self.dim).unbind(2)
            )
        else:
            q, k, v = (
                y.flatten(2) for y in x.view(b, t, self.heads, 3, self.dim).unbind(3)
            )
        q, k, v = (y.view(b, t, -1, self.dim).transpose(1, 2) for y in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads
        )
        return self.proj(out.transpose(1, 2).reshape(b, t, d))


class ConvNet(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2)
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.n1, self.n2 = norm(8), norm(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.n1(self.c1(x)))
        x = F.relu(self.n2(self.c2(x)))
        return self.fc(self.depth(x).mean((2, 3)))
