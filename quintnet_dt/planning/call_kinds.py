"""What a call of the graph is, for the guard that compares it with the call of a later
forward."""

from typing import Any

from ..keys import ArgPath
from ..running.kinds import CallKind, call_kind
from ..tracing.graph import Call, Node
from ..utils import leaves

# Calls all of whose integers name dims, though their operators know none.
NAME_DIMS = set("flatten movedim moveaxis swapaxes swapdims squeeze unsqueeze".split())
DIM_NAMES = {"dim", "dims", "dim0", "dim1"}


def kind_of(call: Call) -> CallKind:
    """The CallKind of a call of the graph."""
    args, kwargs = call.args
    indexes = call.name in ("__getitem__", "__setitem__")  # their numbers are places
    named = set() if indexes else {d for node in call.nodes for d in _named_dims(node)}
    dims = []
    for path, x in leaves((args, kwargs)):
        if (
            not isinstance(x, int)
            or isinstance(x, bool)
            or _in_slice((args, kwargs), path)
        ):
            continue
        if x in named or call.name in NAME_DIMS:
            dims.append(path)
    return call_kind(call.func, args, kwargs, dims)


def _named_dims(node: Node) -> set[int]:
    """The dims that an operator's arguments name, counted from either end."""
    names = [argument.name for argument in node.op._schema.arguments]
    given = dict(zip(names, node.args)) | node.kwargs
    ndim = max((len(v.shape) for v in (*node.inputs, *node.outputs)), default=0)
    named = [leaves(x) for name, x in given.items() if name in DIM_NAMES]
    dims = [d for found in named for _, d in found if isinstance(d, int)]
    return {d + offset for d in dims for offset in (-ndim, 0, ndim)}


def _in_slice(obj: Any, path: ArgPath) -> bool:
    """Whether a path leads through a slice, whose numbers are no dims."""
    for key in path:
        if isinstance(obj, slice):
            return True
        obj = obj[key]
    return False
