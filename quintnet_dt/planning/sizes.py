"""The numbers in a model's code that size a tensor: which of them are of the whole, where a call
works on a shard."""

from ..utils import leaves, lookup, tensors

# Calls whose integers are sizes: they may differ between the whole and the shard when what comes
# out is as expected.
SIZES = set(
    "view reshape expand unflatten zeros ones full empty new_zeros new_ones new_full new_empty".split()
)


CONVOLUTIONS = "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split()


def groups_at(call, args):
    """The path of the number of groups in a group norm's or a convolution's arguments; None in
    other calls."""
    known = {"group_norm": (1, "num_groups"), **dict.fromkeys(CONVOLUTIONS, (6, "groups"))}
    at, keyword = known.get(call.name, (None, None))
    return None if at is None else (0, at) if at < len(args) else (1, keyword)


def localise(call, args, kwargs, expected, n):
    """Paths into (args, kwargs) of the sizes to divide by the number `n` of ranks for a call to
    give the expected shapes, and of those to multiply by it: what the code computed from a shard's
    own size, `y.shape[-1] // heads`."""
    ints = {
        p: x for p, x in leaves((args, kwargs)) if isinstance(x, int) and not isinstance(x, bool)
    }
    whole = {p: v.shape for p, v in call.outputs.items()}
    groups = groups_at(call, args)
    if groups in ints:
        x, local = next(iter(call.inputs.values())), next(tensors((args, kwargs)))[1]
        split = call.name != "group_norm" or x.shape[1] != local.shape[1]
        return ([groups] if split and ints[groups] == lookup(call.args, groups) else []), []
    if call.name not in ("view", "reshape", "expand", "unflatten") and not call.name.startswith(
        "new_"
    ):
        return [], []
    (path, local), *_ = expected.items()
    first = 1 if call.name == "unflatten" else 0
    at = args[1] % args[0].dim() if first else 0
    sizes = list(zip(list(ints.items())[first:], whole[path][at:], local[at:]))
    divided = [p for (p, x), a, b in sizes if a != b and x == a]
    multiplied = [p for (p, x), a, b in sizes if a == b == x * n]
    return divided, multiplied
