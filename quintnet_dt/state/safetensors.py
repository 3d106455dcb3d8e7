"""Weights in safetensors files, as models are shared: each rank reads and writes its own shards'
bytes only.

torch.distributed.checkpoint has a reader and a writer of such files: they need the safetensors
package, and their consolidation is silently wrong with several blocks a rank.
"""

import contextlib
import json
import os
import re
import secrets

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ..together import gather, together
from .chunks import chunks
from .files import INDEX, NAMES, SINGLE, entries_of, header_of, move, pieces, runs, start_file
from .given import check_device, check_function, check_model, path_of
from .meta import Places, materialize

_BUFFER = 1 << 20  # bytes of a tensor that are in memory beside it


def load_safetensors(source, model, *, strict=True, device=None, init=None, progress=True):
    """Fill a model, whole or sharded, live or on the meta device, from safetensors files; each rank
    reads the bytes of its own shards.

    Beside the shards a rank needs 1 MB. Values are cast to the model's dtype, as by
    `load_state_dict`. Of tied weights the file may hold any one (of several, the last is read).
    Names are those of the model's state_dict; no prefix is guessed. Call it on every rank of the
    world.

    Args:
        source: a .safetensors file, an index (.safetensors.index.json), or a folder with one of
        them.
        model: an nn.Module. What is on the meta device is given memory, for its shards only; such
        parameters become new
            objects: make optimizers afterwards.
        strict: whether the file must have exactly the model's names.
        device: of tensors that were on meta; that of the mesh, or the CPU, by default.
        init: for what is on meta and not in the file (non-persistent buffers; with strict=False,
        missing weights): see
            `materialize`.
        progress: a bar on rank 0, if tqdm is installed.

    Returns: (missing, unexpected), lists of names as load_state_dict has them.
    Raises: on every rank, before anything is written to the model: FileNotFoundError; TypeError;
    ValueError for files that are not safetensors, or that lists every name that is missing or
    unexpected and every shape that differs. OSError where reading fails later.
    """
    with together():
        check_model(model)
        check_function("init", init)
        device = check_device(device)
        entries, wanted, missing = entries_of(path_of("source", source)), [], []
        names = _named_tensors(model)
        places = Places(model)
        wrong = []
        for t, tied in names:
            found = [n for n in tied if n in entries]
            if not found:
                missing.append(" = ".join(tied))
            elif tuple(t.shape) != entries[found[-1]].shape:
                wrong.append(
                    f"{found[-1]}: expected shape {tuple(t.shape)}, found"
                    f" {entries[found[-1]].shape}"
                )
            else:
                chunks(t)  # raises for a layout that it does not know
                wanted.append((t, entries[found[-1]]))
        unexpected = sorted(entries.keys() - {n for _, tied in names for n in tied})
        if strict:
            wrong[:0] = [f"{n}: missing from the file" for n in missing] + [
                f"{n}: not in the model" for n in unexpected
            ]
        if wrong:
            head = f"{source} does not fit the model, {len(wrong)} of its tensors differ:"
            raise ValueError("\n  ".join([head, *wrong]))
    with together():
        device = device or places.device()
        for i, (t, entry) in enumerate(wanted):
            if t.is_meta:
                wanted[i] = places.fill(t, torch.empty_like(t.detach(), device=device)), entry
        _copy(wanted, False, progress)
    materialize(model, init, device=device)
    return missing, unexpected


def export_safetensors(folder, model, *, max_shard_size="5GB", progress=True):
    """Write a model, whole or sharded, as safetensors files that `load_state_dict` of the whole
    model and transformers' `from_pretrained` read.

    No rank gathers anything: each writes its own shards' bytes, so the folder must be on a file
    system that all ranks share. Makes `model.safetensors`, or beyond `max_shard_size` (bytes, or a
    text such as "500MB" or "2GiB") `model-00001-of-0000N.safetensors` and an index. Tied weights
    are written once, under their first name. A model with a `config` that has `save_pretrained`
    gets its config.json too. Files have their final names when all is written: an export that fails
    leaves the folder as it was. One of an earlier export there is replaced. Call it on every rank
    of the world.

    Raises: on every rank, TypeError; ValueError for tensors without values (on meta) or without a
    safetensors dtype, or for a wrong max_shard_size; OSError where the folder cannot be written or
    the disk is full.
    """
    first, files = not dist.is_initialized() or dist.get_rank() == 0, {}
    with together():
        folder = path_of("folder", folder)
        check_model(model)
    token = gather(secrets.token_hex(8))[0]
    try:
        with together():
            state = {tied[0]: t for t, tied in _named_tensors(model)}
            bad = [
                f"{n} ({_kind(t)})" for n, t in state.items() if t.is_meta or t.dtype not in NAMES
            ]
            if bad:
                raise ValueError(
                    "expected tensors with values, of safetensors' dtypes, found others:"
                    f" {', '.join(bad)}"
                )
            files = _split(state, _bytes(max_shard_size))
            if first:
                folder.mkdir(parents=True, exist_ok=True)
                _sweep(folder)
                for name, held in files.items():
                    start_file(_partial(folder / name, token), held)
        with together():
            entries = {}
            for name in files:
                if not _partial(folder / name, token).exists():
                    raise FileNotFoundError(
                        f"{folder}: expected a folder that all ranks share, found no {name} of"
                        " rank 0's"
                    )
                entries.update(header_of(_partial(folder / name, token)))
            _copy([(t, entries[n]) for n, t in state.items()], True, progress)
        with together():
            if first:
                _finish(folder, files, getattr(model, "config", None), token)
    except BaseException:
        for name in (*files, INDEX) if first else ():
            with contextlib.suppress(OSError):
                _partial(folder / name, token).unlink()
        raise


