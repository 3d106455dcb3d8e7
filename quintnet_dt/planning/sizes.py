"""The numbers in a model's code that size a tensor: which of them are of the whole,
where a call works on a shard."""

from typing import Any, NamedTuple

from ..groups import Units
from ..keys import ArgPath
from ..tracing.graph import Call
from ..utils import leaves, lookup, tensors

# Calls whose integers are sizes: they may differ between the whole and the shard when
# what comes out is as expected.
SIZES = set(
    "view reshape expand unflatten zeros ones full empty new_zeros new_ones new_full"
    " new_empty".split()
)
CONVOLUTIONS = (
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split()
)
# Where the number of groups is among the arguments, by position and by name.
GROUPS = {"group_norm": (1, "num_groups"), **dict.fromkeys(CONVOLUTIONS, (6, "groups"))}


class Localised(NamedTuple):
    """Paths in (args, kwargs) of the sizes that a call on shards needs for a rank's
    part, and of those that it needs multiplied by the number of ranks: what the code
    computed from a shard's own size, `y.shape[-1] // heads`."""

    # of how many units the whole size is dealt out
    divided: dict[ArgPath, Units]
    multiplied: list[ArgPath]


def integers(obj: Any) -> dict[ArgPath, int]:
    """The integers in a nested argument, by path."""
    return {
        p: x for p, x in leaves(obj) if isinstance(x, int) and not isinstance(x, bool)
    }


def groups_at(call: Call, args: tuple) -> ArgPath | None:
    """The path of the number of groups in a group norm's or a convolution's arguments;
    None in other calls."""
    if call.name not in GROUPS:
        return None
    position, keyword = GROUPS[call.name]
    return (0, position) if position < len(args) else (1, keyword)


def localise(
    call: Call, args: tuple, kwargs: dict, expected: dict, units: Units, n: int
) -> Localised:
    """The sizes to change for a call to give the expected shapes on one of `n` ranks,
    which share these `units`."""
    given = (args, kwargs)
    groups = groups_at(call, args)
    if groups is not None and groups in integers(given):
        return _groups(call, given, groups, units)
    if call.name == "unflatten":  # its first integer names the dim, whose sizes follow
        dim = args[1] % args[0].dim()
        sizes = list(integers(given).items())[1:]
        return _sizes(call, sizes, expected, dim, units, n)
    if call.name in ("view", "reshape", "expand") or call.name.startswith("new_"):
        sizes = list(integers(given).items())
        return _sizes(call, sizes, expected, 0, units, n)
    return Localised({}, [])


def _groups(call: Call, given: tuple, groups: ArgPath, units: Units) -> Localised:
    """Each rank has its groups: of channels that are sharded, or of a convolution's
    weight."""
    whole, local = next(iter(call.inputs.values())), next(tensors(given))[1]
    split = call.name != "group_norm" or whole.shape[1] != local.shape[1]
    unchanged = lookup(given, groups) == lookup(call.args, groups)
    return Localised({groups: units} if split and unchanged else {}, [])


def _sizes(
    call: Call, sizes: list, expected: dict, dim: int, units: Units, n: int
) -> Localised:
    """Sizes in the order of the dims that come out, from `dim` on."""
    path, local = next(iter(expected.items()))
    found = Localised({}, [])
    shapes = zip(call.outputs[path].shape[dim:], local[dim:])
    for (at, size), (whole, wanted) in zip(sizes, shapes):
        if whole != wanted and size == whole:
            found.divided[at] = units
        elif whole == wanted == size * n:
            found.multiplied.append(at)
    return found
