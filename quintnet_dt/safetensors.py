"""Weights in safetensors files, the form in which models are shared: each rank reads and writes its own shards' bytes only.

The format (https://github.com/huggingface/safetensors#format): the length of the header in 8 bytes, the header as JSON, {name: {dtype, shape, data_offsets}}, the bytes.
"""

import contextlib
import json
import os
import re
import struct
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from .chunks import chunks
from .meta import Places, materialize
from .together import together

_BUFFER = 1 << 20  # bytes of a tensor that are in memory beside it
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"  # the names that transformers looks for
_DTYPES = {
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
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def load_safetensors(source, model, *, strict=True, device=None, init=None, progress=True):
    """Fill a model, whole or sharded, live or on the meta device, from safetensors files; each rank reads the bytes of its own shards.

    Beside the shards a rank needs 1 MB. Values are cast to the model's dtype, as by `load_state_dict`. Of tied weights the file may hold any one (of several, the last
    is read). Names are those of the model's state_dict; no prefix is guessed. Call it on every rank of the world.

    Args:
        source: a .safetensors file, an index (.safetensors.index.json), or a folder with one of them.
        model: an nn.Module. What is on the meta device is given memory: for its shards only.
        strict: whether the file must have exactly the model's names.
        device: of tensors that were on meta; that of the mesh, or the CPU, by default.
        init: for what is on meta and not in the file (non-persistent buffers; with strict=False, missing weights): see `materialize`.
        progress: a bar on rank 0, if tqdm is installed.

    Returns: (missing, unexpected), lists of names as load_state_dict has them.
    Raises: on every rank, before anything is written to the model: FileNotFoundError; ValueError for files that are not safetensors, or that lists every
    name that is missing or unexpected and every shape that differs. OSError where reading fails later.
    """
    with together():
        entries, wanted, missing = _entries(Path(source)), [], []
        names = _named_tensors(model)
        places = Places(model)
        wrong = []
        for t, tied in names:
            found = [n for n in tied if n in entries]
            if not found:
                missing.append(" = ".join(tied))
            elif tuple(t.shape) != entries[found[-1]].shape:
                wrong.append(f"{found[-1]}: expected shape {tuple(t.shape)}, found {entries[found[-1]].shape}")
            else:
                chunks(t)  # raises for a layout that it does not know
                wanted.append((t, entries[found[-1]]))
        unexpected = sorted(entries.keys() - {n for _, tied in names for n in tied})
        if strict:
            wrong = (
                [f"{n}: missing from the file" for n in missing]
                + [f"{n}: not in the model" for n in unexpected]
                + wrong
            )
        if wrong:
            raise ValueError(
                "\n  ".join([f"{source} does not fit the model, {len(wrong)} of its tensors differ:", *wrong])
            )
    with together():
        device = device or places.device()
        for i, (t, entry) in enumerate(wanted):
            if t.is_meta:
                wanted[i] = places.fill(t, torch.empty_like(t.detach(), device=device)), entry
        _copy(wanted, False, progress)
    materialize(model, init, device=device)
    return missing, unexpected


def export_safetensors(folder, model, *, max_shard_size="5GB", progress=True):
    """Write a model, whole or sharded, as safetensors files that `load_state_dict` of the whole model and transformers' `from_pretrained` read.

    No rank gathers anything: each writes its own shards' bytes, so the folder must be on a file system that all ranks share. Makes `model.safetensors`, or beyond
    `max_shard_size` (bytes, or a text such as "500MB", "2GiB") `model-00001-of-0000N.safetensors` and an index. Tied weights are written once, under their
    first name. A model with a `config` that has `save_pretrained` gets its config.json too. Files have their final names when all is written: an
    export that fails leaves the folder as it was. One of an earlier export there is replaced. Call it on every rank of the world.

    Raises: on every rank, ValueError for tensors without values (on meta) or without a safetensors dtype, or for a wrong max_shard_size; OSError where the folder cannot be written or the
    disk is full.
    """
    folder, first = Path(folder), not dist.is_initialized() or dist.get_rank() == 0
    files = {}
    try:
        with together():
            state = {tied[0]: t for t, tied in _named_tensors(model)}
            bad = [n for n, t in state.items() if t.is_meta or t.dtype not in _NAMES]
            if bad:
                raise ValueError(
                    f"expected tensors with values, of a dtype of safetensors, found others: {', '.join(bad)}"
                )
            files = _split(state, _bytes(max_shard_size))
            if first:
                folder.mkdir(parents=True, exist_ok=True)
                for name, held in files.items():
                    _start(_partial(folder / name), held)
        with together():
            entries = {}
            for name in files:  # as rank 0 wrote them, if the file system is shared
                entries.update(_header(_partial(folder / name)))
            _copy([(t, entries[n]) for n, t in state.items()], True, progress)
        with together():
            if first:
                _finish(folder, files, getattr(model, "config", None))
    except BaseException:
        for name in (*files, _INDEX) if first else ():
            with contextlib.suppress(OSError):
                _partial(folder / name).unlink()
        raise


def _partial(path):
    return path.with_name(f"{path.name}.partial")


def _named_tensors(model):
    """[(tensor, the names that it has in the model's state_dict), ...]."""
    found = {}
    for name, t in model.state_dict(keep_vars=True).items():
        if not isinstance(t, torch.Tensor):
            raise ValueError(f"{name}: expected a tensor in the model's state_dict, found {type(t).__name__}")
        found.setdefault(id(t), (t, []))[1].append(name)
    return list(found.values())


# ---- files


@dataclass(frozen=True)
class _Entry:
    """A tensor in a file: it begins at byte `start`."""

    path: Path
    dtype: torch.dtype
    shape: tuple
    start: int


def _entries(source):
    """name -> _Entry of a file, an index, or a folder."""
    if source.is_dir():
        files = [source / n for n in (_SINGLE, _INDEX) if (source / n).is_file()]
        files = files or list(source.glob("*.safetensors.index.json")) or list(source.glob("*.safetensors"))
        if not files or len(files) > 1 and files[0].name != _SINGLE:
            what = f"{_SINGLE}, {_INDEX}, or one other .safetensors file or index in {source}"
            raise FileNotFoundError(f"expected {what}, found {sorted(f.name for f in files) or 'none'}")
        source = files[0]
    if not source.is_file():
        raise FileNotFoundError(
            f"expected a safetensors file, an index of such, or a folder with one: found no {source}"
        )
    if source.suffix != ".json":
        return _header(source)
    try:
        index = dict(json.loads(source.read_text())["weight_map"])
        files = {name: _header(source.parent / name) for name in sorted(set(index.values()))}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{source}: expected an index of safetensors files, found something else: {e!r}") from e
    absent = [n for n, file in index.items() if n not in files[file]]
    if absent:
        raise ValueError(f"{source}: expected what it lists in its files, found none of {', '.join(absent)}")
    return {n: files[file][n] for n, file in index.items()}


def _header(path):
    """name -> _Entry of one file."""
    try:
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            (length,) = struct.unpack("<Q", f.read(8))
            if length > size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header, entries = json.loads(f.read(length)), {}
        header.pop("__metadata__", None)
        for name, e in header.items():
            (start, end), shape, dtype = e["data_offsets"], tuple(e["shape"]), _DTYPES.get(e["dtype"])
            if (
                dtype is None
                or not 0 <= start <= end <= size - 8 - length
                or end - start != prod(shape) * dtype.itemsize
            ):
                raise ValueError(f"{name} of {e} in a file of {size} bytes")
            entries[name] = _Entry(path, dtype, shape, 8 + length + start)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as e:
        raise ValueError(
            f"{path}: expected a whole safetensors file, found something else, or a part of one: {e!r}"
        ) from e
    return entries


def _bytes(size):
    """5000000000 of "5GB"."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)(I?)B", size.upper()) if isinstance(size, str) else None
    if match is None and (type(size) is not int or size < 1):
        raise ValueError(f'max_shard_size: expected bytes, as an int or a text such as "5GB", found {size!r}')
    return int(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " ") if match else size


def _split(state, limit):
    """file name -> {name: tensor}, in order, each of at most `limit` bytes, or of one tensor."""
    parts, room = [{}], limit
    for name, t in state.items():
        room -= t.numel() * t.dtype.itemsize
        if room < 0 and parts[-1]:
            parts.append({})
            room = limit - t.numel() * t.dtype.itemsize
        parts[-1][name] = t
    n = len(parts)
    return {_SINGLE if n == 1 else f"model-{i:05}-of-{n:05}.safetensors": part for i, part in enumerate(parts, 1)}


def _start(path, held):
    """Make a file of its full size, with its header."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, t in sorted(
        held.items(), key=lambda x: -x[1].dtype.itemsize
    ):  # else some begin at odd bytes, which readers refuse
        start, end = end, end + t.numel() * t.dtype.itemsize
        header[name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + end)


