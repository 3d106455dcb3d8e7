"""How a tensor lies in memory: random numbers are drawn in that order, so a mask depends on it."""


def dims_in_memory(x, whole=None):
    """The dims of a tensor that are longer than 1 (in `whole`, where it is a part of that), outermost in memory
    first."""
    longer = [d for d, size in enumerate((x if whole is None else whole).shape) if size > 1]
    return tuple(sorted(longer, key=lambda d: (x.stride(d), x.shape[d]), reverse=True))


def laid_out(x, order):
    """The same tensor, dense, with its dims in this order in memory; those that are not named lie innermost."""
    order = [*order, *(d for d in range(x.dim()) if d not in order)]
    back = [order.index(d) for d in range(x.dim())]
    return x.permute(order).contiguous().permute(back)
