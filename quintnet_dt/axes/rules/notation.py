"""The notation of rules that are one line, after einops.

    "i k, k j -> i j"                                                   mm
    "+i j, i k, k j -> i j"                                             addmm
    "b (g i) _...!, (g o) i _...!, +(g o) -> b (g o) _...; g=groups"    convolution

A pattern for each tensor argument, and after `->` one for each result, name their dims.
A name stands for one axis wherever it is written. One that no result has is summed
over: the results of its shards sum to the whole result.

    k         a dim
    (g c)     a dim that is g times c long, g outermost
    ...       any number of further dims, aligned from the right
    _         a dim that is an axis of its own, in this place alone
    _...      any number of such dims
    k!        needed whole: the operator is given no shard of it
    v~        looked up by index: the sum over it is of one row, and of zeros for the
    others +i j      an addend, to be added once when something is summed over

    ; g=groups, p=2   the lengths of names in brackets, arguments of the operator (the
    product of
                      one that is a list) or numbers: of all but one in a bracket that
                      no dim to the left of it tells

A tensor may lack dims on the left of its pattern, and have dims of size 1: it
broadcasts.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

REST, OWN = "...", "_"
WHOLE, LOOKED_UP = "!", "~"
_DIM = re.compile(r"\([^()]+\)|[^\s()]+|[()]")
_NAME = re.compile(r"(\.\.\.|_\.\.\.|_|[^\W_]\w*)([!~]?)")
_NAME_IN_BRACKETS = re.compile(r"(_|[^\W_]\w*)(!?)")
_LENGTH = re.compile(r"\s*(\w+)\s*=\s*(\w+)\s*")


class Name(NamedTuple):
    """A name and the mark after it. Each `_` gets a number, so that no two of them are
    the same."""

    text: str
    mark: str = ""


Dim: TypeAlias = tuple[Name, ...]  # one name, or those in brackets, outermost first


@dataclass(frozen=True)
class Pattern:
    """The dims of one tensor. `is_addend`: "+" is before them."""

    dims: tuple[Dim, ...]
    is_addend: bool
    text: str


class Line(NamedTuple):
    """A rule: a pattern for each tensor argument and each result; by name, lengths that
    are an argument of the operator or a number."""

    inputs: tuple[Pattern, ...]
    outputs: tuple[Pattern, ...]
    lengths: dict[str, str | int]


def names_in(patterns: Iterable[Pattern]) -> list[Name]:
    return [name for pattern in patterns for dim in pattern.dims for name in dim]


def parse(text: str) -> Line:
    """A rule from its line. Raises ValueError, which says what was expected and what
    was found."""
    patterns, _, lengths = text.partition(";")
    sides = patterns.split("->")
    if len(sides) != 2:
        raise ValueError(
            "expected patterns of the inputs, one '->', patterns of the outputs"
        )
    numbers = itertools.count()
    before, after = (
        tuple(_pattern(p, numbers) for p in side.split(",")) for side in sides
    )
    return Line(
        before, after, dict(map(_length, lengths.split(",") if lengths else ()))
    )


def _pattern(text: str, numbers: Iterator[int]) -> Pattern:
    text = text.strip()
    dims = tuple(_dim(token, numbers) for token in _DIM.findall(text.removeprefix("+")))
    if sum(dim[0].text.endswith(REST) for dim in dims) > 1:
        raise ValueError(f"expected at most one '...' a tensor, found {text!r}")
    return Pattern(dims, text.startswith("+"), text)


def _dim(text: str, numbers: Iterator[int]) -> Dim:
    if len(text) > 1 and text.startswith("("):
        return tuple(
            _name(_NAME_IN_BRACKETS, part, numbers) for part in text[1:-1].split()
        )
    return (_name(_NAME, text, numbers),)


def _name(kind: re.Pattern[str], text: str, numbers: Iterator[int]) -> Name:
    match = kind.fullmatch(text)
    if match is None:
        raise ValueError(
            "expected letters, '+' before a first one or '!' after one, names of"
            f" single dims in brackets, '_' or '...', found {text!r}"
        )
    name, mark = match.groups()
    return Name(
        name.replace(OWN, f"{OWN}{next(numbers)}") if name[0] == OWN else name, mark
    )


def _length(text: str) -> tuple[str, str | int]:
    match = _LENGTH.fullmatch(text)
    if match is None:
        raise ValueError(
            f"expected lengths such as 'g=groups' after ';', found {text!r}"
        )
    name, length = match.groups()
    return name, int(length) if length.isdigit() else length
