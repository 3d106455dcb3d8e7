"""What a call was shown right for, beside the shapes of its tensors: which arguments are there, and what they choose.

An attribute that is set later (class weights, a dim, dropout) changes a call that is made under the same name.
"""

from dataclasses import dataclass
from types import NoneType

import torch

TENSOR, INTEGER, NUMBER = "tensor", "integer", "number"


@dataclass(frozen=True)
class CallKind:
    """`arguments`: the kinds of (args, kwargs), as `kinds` gives them; `dims`: {(argument, ...path): a number that
    names a dim}."""

    arguments: tuple
    dims: tuple

    def fits(self, args, kwargs):
        """Whether a call with these arguments is one of this kind."""
        if kinds(args, kwargs) != self.arguments:
            return False
        for where, what in self.dims:
            if _at(args, kwargs, where) != what:
                return False
        return True


def kinds(args, kwargs):
    """Of positional arguments in order, and of keyword ones by name."""
    found = [kind(x) for x in args]
    if kwargs:
        found += [(name, kind(kwargs[name])) for name in sorted(kwargs)]
    return tuple(found)


def kind(x):
    """What an argument is: of a tensor that it is one, of a number whether it is zero, of other constants their
    value."""
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
    if isinstance(x, torch.Tensor):
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
