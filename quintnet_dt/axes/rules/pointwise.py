"""Rules of operators that work on each element, reduce dims, or need a dim whole while the others
pass."""

import torch

from ..factors import unify
from .table import arg, dims_of, every, fresh, pass_but, rule, unknown

SAME = (
    "clone _to_copy detach alias lift_fresh contiguous zeros_like ones_like full_like empty_like"
    " zero_ fill_ masked_fill_ masked_fill copy_ hardswish hardswish_ log_sigmoid_forward"
    " _prelu_kernel"
)
CHANNELS = (
    "max_pool2d_with_indices avg_pool2d max_pool3d_with_indices avg_pool3d _adaptive_avg_pool2d"
    " _adaptive_avg_pool3d adaptive_max_pool2d upsample_bilinear2d upsample_bicubic2d"
    " upsample_nearest2d upsample_linear1d upsample_nearest1d upsample_nearest3d"
    " upsample_trilinear3d reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d"
    " reflection_pad3d replication_pad3d _upsample_nearest_exact1d _upsample_nearest_exact2d"
    " _upsample_nearest_exact3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa adaptive_max_pool3d"
)
REDUCE = (
    "amax amin var std var_mean std_mean argmax argmin any all prod logsumexp linalg_vector_norm"
    " max min median norm nansum"
)
WHOLE_DIM = (
    "_softmax _log_softmax _safe_softmax cumsum cumprod logcumsumexp cummax cummin sort topk flip"
    " roll argsort _fft_r2c _fft_c2r _fft_c2c"
)


@rule(SAME)
def pointwise(node, axes):
    """Dims are aligned from the right; a dim of size 1 broadcasts."""
    if not node.outputs:  # torch.equal reads values
        return unknown(node, axes)
    out = node.outputs[0]
    n = len(out.shape)
    dims = [None] * n
    for v in node.inputs:
        shift = n - len(v.shape)
        for i, dim in enumerate(axes.dims(v)):
            if v.shape[i] == 1 and out.shape[i + shift] != 1:
                continue
            if dims[i + shift] is None:
                dims[i + shift] = dim
            else:
                unify(dims[i + shift], dim)
    dims = [fresh(s) if d is None else d for d, s in zip(dims, out.shape)]
    for v in node.outputs:
        if v.shape == out.shape:
            axes.set(v, dims)


@rule("bernoulli_ native_dropout dropout")
def dropout(node, axes):
    """A mask for each element. Within a call of dropout the layout gives each rank its part of the
    whole mask."""
    return (pointwise if axes.call.name == "dropout" else unknown)(node, axes)


rule("rand_like randn_like uniform_ normal_ exponential_")(unknown)  # ranks would draw the same


@rule(WHOLE_DIM)
def whole_dim(node, axes):
    name = "dims" if any(a.name == "dims" for a in node.op._schema.arguments) else "dim"
    pass_but(node, axes, dims_of(node, len(node.inputs[0].shape), name))


@rule(REDUCE)
def reduce(node, axes):
    if len(node.inputs) > 1:  # max(a, b) and its kind
        return pointwise(node, axes) if torch.Tag.pointwise in node.op.tags else unknown(node, axes)
    pass_but(node, axes, dims_of(node, len(node.inputs[0].shape)))


@rule("sum mean")
def sum_(node, axes):
    value, out = node.inputs[0], node.outputs[0]
    over = set(dims_of(node, len(value.shape)))
    dims = axes.dims(value)
    axes.contract(node, [f for i in over for f in dims[i]])
    axes.effects[id(node)].mean = node.op._schema.name == "aten::mean"
    keep = len(out.shape) == len(dims)
    axes.set(out, [[] if i in over else d for i, d in enumerate(dims) if keep or i not in over])


@rule("native_layer_norm _fused_rms_norm rms_norm")
def layer_norm(node, axes):
    value, n = node.inputs[0], len(arg(node, "normalized_shape"))
    over = range(len(value.shape) - n, len(value.shape))
    for v in node.inputs[1:]:
        axes.whole(node, v, every(axes.dims(v)))
    pass_but(node, axes, list(over))
    for out in node.outputs[1:]:  # mean and rstd: size 1 where normalised
        if len(out.shape) == len(value.shape):
            axes.set(
                out,
                [
                    d if s == m else fresh(s)
                    for d, s, m in zip(axes.dims(value), out.shape, value.shape)
                ],
            )


@rule(
    "native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit"
    " _native_batch_norm_legit_no_training _native_batch_norm_legit_functional"
    " _batch_norm_with_update"
)
def batch_norm(node, axes):
    """Channels (dim 1) pass; the statistics are taken over all other dims."""
    value = node.inputs[0]
    dims = axes.dims(value)
    for v in node.inputs[1:]:
        if v.shape == value.shape[1:2]:
            unify(dims[1], axes.dims(v)[0])
        else:
            axes.whole(node, v, every(axes.dims(v)))
    axes.whole(node, value, dims[0] + every(dims[2:]))
    for out in node.outputs:
        if out.shape == value.shape:
            axes.set(
                out, [d if i == 1 else fresh(s) for i, (d, s) in enumerate(zip(dims, out.shape))]
            )
        elif out.shape == value.shape[1:2]:
            axes.set(out, [dims[1]])


