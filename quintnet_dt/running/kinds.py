"""What a call was shown right for, beside the shapes of its tensors: which arguments are there, and
what they choose.

An attribute that is set later (class weights, a dim, dropout) changes a call that is made under the
same name.
"""

import inspect
from dataclasses import dataclass, replace
from types import FunctionType, NoneType
from typing import NamedTuple

import torch

TENSOR, INTEGER, NUMBER = "tensor", "integer", "number"


@dataclass(frozen=True)
class CallKind:
    """`arguments`: the kinds of (args, kwargs), as `kinds` gives them. `dims`: ((argument,
    ...path), a number that names a dim). `named`: of a function that is written in Python, the kind
    of each of its parameters by name, those left out too: torch.compile sees such a call as the
    user wrote it, a torch-function mode as the function passes it on."""

    arguments: tuple
    dims: tuple
    named: tuple = ()
    defaults: tuple = ()

    def fits(self, args, kwargs, compiled=False):
        """Whether a call with these arguments is one of this kind."""
        if compiled and self.named:
            return self._fits_by_name(args, kwargs)
        if kinds(args, kwargs) != self.arguments:
            return False
        for where, what in self.dims:
            if _at(args, kwargs, where) != what:
                return False
        return True

    def _fits_by_name(self, args, kwargs):
        for place, (name, expected) in enumerate(self.named):
            if place < len(args):
                found = args[place]
            elif name in kwargs:
                found = kwargs[name]
            else:
                found = self.defaults[place]
            if type(expected) is Dim:
                if found != expected.number:
                    return False
            elif kind(found) != expected:
                return False
        return True


class Dim(NamedTuple):
    """An argument that names a dim."""

    number: int


def call_kind(func, args, kwargs, dims):
    """The CallKind of a call, with the paths in (args, kwargs) of the numbers that name dims."""
    pinned = tuple((path, _at(args, kwargs, path)) for path in dims)
    found = CallKind(kinds(args, kwargs), pinned)
    if not isinstance(func, FunctionType):
        return found
    takes = inspect.signature(func, follow_wrapped=False).parameters
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in takes.values()):
        return found
    values = {name: p.default for name, p in takes.items()} | dict(zip(takes, args)) | kwargs
    names = list(takes)
    at_dims = {
        path[0] if isinstance(path[0], str) else names[path[0]]: x
        for path, x in pinned
        if len(path) == 1
    }
    named = tuple(
        (n, Dim(at_dims[n]) if n in at_dims else kind(values[n])) for n in takes if n in values
    )
    return replace(found, named=named, defaults=tuple(p.default for p in takes.values()))


def kinds(args, kwargs):
    """Of positional arguments in order, and of keyword ones by name."""
    found = [kind(x) for x in args]
    if kwargs:
        found += [(name, kind(kwargs[name])) for name in sorted(kwargs)]
    return tuple(found)


def kind(x):
    """What an argument is: of a tensor that it is one, of a number whether it is zero, of other
    constants their value."""
    return _KINDS.get(type(x), _other)(x)


def _number(x):
    return NUMBER if x else 0.0


def _itself(x):
    return x


def _several(x):
    return tuple([kind(y) for y in x])


def _slice(x):
    return "slice", kind(x.start), kind(x.stop), kind(x.step)


def _other(x):
    if isinstance(x, torch.Tensor) or hasattr(x, "producer"):  # a Value of a graph
        return TENSOR
    if isinstance(x, (tuple, list)):
        return _several(x)
    if isinstance(x, (int, torch.SymInt)):
        return INTEGER
    return type(x).__name__


def _tensor(x):
    return TENSOR


def _integer(x):
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


def _at(args, kwargs, where):
    first, *rest = where
    x = args[first] if type(first) is int else kwargs[first]
    for key in rest:
        x = x[key]
    return x