def _finish(folder, files, config):
    """Give the files their names, the index last; those of an earlier export go, which would be read instead or mixed with these."""
    if hasattr(config, "save_pretrained"):
        config.save_pretrained(folder)
    new = [*files, _INDEX] if len(files) > 1 else [*files]
    if len(files) > 1:
        size = sum(t.numel() * t.dtype.itemsize for held in files.values() for t in held.values())
        where = {name: file for file, held in files.items() for name in held}
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=2)
        _partial(folder / _INDEX).write_text(text + "\n")
    for old in [*folder.glob(_INDEX), *folder.glob(_SINGLE), *folder.glob("model-?????-of-?????.safetensors")]:
        if old.name not in new or old.name == _INDEX:
            old.unlink()
    for name in new:
        _partial(folder / name).replace(folder / name)


# ---- bytes


def _copy(pairs, write, progress):
    """Read this rank's blocks of (tensor, _Entry) pairs from their files, or write them there."""
    blocks = [(c, entry) for t, entry in pairs if not write or _writes(t) for c in chunks(t) if c.tensor.numel()]
    total, buffer, fds = sum(c.tensor.numel() * e.dtype.itemsize for c, e in blocks), bytearray(_BUFFER), {}
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(_bar(total, "writing" if write else "reading", progress))
        for chunk, entry in blocks:
            if entry.path not in fds:
                fds[entry.path] = os.open(entry.path, os.O_WRONLY if write else os.O_RDONLY)
                stack.callback(os.close, fds[entry.path])
            size = entry.dtype.itemsize
            for offsets, part in _pieces(chunk.offsets, chunk.tensor, _BUFFER // size):
                beside = torch.frombuffer(buffer, dtype=entry.dtype, count=part.numel()).view(part.shape)
                if write:
                    beside.copy_(part)
                starts, length = _runs(entry.shape, offsets, part.shape)
                view = memoryview(buffer)
                for start in starts:
                    _move(
                        os.pwritev if write else os.preadv,
                        fds[entry.path],
                        view[: length * size],
                        entry.start + start * size,
                    )
                    view = view[length * size :]
                if not write:
                    part.copy_(beside)
                bar.update(part.numel() * size)
        for fd in fds.values() if write else ():
            os.fsync(fd)  # tells what the disk had no room for


def _writes(t):
    """Whether this rank is the one that writes its blocks of a tensor, of those that hold the same."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if not isinstance(t, DTensor):
        return rank == 0
    mesh = t.device_mesh
    if not (mesh.mesh == 0).any():
        if rank == 0:
            raise ValueError(
                f"expected a model of which rank 0 holds a part, found a tensor on the ranks {mesh.mesh.tolist()}"
            )
        return False  # ranks in rank 0's mesh hold the same
    at = mesh.get_coordinate()
    return at is not None and not any(i for i, p in zip(at, t.placements) if p.is_replicate())


def _pieces(offsets, block, most):
    """Yield (offsets, view) of blocks of at most so many elements, which are a block together."""
    dim = next((d for d, n in enumerate(block.shape) if n > 1), None)
    if block.numel() <= most or dim is None:
        yield offsets, block
        return
    rows = max(1, most * block.shape[dim] // block.numel())
    for i, part in enumerate(block.split(rows, dim)):
        yield from _pieces((*offsets[:dim], offsets[dim] + i * rows, *offsets[dim + 1 :]), part, most)


def _runs(shape, offsets, block):
    """(where each contiguous run of a block begins in a tensor, in the block's order; their length), in elements."""
    last = max((d for d, n in enumerate(shape) if block[d] != n), default=0)
    strides = [prod(shape[d + 1 :]) for d in range(len(shape))]
    outer = [range(o * s, (o + n) * s, s) for o, s, n in zip(offsets, strides, block[:last])]
    base = sum(o * s for o, s in zip(offsets[last:], strides[last:]))
    return (base + sum(at) for at in product(*outer)), prod(block[last:])


def _move(call, fd, view, at):
    """Read or write all bytes of a view, at a place of a file."""
    while view:
        done = call(fd, [view], at)
        if not done:
            raise OSError("the file ends early: it was changed while it was read")
        view, at = view[done:], at + done


def _bar(total, what, progress):
    """tqdm's bar on rank 0; where it is not installed, none."""
    with contextlib.suppress(ImportError):
        from tqdm import tqdm

        return tqdm(
            total=total,
            desc=what,
            unit="B",
            unit_scale=True,
            disable=not progress or dist.is_initialized() and dist.get_rank() > 0,
        )
    return _NoBar()


class _NoBar(contextlib.nullcontext):
    def __enter__(self):
        return self

    def update(self, n):
        pass
