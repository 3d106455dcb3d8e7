"""Which elements a call takes of its tensors: the numbers in a model's code that index
a dim.

That a slice of a shard has the expected length proves nothing: `y[..., 6:12]` of a
shard of 9 has length 3, as it should, and other rows. So each cut of a dim on shards is
compared with the whole forward's, position by position, and numbers that were written
for the whole dim are translated.
"""

from dataclasses import dataclass
from typing import Any

from ..axes.split import Range, Split, joined
from ..groups import SimulatedGroup, Units, part_of
from ..running.program import Bound
from ..utils import leaves
from .operators import op_name

SPLITS = {
    "split",
    "split_with_sizes",
    "unsafe_split",
    "unsafe_split_with_sizes",
    "unbind",
}
CUTS = SPLITS | {"slice", "select"}

# Torch functions whose integers index a dim; where the dim is among their arguments.
DIM_ARGUMENT = {
    "narrow": 1,
    "select": 1,
    "split": 2,
    "split_with_sizes": 2,
    "unsafe_split": 2,
    "chunk": 2,
    "unsafe_chunk": 2,
    "tensor_split": 2,
}
INDEXING = {"__getitem__", "__setitem__", *DIM_ARGUMENT}


@dataclass(frozen=True)
class Part:
    """Elements `start`, `start + step`, ... of a dim, `length` of them."""

    start: int
    length: int
    step: int = 1


@dataclass(frozen=True)
class Cut:
    """What one ATen operator takes of a dim: a Part for each of its outputs."""

    name: str
    dim: int
    parts: tuple


def cut_of(op: Any, args: tuple, kwargs: dict, in_shape: Any, out_shapes: Any) -> Any:
    """The Cut that one of the ATen operators in CUTS makes."""
    name = op_name(op)
    names = [a.name for a in op._schema.arguments]
    given = (
        {a.name: a.default_value for a in op._schema.arguments}
        | dict(zip(names, args))
        | kwargs
    )
    dim = given["dim"] % len(in_shape)
    size = in_shape[dim]
    if name == "select":
        return Cut(name, dim, (Part(given["index"] % size, 1),))
    if name == "slice":
        start = min(max(_from_end(given["start"] or 0, size), 0), size)
        return Cut(name, dim, (Part(start, out_shapes[0][dim], given["step"]),))
    start, parts = 0, []
    for shape in out_shapes:
        length = 1 if name == "unbind" else shape[dim]
        parts.append(Part(start, length))
        start += length
    return Cut(name, dim, tuple(parts))


def whole_cuts(call: Any) -> Any:
    """[(node, Cut), ...] of a call of the whole forward."""
    cutting = [node for node in call.nodes if op_name(node.op) in CUTS]
    shapes = [
        (node.inputs[0].shape, [v.shape for v in node.outputs]) for node in cutting
    ]
    return [
        (node, cut_of(node.op, node.args, node.kwargs, *s))
        for node, s in zip(cutting, shapes)
    ]


def other_elements(
    call: Any, local_cuts: Any, axis: Any, axes: Any, group: SimulatedGroup
) -> Any:
    """Why a call on shards takes other elements than the whole forward's call; "" where
    every rank that has as much of the axis as this one takes its own.

    Args: `local_cuts`: Cuts of this rank's call; `axis`: the Axis that it works on,
    None if it is replicated.
    """
    expected = whole_cuts(call)
    if [cut.name for _, cut in expected] != [cut.name for cut in local_cuts]:
        return "it cuts a dim in other places on shards"
    for (node, whole), local in zip(expected, local_cuts):
        at = None if axis is None else axis.find(axes, node.inputs[0])
        if not at or at.dim != whole.dim:
            if whole != local:
                return (
                    f"{whole.name} takes {local.parts} of dim {whole.dim} on shards,"
                    f" not {whole.parts}"
                )
        elif not _own_parts(node, whole, local, at, axis, axes, group):
            return (
                f"{whole.name} takes {local.parts} of a shard, which are not those that"
                f" it has of {whole.parts}"
            )
    return ""