def _kind(t):
    return "on meta" if t.is_meta else str(t.dtype)


def _partial(path, token):
    """Where an export writes what will be the file at a path."""
    return path.with_name(f"{path.name}.partial-{token}")


def _sweep(folder):
    """Remove what exports that were killed have left."""
    for entry in list(folder.iterdir()):
        if re.fullmatch(r"model.*\.safetensors(\.index\.json)?\.partial-[0-9a-f]{16}", entry.name):
            entry.unlink()


def _named_tensors(model):
    """[(tensor, the names that it has in the model's state_dict), ...]."""
    found = {}
    for name, t in model.state_dict(keep_vars=True).items():
        if not isinstance(t, torch.Tensor):
            raise ValueError(
                f"{name}: expected a tensor in the model's state_dict, found {type(t).__name__}"
            )
        found.setdefault(id(t), (t, []))[1].append(name)
    return list(found.values())


# ---- exporting


def _bytes(size):
    """5000000000 of "5GB"."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)(I?)B", size.upper()) if isinstance(size, str) else None
    if match is None and (type(size) is not int or size < 1):
        raise ValueError(
            f'max_shard_size: expected bytes, as an int or a text such as "5GB", found {size!r}'
        )
    return (
        int(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " ")
        if match
        else size
    )


def _split(state, limit):
    """file name -> {name: tensor}, in order, each of at most `limit` bytes, or of one tensor."""
    parts, room = [{}], limit
    for name, t in state.items():
        room -= t.nbytes
        if room < 0 and parts[-1]:
            parts.append({})
            room = limit - t.nbytes
        parts[-1][name] = t
    n = len(parts)
    return {
        SINGLE if n == 1 else f"model-{i:05}-of-{n:05}.safetensors": part
        for i, part in enumerate(parts, 1)
    }


def _finish(folder, files, config, token):
    """Give the files their names, the index last. Those of an earlier export go: they would be
    mixed with these."""
    if hasattr(config, "save_pretrained"):
        config.save_pretrained(folder)
    new = [*files, INDEX] if len(files) > 1 else [*files]
    if len(files) > 1:
        size = sum(t.nbytes for held in files.values() for t in held.values())
        where = {name: file for file, held in files.items() for name in held}
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=2)
        _partial(folder / INDEX, token).write_text(text + "\n")
    for old in [
        *folder.glob(INDEX),
        *folder.glob(SINGLE),
        *folder.glob("model-?????-of-?????.safetensors"),
    ]:
        if old.name not in new or old.name == INDEX:
            old.unlink()
    for name in new:
        _partial(folder / name, token).replace(folder / name)


# ---- bytes


def _copy(pairs, write, progress):
    """Read this rank's blocks of (tensor, Entry) pairs from their files, or write them there."""
    blocks = [
        (c, entry)
        for t, entry in pairs
        if not write or _writes(t)
        for c in chunks(t)
        if c.tensor.numel()
    ]
    total, buffer, fds = (
        sum(c.tensor.numel() * e.dtype.itemsize for c, e in blocks),
        bytearray(_BUFFER),
        {},
    )
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(_bar(total, "writing" if write else "reading", progress))
        call = os.pwritev if write else os.preadv
        for chunk, entry in blocks:
            if entry.path not in fds:
                fds[entry.path] = os.open(entry.path, os.O_WRONLY if write else os.O_RDONLY)
                stack.callback(os.close, fds[entry.path])
            size = entry.dtype.itemsize
            for offsets, part in pieces(chunk.offsets, chunk.tensor, _BUFFER // size):
                beside = torch.frombuffer(buffer, dtype=entry.dtype, count=part.numel()).view(
                    part.shape
                )
                if write:
                    beside.copy_(part)
                starts, length = runs(entry.shape, offsets, part.shape)
                view = memoryview(buffer)
                for start in starts:
                    move(call, fds[entry.path], view[: length * size], entry.start + start * size)
                    view = view[length * size :]
                if not write:
                    part.copy_(beside)
                bar.update(part.numel() * size)
        for fd in fds.values() if write else ():
            os.fsync(fd)  # tells what the disk had no room for


def _writes(t):
    """Whether this rank is the one that writes its blocks of a tensor, of those that hold the
    same."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if not isinstance(t, DTensor):
        return rank == 0
    mesh = t.device_mesh
    if not (mesh.mesh == 0).any():
        if rank == 0:
            raise ValueError(
                "expected rank 0 to hold a part of every tensor, found one on ranks"
                f" {mesh.mesh.tolist()}"
            )
        return False  # ranks in rank 0's mesh hold the same
    at = mesh.get_coordinate()
    return at is not None and not any(i for i, p in zip(at, t.placements) if p.is_replicate())


def _bar(total, what, progress):
    """tqdm's bar on rank 0; where it is not installed, none."""
    shown = progress and (not dist.is_initialized() or dist.get_rank() == 0)
    with contextlib.suppress(ImportError):
        from tqdm import tqdm

        return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=not shown)
    return _NoBar()


class _NoBar(contextlib.nullcontext):
    def __enter__(self):
        return self

    def update(self, n):
        pass
