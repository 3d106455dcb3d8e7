"""Rules of operators that are given dims: they reduce them or need them whole, the
others pass."""

import torch

from ...tracing.graph import Node
from ..factors import fresh, unify
from ..findings import Findings
from .pointwise import pointwise
from .table import arg, dims_of, every, pass_but, rule, signature

WHOLE = (
    "_softmax _log_softmax _safe_softmax cumsum cumprod logcumsumexp cummax cummin sort"
    " topk flip roll argsort _fft_r2c _fft_c2r _fft_c2c amax amin var std var_mean"
    " std_mean argmax argmin any all prod logsumexp linalg_vector_norm max min median"
    " norm nansum select unbind index_select"
)


@rule(WHOLE)
def whole_dims(node: Node, axes: Findings) -> None:
    if torch.Tag.pointwise in node.op.tags:  # max(a, b) and its kind
        return pointwise(node, axes)
    name = "dims" if "dims" in signature(node.op) else "dim"
    pass_but(node, axes, dims_of(node, len(node.inputs[0].shape), name))


@rule("sum mean")
def sum_(node: Node, axes: Findings) -> None:
    value, out = node.inputs[0], node.outputs[0]
    dims = axes.dims(value)
    over = dims_of(node, len(dims))
    axes.contract(node, every(dims[i] for i in over))
    axes.effects[id(node)].mean = node.op._schema.name == "aten::mean"
    keepdim = len(out.shape) == len(dims)
    kept = [(i, d) for i, d in enumerate(dims) if keepdim or i not in over]
    axes.set(out, [[] if i in over else d for i, d in kept])


@rule("native_layer_norm _fused_rms_norm rms_norm")
def layer_norm(node: Node, axes: Findings) -> None:
    """The normalized dims pass, to the scales too; a rank that has a part of them needs
    what on_shard.py exchanges."""
    value, *scales = node.inputs
    dims = axes.dims(value)
    normalized = dims[len(dims) - len(arg(node, "normalized_shape")) :]
    axes.unsharded(node, value, every(normalized))
    for scale in scales:
        axes.unsharded(node, scale, every(axes.dims(scale)))
        for of_scale, dim in zip(axes.dims(scale), normalized):
            unify(of_scale, dim)
    result, *statistics = node.outputs
    axes.set(result, dims)
    passing = dims[: len(dims) - len(normalized)]
    ones = (1,) * len(normalized)
    for statistic in statistics:
        if tuple(statistic.shape) == (*value.shape[: len(passing)], *ones):
            axes.set(statistic, [*passing, *map(fresh, ones)])


@rule("constant_pad_nd")
def pad(node: Node, axes: Findings) -> None:
    last = len(node.inputs[0].shape) - 1
    amounts = enumerate(arg(node, "pad"))  # two a dim, the last dim's first
    pass_but(node, axes, [last - i // 2 for i, amount in amounts if amount])
