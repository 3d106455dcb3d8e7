"""Files of safetensors: headers, indices, and where in a file the bytes of a block of a tensor are.

The format (https://github.com/huggingface/safetensors#format): the length of the header in 8 bytes,
the header as JSON, {name: {dtype, shape, data_offsets}}, the bytes.
"""

import json
import os
import struct
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path

import torch

SINGLE, INDEX = (
    "model.safetensors",
    "model.safetensors.index.json",
)  # the names that transformers looks for
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: it begins at byte `start`."""

    path: Path
    dtype: torch.dtype
    shape: tuple
    start: int


def entries_of(source):
    """name -> Entry of a file, an index, or a folder."""
    if source.is_dir():
        files = [source / n for n in (SINGLE, INDEX) if (source / n).is_file()]
        files = (
            files
            or list(source.glob("*.safetensors.index.json"))
            or list(source.glob("*.safetensors"))
        )
        if not files or len(files) > 1 and files[0].name != SINGLE:
            what = f"{SINGLE}, {INDEX}, or one other .safetensors file or index in {source}"
            raise FileNotFoundError(
                f"expected {what}, found {sorted(f.name for f in files) or 'none'}"
            )
        source = files[0]
    if not source.is_file():
        raise FileNotFoundError(
            f"expected a safetensors file, an index of such, or a folder with one: no {source}"
        )
    if source.suffix != ".json":
        return header_of(source)
    try:
        index = dict(json.loads(source.read_text())["weight_map"])
        files = {name: header_of(source.parent / name) for name in sorted(set(index.values()))}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(
            f"{source}: expected an index of safetensors files, found something else: {e!r}"
        ) from e
    absent = [n for n, file in index.items() if n not in files[file]]
    if absent:
        raise ValueError(
            f"{source}: expected what it lists in its files, found none of {', '.join(absent)}"
        )
    return {n: files[file][n] for n, file in index.items()}


def header_of(path):
    """name -> Entry of one file. Raises ValueError, as safetensors itself does, unless the header's
    tensors fill the rest of the file exactly."""
    try:
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            (length,) = struct.unpack("<Q", f.read(8))
            if length > size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(f.read(length).decode(), object_pairs_hook=_without_doubles)
        _check_metadata(header.pop("__metadata__", {}))
        spans = {name: _span(name, e, size - 8 - length) for name, e in header.items()}
        _check_filled(spans, size - 8 - length)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as e:
        raise ValueError(
            f"{path}: expected a whole safetensors file, found another, or a part of one: {e!r}"
        ) from e
    return {
        name: Entry(path, dtype, shape, 8 + length + start)
        for name, (start, _, dtype, shape) in spans.items()
    }


def _without_doubles(pairs):
    """A dict of JSON's, in which each name is there once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} is there twice")
    return found


def _check_metadata(metadata):
    if not isinstance(metadata, dict) or not all(
        isinstance(text, str) for text in metadata.values()
    ):
        raise ValueError(f"a __metadata__ that is no map of texts: {metadata!r}")


def _span(name, entry, room):
    """(start, end, dtype, shape) of a tensor, in the bytes after the header."""
    (start, end), shape, dtype = (
        entry["data_offsets"],
        tuple(entry["shape"]),
        DTYPES.get(entry["dtype"]),
    )
    whole = all(type(n) is int and n >= 0 for n in (start, end, *shape))
    if (
        dtype is None
        or not whole
        or not start <= end <= room
        or end - start != prod(shape) * dtype.itemsize
    ):
        raise ValueError(f"{name} of {entry} in a file of {room} bytes after its header")
    return start, end, dtype, shape


def _check_filled(spans, room):
    """Tensors lie one behind the other, to the end."""
    filled, last = 0, "the header"
    for name, (start, end, *_) in sorted(spans.items(), key=lambda span: span[1][:2]):
        if start != filled:
            what = (
                "overlaps with"
                if start < filled
                else f"begins {start - filled} bytes after the end of"
            )
            raise ValueError(f"{name} {what} {last}")
        filled, last = end, name
    if filled != room:
        raise ValueError(f"{room - filled} bytes after the end of {last}, the last tensor")


def start_file(path, held):
    """Make a file of its full size, with its header."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    # The widest dtypes first: else some tensors begin at odd bytes, which readers refuse.
    for name, t in sorted(held.items(), key=lambda x: -x[1].dtype.itemsize):
        start, end = end, end + t.nbytes
        header[name] = {
            "dtype": NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + end)


def pieces(offsets, block, most):
    """Yield (offsets, view) of blocks of at most so many elements, which are a block together."""
    dim = next((d for d, n in enumerate(block.shape) if n > 1), None)
    if block.numel() <= most or dim is None:
        yield offsets, block
        return
    rows = max(1, most * block.shape[dim] // block.numel())
    for i, part in enumerate(block.split(rows, dim)):
        yield from pieces(
            (*offsets[:dim], offsets[dim] + i * rows, *offsets[dim + 1 :]), part, most
        )


def runs(shape, offsets, block):
    """(where each contiguous run of a block begins in a tensor, in the block's order; their
    length), in elements."""
    last = max((d for d, n in enumerate(shape) if block[d] != n), default=0)
    strides = [prod(shape[d + 1 :]) for d in range(len(shape))]
    outer = [range(o * s, (o + n) * s, s) for o, s, n in zip(offsets, strides, block[:last])]
    base = sum(o * s for o, s in zip(offsets[last:], strides[last:]))
    return (base + sum(at) for at in product(*outer)), prod(block[last:])


def move(call, fd, view, at):
    """Read or write all bytes of a view, at a place of a file."""
    while view:
        done = call(fd, [view], at)
        if not done:
            raise OSError("the file ends early: it was changed while it was read")
        view, at = view[done:], at + done
