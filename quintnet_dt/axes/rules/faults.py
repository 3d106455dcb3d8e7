"""What is wrong with a user's line of notation for an operator, before any shape is
known."""

from collections.abc import Iterator
from typing import Any

from .notation import OWN, REST, Line, names_in

_NUMBERS = "int", "List[int]"


def faults(line: Line, schema: Any) -> Iterator[str]:
    """What was expected and what was found, in the order in which a reader would see
    it."""
    yield from _in_patterns(line)
    yield from _in_lengths(line, schema)
    yield from _in_tensors(line, schema)


def _in_patterns(line: Line) -> Iterator[str]:
    before, after = names_in(line.inputs), names_in(line.outputs)
    if (REST, "") in before and (REST, "") not in after:
        yield "expected '...' after '->' too"
    named = {name.text for name in before}
    new = [
        name
        for name in after
        if name.mark or name.text not in named and name.text[0] != OWN
    ]
    if new:
        found = "".join(new[0])
        yield (
            "expected letters of the inputs, unmarked, or '_' after '->', found"
            f" {found!r}"
        )


def _in_lengths(line: Line, schema: Any) -> Iterator[str]:
    numbers = [a.name for a in schema.arguments if str(a.type) in _NUMBERS]
    for name, length in line.lengths.items():
        if isinstance(length, str) and length not in numbers:
            one_of = f" ({', '.join(numbers)})" if numbers else ""
            yield (
                f"expected a number or an argument that is one{one_of} after '=', found"
                f" {length!r}"
            )
    told = set(line.lengths)
    for pattern in line.inputs + line.outputs:
        for dim in pattern.dims:
            new = {name.text for name in dim} - told
            if len(new) > 1:
                names = " ".join(name.text for name in dim)
                yield (
                    f"expected at most one length in ({names}) that nothing before it"
                    f" tells: add '; {min(new)}=' and an argument of the operator, or a"
                    " number"
                )
            told |= new


def _in_tensors(line: Line, schema: Any) -> Iterator[str]:
    tensors = [a for a in schema.arguments if "Tensor" in str(a.type)]
    single = [a.name for a in tensors if "List" not in str(a.type)]
    results = [r for r in schema.returns if str(r.type) == "Tensor"]
    takes_lists = len(single) < len(tensors)
    returns_others = len(results) < len(schema.returns)
    if takes_lists or returns_others or schema.is_mutable:
        yield (
            "expected an operator that takes and returns single tensors, and writes to"
            " none; give a function"
        )
    elif (len(line.inputs), len(line.outputs)) != (len(single), len(results)):
        yield (
            f"expected a pattern for each of its {len(single)} tensor arguments"
            f" ({', '.join(single)}) and {len(results)} results, found"
            f" {len(line.inputs)} and {len(line.outputs)}"
        )
