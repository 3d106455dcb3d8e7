"""Data written so that every rank writes the same: no order of a set or a dict, no
address, no hash."""

import dataclasses
import enum

import torch

_PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    range,
    torch.dtype,
    torch.device,
)


def canonical(x):
    """A text of nested data that is the same in every process for the same data,
    however its dicts and sets are ordered; of an object that is no data, its class
    alone."""
    if isinstance(x, enum.Enum):
        return f"{_name(type(x))}.{x.name}"
    if isinstance(x, _PLAIN):
        return repr(x)
    if isinstance(x, torch.Tensor):
        return f"tensor({tuple(x.shape)}, {x.dtype})"
    if isinstance(x, (tuple, list)):
        return f"[{', '.join(map(canonical, x))}]"
    if isinstance(x, (set, frozenset)):
        return f"{{{', '.join(sorted(map(canonical, x)))}}}"
    if isinstance(x, dict):
        items = sorted(
            f"{canonical(key)}: {canonical(value)}" for key, value in x.items()
        )
        return f"{{{', '.join(items)}}}"
    if isinstance(x, slice):
        return f"slice{canonical((x.start, x.stop, x.step))}"
    if isinstance(x, type):
        return _name(x)
    if dataclasses.is_dataclass(x):
        fields = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
        return f"{_name(type(x))}{canonical(fields)}"
    return f"a {_name(type(x))}"


def _name(kind):
    return f"{kind.__module__}.{kind.__qualname__}"
