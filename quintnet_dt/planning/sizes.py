"""The numbers in a model's code that size a tensor: which of them are of the whole,
where a call works on a shard."""

from typing import Any

from ..groups import Group, Units, whole_of
from ..keys import ArgPath
from ..running.sizes import LocalSize, PartOf, Rest, WholeOf
from ..tracing.graph import Call
from ..utils import leaves, lookup, tensors

# Calls whose integers are sizes: they may differ between the whole and the shard when
# what comes out is as expected.
VIEWS = {"view", "reshape", "unflatten"}
SHAPED = VIEWS | set("expand broadcast_to zeros ones full empty".split())
SHAPED |= {"new_zeros", "new_ones", "new_full", "new_empty"}
OF_LAST_DIMS = {"layer_norm", "rms_norm"}
SIZES = SHAPED | OF_LAST_DIMS | {"repeat", "repeat_interleave"}
_OUTPUT_SIZE = 1, "output_size"  # of repeat_interleave: its path
CONVOLUTIONS = (
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split()
)
# Where the number of groups is among the arguments, by position and by name.
GROUPS = {"group_norm": (1, "num_groups"), **dict.fromkeys(CONVOLUTIONS, (6, "groups"))}


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
    call: Call, given: tuple, expected: dict, units: list[Units], group: Group
) -> dict[ArgPath, LocalSize]:
    """By path, the sizes in (args, kwargs) to change for a call to give the expected
    shapes on a rank. `units`: of the axis that it works on shards of; of any axis, where
    it works on none."""
    args, kwargs = given
    groups = groups_at(call, args)
    if groups is not None and groups in integers(given):
        return _groups(call, given, groups, units)
    if call.name == "unflatten":  # its first integer names the dim, whose sizes follow
        dim = args[1] % args[0].dim()
        sizes = dict(list(integers(given).items())[1:])
    elif call.name == "repeat_interleave" and _OUTPUT_SIZE in integers(given):
        dim = kwargs["dim"] if "dim" in kwargs else args[2]
        dim %= args[0].dim()
        sizes = {_OUTPUT_SIZE: kwargs["output_size"]}
    elif call.name == "repeat":
        return _repeats(call, integers(given), expected, units)
    elif call.name in OF_LAST_DIMS:
        sizes = integers(given)
        dim = args[0].dim() - len(sizes)
    elif call.name in SHAPED:
        dim, sizes = 0, integers(given)
    else:
        return {}
    return _Sizes(call, sizes, expected, dim, units, group).changed()


def _groups(
    call: Call, given: tuple, groups: ArgPath, units: list[Units]
) -> dict[ArgPath, LocalSize]:
    """Each rank has its groups: of channels that are sharded, or of a convolution's
    weight."""
    whole, local = next(iter(call.inputs.values())), next(tensors(given))[1]
    split = call.name != "group_norm" or whole.shape[1] != local.shape[1]
    unchanged = lookup(given, groups) == lookup(call.args, groups)
    return {groups: PartOf(units[0])} if split and unchanged and units else {}


def _repeats(
    call: Call, counts: dict[ArgPath, int], expected: dict, units: list[Units]
) -> dict[ArgPath, LocalSize]:
    """How often each dim is repeated: in parts where a rank has some of the repeats."""
    path, local = next(iter(expected.items()))
    dims = zip(counts, call.outputs[path].shape, local)
    return {at: PartOf(units[0]) for at, whole, wanted in dims if whole != wanted}


class _Sizes:
    """Sizes in the order of the dims that come out, from `dim` on."""

    def __init__(
        self,
        call: Call,
        sizes: dict[ArgPath, int],
        expected: dict,
        dim: int,
        units: list[Units],
        group: Group,
    ):
        self.call, self.sizes, self.units, self.group = call, sizes, units, group
        path, local = next(iter(expected.items()))
        # By path, the whole size and the one that is wanted.
        self.whole = dict(zip(sizes, call.outputs[path].shape[dim:]))
        self.wanted = dict(zip(sizes, local[dim:]))

    def changed(self) -> dict[ArgPath, LocalSize]:
        found: dict[ArgPath, LocalSize] = {}
        for at, wanted in self.wanted.items():
            if wanted != self.whole[at] == self.sizes[at]:
                found[at] = PartOf(self.units[0])
        wrong = [at for at in self.wanted if self.is_of_shard(at)]
        leaves_rest = self.call.name in VIEWS and -1 not in self.sizes.values()
        if leaves_rest and len(wrong) == 1:
            return {**found, wrong[0]: Rest()}
        for at in wrong:
            if (units := self.units_of(at)) is not None:
                found[at] = WholeOf(units)
        return found

    def is_of_shard(self, at: ArgPath) -> bool:
        """Whether the whole is wanted where the code computed something else, from a
        shard's own size."""
        return (
            self.sizes[at] >= 0 and self.whole[at] == self.wanted[at] != self.sizes[at]
        )

    def units_of(self, at: ArgPath) -> Units | None:
        """In which units a size is that of a shard of what is wanted."""
        for units in self.units:
            if whole_of(self.sizes[at], units, self.group) == self.wanted[at]:
                return units
        return None
