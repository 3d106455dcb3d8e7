"""Files of safetensors: what is in those of a source, how one is laid out, and which
blocks of tensors are read and written at a time.

The format (https://github.com/huggingface/safetensors#format): the length of the header
in 8 bytes, the header as JSON, {name: {dtype, shape, data_offsets}}, the bytes.
"""

import contextlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .chunks import Chunk, chunks

# The names that transformers looks for.
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
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
_BUFFER = 1 << 20  # bytes of a tensor that are read or written at a time


# ---- what is in files


@dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    path: Path
    name: str
    shape: tuple[int, ...]


def open_file(path: Path) -> Any:
    """The safetensors package's view of a file, to be used in a `with`. It maps the
    file to memory: what was read of it counts as this process's memory until it is
    closed."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as e:
        raise ImportError(
            "load_safetensors needs the safetensors package: pip install safetensors"
        ) from e
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as e:
        raise ValueError(
            f"{path}: expected a whole safetensors file, found another, or a part of"
            f" one: {e}"
        ) from e


def entries_of(source: Path) -> dict[str, Entry]:
    """name -> Entry of a file, an index, or a folder."""
    path = _the_one_in(source) if source.is_dir() else source
    if not path.is_file():
        raise FileNotFoundError(
            "expected a safetensors file, an index of such, or a folder with one: no"
            f" {path}"
        )
    return _entries_of_index(path) if path.suffix == ".json" else _entries_of_file(path)


def _the_one_in(folder: Path) -> Path:
    """The file or index in a folder that is meant: those that transformers looks for
    come first."""
    for pattern in (SINGLE, INDEX, "*.safetensors.index.json", "*.safetensors"):
        found = list(folder.glob(pattern))
        if found:
            break
    if len(found) != 1:
        raise FileNotFoundError(
            f"expected {SINGLE}, {INDEX}, or one other .safetensors file or index in"
            f" {folder}, found {sorted(f.name for f in found) or 'none'}"
        )
    return found[0]


def _entries_of_file(path: Path) -> dict[str, Entry]:
    with open_file(path) as file:
        return {
            n: Entry(path, n, tuple(file.get_slice(n).get_shape())) for n in file.keys()
        }


def _entries_of_index(path: Path) -> dict[str, Entry]:
    try:
        index = dict(json.loads(path.read_text())["weight_map"])
        files = {
            file: _entries_of_file(path.parent / file)
            for file in sorted({*index.values()})
        }
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(
            f"{path}: expected an index of safetensors files, found something else:"
            f" {e!r}"
        ) from e
    absent = [name for name, file in index.items() if name not in files[file]]
    if absent:
        raise ValueError(
            f"{path}: expected what it lists in its files, found none of"
            f" {', '.join(absent)}"
        )
    return {name: files[file][name] for name, file in index.items()}


# ---- how a file is laid out


def layout_of(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int], int]:
    """(the header of the file that has these tensors, the byte at which each begins,
    the size of the file): the same on every rank."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # The widest dtypes first: else some tensors begin at odd bytes, which readers
    # refuse.
    for name, t in sorted(tensors.items(), key=lambda x: -x[1].dtype.itemsize):
        start, end = end, end + t.nbytes
        header[name] = {
            "dtype": NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    starts = {name: first + header[name]["data_offsets"][0] for name in tensors}
    return struct.pack("<Q", len(text)) + text, starts, first + end


# ---- blocks


def read(wanted: Mapping[Tensor, Entry], total: int, bar: Any) -> None:
    """Read this rank's blocks of tensors, `total` bytes in all. What is read of a file
    counts as this rank's memory until the file is closed: it is opened anew after a
    fiftieth of the total."""
    parts = (
        (entry, offsets, part)
        for t, entry in wanted.items()
        for chunk in chunks(t)
        for offsets, part in _pieces(entry.shape, chunk)
    )
    path, most = None, max(1, total // (50 * _BUFFER))
    with contextlib.ExitStack() as opened:
        for i, (entry, offsets, part) in enumerate(parts):
            if entry.path != path or i % most == 0:
                opened.close()
                path, file = entry.path, opened.enter_context(open_file(entry.path))
            at = tuple(slice(o, o + n) for o, n in zip(offsets, part.shape))
            part.copy_(file.get_slice(entry.name)[at])
            bar.update(part.nbytes)


def write(file: BinaryIO, t: Tensor, start: int, bar: Any) -> None:
    """Write this rank's blocks of a tensor that begins at a byte of a file."""
    buffer = memoryview(bytearray(_BUFFER))
    for chunk in chunks(t):
        for offsets, part in _pieces(t.shape, chunk):
            beside = torch.frombuffer(buffer, dtype=t.dtype, count=part.numel())
            beside.view(part.shape).copy_(part)
            begins, length = _runs(t.shape, offsets, part.shape)
            size = length * t.dtype.itemsize
            for i, begin in enumerate(begins):
                file.seek(start + begin * t.dtype.itemsize)
                file.write(buffer[i * size : (i + 1) * size])
            bar.update(part.nbytes)


def _pieces(
    shape: tuple[int, ...], chunk: Chunk
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Yield (offsets, view) of blocks which are a chunk of a tensor together. Of each,
    the first and the last element are at most 1 MB apart: of some columns, all of a row
    is between them."""
    offsets, block = chunk.offsets, chunk.tensor
    dim = next((d for d, n in enumerate(block.shape) if n > 1), len(shape))
    size = block.dtype.itemsize * prod((*block.shape[dim : dim + 1], *shape[dim + 1 :]))
    if size > _BUFFER:
        rows = max(1, _BUFFER * block.shape[dim] // size)
        for i, part in enumerate(block.split(rows, dim)):
            at = (*offsets[:dim], offsets[dim] + i * rows, *offsets[dim + 1 :])
            yield from _pieces(shape, Chunk(at, part))
    elif block.numel():
        yield offsets, block


def _runs(
    shape: tuple[int, ...], offsets: tuple[int, ...], block: tuple[int, ...]
) -> tuple[Iterable[int], int]:
    """(where each contiguous run of a block begins in a tensor, in the block's order;
    their length), in elements."""
    last = max((d for d, n in enumerate(shape) if block[d] != n), default=0)
    strides = [prod(shape[d + 1 :]) for d in range(len(shape))]
    ranges = [
        range(o * s, (o + n) * s, s) for o, s, n in zip(offsets, strides, block[:last])
    ]
    base = sum(o * s for o, s in zip(offsets[last:], strides[last:]))
    return (base + sum(at) for at in product(*ranges)), prod(block[last:])