@rule("native_group_norm")
def group_norm(node, axes):
    """b (g c) s..: groups pass, what is within one is normalised together."""
    value, out = node.inputs[0], node.outputs[0]
    groups = arg(node, "group")
    g, c = fresh(groups), fresh(value.shape[1] // groups)
    for v in node.inputs:
        dims = axes.dims(v)
        unify(dims[0 if len(dims) == 1 else 1], g + c)
        axes.whole(node, v, c + every(dims[2:]))
    axes.set(out, [axes.dims(value)[0], g + c, *map(fresh, out.shape[2:])])
    for v in node.outputs[1:]:
        axes.set(v, [axes.dims(value)[0], g])


@rule(CHANNELS)
def channels(node, axes):
    """Pooling and resizing: batch and channels pass, the spatial dims are needed whole."""
    value = node.inputs[0]
    lead = len(value.shape) - (1 if "1d" in str(node.op) else 3 if "3d" in str(node.op) else 2)
    pass_but(node, axes, list(range(lead, len(value.shape))))


@rule("pixel_shuffle pixel_unshuffle")
def pixel_shuffle(node, axes):
    """.. (c p q) h w <-> .. c (h p) (w q)"""
    value, out = node.inputs[0], node.outputs[0]
    c, h, w, p, q = map(
        fresh, (*map(min, value.shape[-3:], out.shape[-3:]), node.args[1], node.args[1])
    )
    before, after = [c + p + q, h, w], [c, h + p, w + q]
    if value.shape[-3] < out.shape[-3]:
        before, after = after, before
    for dim, factors in zip(axes.dims(value)[-3:], before):
        unify(dim, factors)
    axes.whole(node, value, p + q)
    axes.set(out, [*axes.dims(value)[:-3], *after])


@rule("im2col")
def im2col(node, axes):
    """.. c h w -> .. (c k) l"""
    value, out = node.inputs[0], node.outputs[0]
    *lead, c, h, w = axes.dims(value)
    axes.whole(node, value, h + w)
    axes.set(out, [*lead, c + fresh(out.shape[-2] // value.shape[-3]), fresh(out.shape[-1])])


@rule("col2im")
def col2im(node, axes):
    """.. (c k) l -> .. c h w"""
    value, out = node.inputs[0], node.outputs[0]
    *lead, ck, length = axes.dims(value)
    c, k = fresh(out.shape[-3]), fresh(value.shape[-2] // out.shape[-3])
    unify(ck, c + k)
    axes.whole(node, value, k + length)
    axes.set(out, [*lead, c, *map(fresh, out.shape[-2:])])


@rule("glu")
def glu(node, axes):
    """A dim is (two halves, c): the first is scaled by the second."""
    value, out = node.inputs[0], node.outputs[0]
    dim = arg(node, "dim") % len(out.shape)
    half, c = fresh(2), fresh(out.shape[dim])
    unify(axes.dims(value)[dim], half + c)
    axes.whole(node, value, half)
    axes.set(out, [c if i == dim else d for i, d in enumerate(axes.dims(value))])


@rule("_weight_norm_interface")
def weight_norm(node, axes):
    """Rows of a weight, each with its own norm, are scaled."""
    v, g = node.inputs
    dim = arg(node, "dim") % len(v.shape)
    unify(axes.dims(v)[dim], axes.dims(g)[dim])
    pass_but(node, axes, [i for i in range(len(v.shape)) if i != dim])


@rule("new_empty new_zeros new_ones new_full")
def new(node, axes):
    """Reads no values; dims as long as the input's are taken to be those."""
    value, out = node.inputs[0], node.outputs[0]
    dims = zip(axes.dims(value), value.shape, out.shape)
    axes.set(
        out,
        [d if a == b else fresh(b) for d, a, b in dims]
        + [fresh(n) for n in out.shape[len(value.shape) :]],
    )


@rule("constant_pad_nd")
def pad(node, axes):
    n, amounts = len(node.inputs[0].shape), arg(node, "pad")
    pass_but(node, axes, [n - 1 - i // 2 for i, a in enumerate(amounts) if a])


@rule("expand repeat")
def repeat(node, axes):
    """A dim that is repeated k times is (k, itself)."""
    value, out = node.inputs[0], node.outputs[0]
    if 0 in out.shape:
        return unknown(node, axes)
    new = [1] * (len(out.shape) - len(value.shape))
    dims = [[] for _ in new] + axes.dims(value)
    axes.set(
        out, [fresh(n // size) + d for n, size, d in zip(out.shape, new + list(value.shape), dims)]
    )
