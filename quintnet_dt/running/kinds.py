"""What a call was shown right for, beside the shapes of its tensors: which arguments
are there, and what they choose.

An attribute that is set later (class weights, a dim, dropout) changes a call that is
made under the same name.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FunctionType, NoneType
from typing import Any, NamedTuple

import torch

from ..keys import ArgPath
from ..utils import lookup

TENSOR, INTEGER, NUMBER = "tensor", "integer", "number"


class Dim(NamedTuple):
    """An argument that names a dim."""

    number: int


class Pinned(NamedTuple):
    """A number that names a dim, and where it lies in (args, kwargs)."""

    path: ArgPath
    number: int


class Parameter(NamedTuple):
    """A parameter of a function that is written in Python: what it was given, or left
    to be."""

    name: str
    kind: Any
    default: Any


@dataclass(frozen=True)
class CallKind:
    """`arguments`: the kinds of (args, kwargs), as `kinds` gives them. `dims`: the
    numbers among them that name dims. `named`: of a function that is written in Python,
    its parameters: so torch.compile sees such a call, as the user wrote it; a
    torch-function mode sees it as the function passes it on."""

    arguments: tuple
    dims: tuple[Pinned, ...]
    named: tuple[Parameter, ...] = ()

    def fits(self, args: tuple, kwargs: dict, compiled: bool = False) -> bool:
        """Whether a call with these arguments is one of this kind."""
        if compiled and self.named:
            return self._fits_by_name(args, kwargs)
        # what types alone tell is quicker
        told = None if compiled or kwargs else tuple(map(_plain, map(type, args)))
        if told != self.arguments and kinds(args, kwargs) != self.arguments:
            return False
        for path, number in self.dims:
            if lookup((args, kwargs), path) != number:
                return False
        return True

    def _fits_by_name(self, args: tuple, kwargs: dict) -> bool:
        for place, (name, expected, default) in enumerate(self.named):
            found = args[place] if place < len(args) else kwargs.get(name, default)
            if type(expected) is Dim:
                if found != expected.number:
                    return False
            elif kind(found) != expected:
                return False
        return True


def call_kind(
    func: Callable, args: tuple, kwargs: dict, dims: Iterable[ArgPath]
) -> CallKind:
    """The CallKind of a call, with the paths in (args, kwargs) of the numbers that name
    dims."""
    pinned = tuple(Pinned(path, lookup((args, kwargs), path)) for path in dims)
    return CallKind(kinds(args, kwargs), pinned, _named(func, args, kwargs, pinned))


def _named(
    func: Callable, args: tuple, kwargs: dict, pinned: tuple[Pinned, ...]
) -> tuple[Parameter, ...]:
    """The parameters of a function that is written in Python, where each may be given
    by name."""
    if not isinstance(func, FunctionType):
        return ()
    takes = inspect.signature(func, follow_wrapped=False).parameters
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in takes.values()):
        return ()
    given = {**dict(zip(takes, args)), **kwargs}
    names: dict[int | str, str] = {
        **dict(enumerate(takes)),
        **{name: name for name in takes},
    }
    # An argument that is a dim itself, and not a list of them.
    dims = {names[path[1]]: Dim(number) for path, number in pinned if len(path) == 2}
    found = []
    for name, p in takes.items():
        what = dims[name] if name in dims else kind(given.get(name, p.default))
        found.append(Parameter(name, what, p.default))
    return tuple(found)


class _Plain(dict):
    """The kinds that types alone tell."""

    def __missing__(self, other: type) -> type:
        return other


_plain = _Plain(
    {
        torch.Tensor: TENSOR,
        torch.nn.Parameter: TENSOR,
        int: INTEGER,
        NoneType: None,
    }
).__getitem__


def kinds(args: tuple, kwargs: dict) -> tuple:
    """Of positional arguments in order, and of keyword ones by name."""
    found = [kind(x) for x in args]
    if kwargs:
        found += [(name, kind(kwargs[name])) for name in sorted(kwargs)]
    return tuple(found)


def kind(x: Any) -> Any:
    """What an argument is: of a tensor that it is one, of a number whether it is zero,
    of other constants their value."""
    return _KINDS.get(type(x), _other)(x)


def _number(x: float) -> str | float:
    return NUMBER if x else 0.0


def _itself(x: Any) -> Any:
    return x


def _several(x: Iterable) -> tuple:
    return tuple([kind(y) for y in x])


def _slice(x: slice) -> tuple:
    return "slice", kind(x.start), kind(x.stop), kind(x.step)


def _other(x: Any) -> Any:
    if isinstance(x, torch.Tensor) or hasattr(x, "producer"):  # a Value of a graph
        return TENSOR
    if isinstance(x, (tuple, list)):
        return _several(x)
    if isinstance(x, (int, torch.SymInt)):
        return INTEGER
    return type(x).__name__


def _tensor(x: torch.Tensor) -> str:
    return TENSOR


def _integer(x: int | torch.SymInt) -> str:
    return INTEGER


_KINDS = {
    torch.Tensor: _tensor,
    torch.nn.Parameter: _tensor,
    int: _integer,
    float: _number,
    bool: _itself,
    str: _itself,
    NoneType: _itself,
    tuple: _several,
    list: _several,
    slice: _slice,
}