def _own_parts(
    node: Any,
    whole: Any,
    local: Any,
    at: Any,
    axis: Any,
    axes: Any,
    group: SimulatedGroup,
) -> bool:
    """Whether each rank's parts of its shard are its shards of the whole's parts, where
    the dim that is cut is sharded."""
    n = group.size
    sizes = axis.units.sizes(n)
    # of other lengths, others are shown
    alike = [rank for rank in range(n) if sizes[rank] == sizes[group.rank]]
    if len(whole.parts) != len(local.parts):
        return False
    for out, theirs, mine in zip(node.outputs, whole.parts, local.parts):
        out_at = axis.find(axes, out)
        if mine.step != theirs.step or not out_at or out_at.dim != at.dim:
            return False
        if theirs.step != 1:
            if not _one_of_each(theirs, mine, at, out_at, group):
                return False
            continue
        for rank in alike:
            wanted = [
                Range(theirs.start + start, length)
                for start, length in joined(out_at.ranges(rank, n))
            ]
            if _taken(joined(at.ranges(rank, n)), mine) != wanted:
                return False
    return True


def _one_of_each(
    whole: Part, local: Part, at: Split, out_at: Split, group: SimulatedGroup
) -> bool:
    """Whether a part that is one of every `step` elements is so of a shard too, whose
    ranges are of whole steps."""
    step, n = whole.step, group.size
    if whole.start >= step or local.start != whole.start:
        return False
    for rank in range(n):
        ranges = joined(at.ranges(rank, n))
        if any(start % step or length % step for start, length in ranges):
            return False
        steps = [Range(start // step, length // step) for start, length in ranges]
        if steps != joined(out_at.ranges(rank, n)):
            return False
    mine = sum(length for _, length in at.ranges(group.rank, n))
    return local.length * step == mine


def _taken(ranges: Any, part: Any) -> Any:
    """The ranges of a part of what lies one after the other in some ranges."""
    taken, at, end = [], 0, part.start + part.length
    for start, length in ranges:
        first, last = max(part.start, at), min(end, at + length)
        if first < last:
            taken.append(Range(start + first - at, last - first))
        at += length
    return joined(taken)


# ---- the numbers themselves


def indexed_dims(call: Any) -> Any:
    """{path of an integer in (args, kwargs): the dim of the first argument that it
    indexes} of a call in INDEXING."""
    args, kwargs = call.args
    if not args or not hasattr(args[0], "shape"):
        return {}
    ndim = len(args[0].shape)
    if call.name not in DIM_ARGUMENT:
        return _dims_of_items(args[1], ndim)
    position = DIM_ARGUMENT[call.name]
    place = (0, position) if position < len(args) else (1, "dim")
    dim = args[position] if position < len(args) else kwargs.get("dim", 0)
    return {
        path: dim % ndim
        for path, x in leaves(call.args)
        if _is_int(x) and path != place
    }


def _dims_of_items(index: Any, ndim: Any) -> Any:
    """As `indexed_dims`, of the second argument of `x[index]`."""
    several = isinstance(index, tuple)
    items = index if several else (index,)
    dim, dims = 0, {}
    for place, item in enumerate(items):
        if item is Ellipsis:
            dim += ndim - sum(map(_consumed, items))
            continue
        at = (0, 1, place) if several else (0, 1)
        dims.update({(*at, *path): dim for path, x in leaves(item) if _is_int(x)})
        dim += _consumed(item)
    return dims


def _consumed(item: Any) -> Any:
    """How many dims an item of an index takes."""
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    masks = str(getattr(item, "dtype", "")) in ("torch.bool", "torch.uint8")
    return len(item.shape) if masks else 1


def _is_int(x: Any) -> Any:
    return isinstance(x, int) and not isinstance(x, bool)


def bounds(call: Any, given: Any, axis: Any, axes: Any, group: SimulatedGroup) -> Any:
    """{path: Bound} of the numbers with which a call indexes a sharded dim, dealt out
    where they can be. `given`: its (args, kwargs) on shards."""
    at = None if axis is None else axis.find(axes, call.args[0][0])
    if not at:
        return {}
    size, dims = call.args[0][0].shape[at.dim], indexed_dims(call)
    numbers = {
        path: x for path, x in leaves(given) if dims.get(path) == at.dim and _is_int(x)
    }
    return {path: _bound(x, size, axis.units, group) for path, x in numbers.items()}


def _bound(x: int, size: int, units: Units, group: SimulatedGroup) -> Bound:
    """A number that indexes a dim of `size`; one beyond its ends is beyond the
    shard's."""
    dealt_out = abs(x) < size and part_of(abs(x), units, group) is not None
    return Bound(x, units if dealt_out else None)


def _from_end(x: Any, size: int) -> Any:
    return x + size if x < 0 else x
