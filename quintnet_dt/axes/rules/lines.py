"""The rules that are a line each, in the notation of notation.py."""

from functools import cache

from ...tracing.graph import Node
from ..findings import Findings
from .apply import rule_of_line
from .notation import parse
from .table import Rule, arg, rule, unknown

LINES = {
    "mm": "i k, k j -> i j",
    "bmm": "b i k, b k j -> b i j",
    "mv": "i k, k -> i",
    "dot": "k, k ->",
    "addmm": "+i j, i k, k j -> i j",
    "baddbmm": "+b i j, b i k, b k j -> b i j",
    "addmv": "+i, i k, k -> i",
    "_trilinear": "n i, o i j, n j -> n o",
    "_grouped_mm": "_! k, _! k j, _!, _...! -> _ j",  # rows in groups by offsets
    "embedding": "v~ d, ... -> ... d",
    "_embedding_bag _embedding_bag_forward_only": "_! d, _!, _!, _! -> _ d",
    "native_group_norm": (
        "b (g c!) _...!, (g c!), (g c!) -> b (g c) _..., b g, b g; g=group"
    ),
    # channels pass, the statistics are taken over all other dims
    "native_batch_norm cudnn_batch_norm miopen_batch_norm"
    " _native_batch_norm_legit _native_batch_norm_legit_no_training"
    " _native_batch_norm_legit_functional _batch_norm_with_update": (
        "_! c _...!, c, c, c, c -> _ c _..., c, c, c, c, c"
    ),
    # pooling and resizing: batch and channels pass
    "upsample_linear1d upsample_nearest1d _upsample_nearest_exact1d"
    " reflection_pad1d replication_pad1d": "... _! -> ... _",
    "max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d"
    " upsample_bilinear2d upsample_bicubic2d upsample_nearest2d"
    " _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa"
    " reflection_pad2d replication_pad2d": "... _! _! -> ... _ _, ... _ _",
    "max_pool3d_with_indices avg_pool3d _adaptive_avg_pool3d adaptive_max_pool3d"
    " upsample_nearest3d upsample_trilinear3d _upsample_nearest_exact3d"
    " reflection_pad3d replication_pad3d": "... _! _! _! -> ... _ _ _, ... _ _ _",
    "grid_sampler_2d": "b c _! _!, b p q _! -> b c p q",
    "grid_sampler_3d": "b c _! _! _!, b p q r _! -> b c p q r",
    "pixel_shuffle": (
        "... (c p! q!) h w -> ... c (h p) (w q); p=upscale_factor, q=upscale_factor"
    ),
    "pixel_unshuffle": (
        "... c (h p!) (w q!) -> ... (c p q) h w; p=downscale_factor, q=downscale_factor"
    ),
    "im2col": "... c _! _! -> ... (c _) _",
    "col2im": "... (c k!) _! -> ... c _ _; k=kernel_size",
    "tril triu linalg_matrix_exp": "... _! _! -> ... _ _",
    # matrices are needed whole, batches of them pass
    "linalg_solve_triangular": "... _! _!, ... _! _! -> ... _ _",
    "linalg_inv_ex linalg_cholesky_ex": "... _! _! -> ... _ _, ...",
    "_linalg_det": "... _! _! -> ..., ... _ _, ... _",
    "_linalg_slogdet": "... _! _! -> ..., ..., ... _ _, ... _",
    "_linalg_eigh": "... _! _! -> ... _, ... _ _",
    "_linalg_svd": "... _! _! -> ... _ _, ... _, ... _ _",
    "linalg_qr": "... _! _! -> ... _ _, ... _ _",
    "view_as_complex": "... _! -> ...",
    "view_as_real": "... -> ... _",
}

ATTENTION = {
    "_scaled_dot_product_flash_attention": "b h q _!, b h _! _!, b h _! e -> b h q e",
    "_scaled_dot_product_flash_attention_for_cpu"
    " _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention": (
        "b h q _!, b h _! _!, b h _! e, b h q _! -> b h q e"
    ),
}


@cache
def _rule(line: str) -> Rule:
    return rule_of_line(parse(line))


def _attention(line: str) -> Rule:
    """A causal mask counts queries from the first: then they are needed whole; dropout
    draws one mask for all."""
    as_the_line_says = _rule(line)

    def apply(node: Node, axes: Findings) -> None:
        if arg(node, "dropout_p"):
            return unknown(node, axes)
        if arg(node, "is_causal"):
            queries = node.inputs[0]
            axes.unsharded(node, queries, axes.dims(queries)[2])
        as_the_line_says(node, axes)

    return apply


for _names, _line in LINES.items():
    rule(_names)(_rule(_line))
for _names, _line in ATTENTION.items():
    rule(_names)(_attention(_line))


@rule("convolution")
def convolution(node: Node, axes: Findings) -> None:
    weight = "(g i) o" if arg(node, "transposed") else "(g o) i"
    line = f"b (g i) _...!, {weight} _...!, +(g o) -> b (g o) _...; g=groups"
    _rule(line)(node, axes)


@rule("_weight_norm_interface")
def weight_norm(node: Node, axes: Findings) -> None:
    """Rows of a weight, each with its own norm, are scaled."""
    first, last = (
        "n _...!, n _... -> n _..., n _...",
        "_...! n, _... n -> _... n, _... n",
    )
    _rule(last if arg(node, "dim") else first)(node, axes)
