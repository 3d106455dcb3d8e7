"""What an ATen operator does, as far as its name and schema tell: reads values, draws
random numbers, shares memory or writes to it."""

from functools import cache

import torch

from ..utils import tensors

# What a forward may read of its values: on fake tensors these have no answer.
READS_VALUES = (
    "aten::_local_scalar_dense aten::nonzero aten::nonzero_static aten::unique_dim"
    " aten::_unique2 aten::unique_consecutive aten::masked_select aten::bincount"
    " aten::equal aten::is_nonzero aten::repeat_interleave"
).split()

BATCH_NORMS = {
    "aten::native_batch_norm",
    "aten::cudnn_batch_norm",
    "aten::miopen_batch_norm",
}


def reads_values(func, args):
    """Whether the result of an ATen operator, or its shape, depends on its inputs'
    values."""
    if func._schema.name == "aten::index":
        return any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
    return func._schema.name in READS_VALUES and "self_int" not in str(func)


def draws(func, args, kwargs):
    """Whether an ATen operator draws random numbers; attention does where it drops
    out."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    names = [a.name for a in func._schema.arguments]
    return "dropout_p" not in names or bool(
        dict(zip(names, args), **kwargs).get("dropout_p")
    )


@cache
def _aliases(func):
    """(position, name) of the arguments whose memory an operator's outputs share, and
    of those that it writes to."""
    marked = [
        (i, a) for i, a in enumerate(func._schema.arguments) if a.alias_info is not None
    ]
    views = any(r.alias_info is not None for r in func._schema.returns)
    return [(i, a.name) for i, a in marked if views], [
        (i, a.name) for i, a in marked if a.alias_info.is_write
    ]


def aliased(func, args):
    """The tensor whose memory an operator's outputs share; None if they own theirs."""
    return next(
        (
            args[i]
            for i, _ in _aliases(func)[0]
            if i < len(args) and isinstance(args[i], torch.Tensor)
        ),
        None,
    )


def written_by(func, args, kwargs):
    """The tensors that an operator writes to."""
    found = [
        args[i] if i < len(args) else kwargs.get(name) for i, name in _aliases(func)[1]
    ]
    if func._schema.name in BATCH_NORMS and args[5]:
        found += args[3:5]  # running statistics, which its schema does not tell of
    return [t for _, t in tensors(found)]
