"""A model written as safetensors files: each rank writes the bytes of its own
shards."""

import contextlib
import json
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..together import gather, together
from .chunks import chunks
from .files import INDEX, NAMES, SINGLE, layout_of, write
from .given import check_model, path_of
from .named import is_first, progress_bar, tensor_names


def export_safetensors(
    folder: str | os.PathLike,
    model: nn.Module,
    *,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
) -> None:
    """Write a model, whole or sharded, as safetensors files that `load_state_dict` of
    the whole model and transformers' `from_pretrained` read.

    No rank gathers anything: each writes its own shards' bytes, so the folder must be
    on a file system that all ranks share. Makes `model.safetensors`, or beyond
    `max_shard_size` (bytes, or a text such as "500MB" or "2GiB")
    `model-00001-of-0000N.safetensors` and an index. Tied weights are written once,
    under their first name. A model with a `config` that has `save_pretrained` gets its
    config.json too. Files have their final names when all is written: an export that
    fails leaves the folder as it was. One of an earlier export there is replaced. Call
    it on every rank of the world.

    Raises: on every rank, TypeError; ValueError for tensors without values (on meta) or
    without a safetensors dtype, or for a wrong max_shard_size; OSError where the folder
    cannot be written or the disk is full.
    """
    with together():
        target = path_of("folder", folder)
        check_model(model)
    export = _Export(target, gather(secrets.token_hex(8))[0], {})
    try:
        with together():
            export.files.update(_split(_with_values(model), _bytes(max_shard_size)))
            if is_first():
                export.start()
        with together():
            export.write(progress)
        with together():
            if is_first():
                export.finish(getattr(model, "config", None))
    except BaseException:
        if is_first():
            export.discard()
        raise


@dataclass(frozen=True)
class _Export:
    """Files that are being written to a folder: {file name: {name: tensor}}, under
    other names until all is there."""

    folder: Path
    token: str
    files: dict[str, dict[str, Tensor]]

    def partial(self, name: str) -> Path:
        """Where what will be the file of a name is written."""
        return self.folder / f"{name}.partial-{self.token}"

    def start(self) -> None:
        """Make all files; what exports that were killed have left goes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        left = r"model.*\.safetensors(\.index\.json)?\.partial-[0-9a-f]{16}"
        for path in list(self.folder.iterdir()):
            if re.fullmatch(left, path.name):
                path.unlink()
        for name, tensors in self.files.items():
            header, _, size = layout_of(tensors)
            self.partial(name).write_bytes(header)
            os.truncate(self.partial(name), size)

    def write(self, progress: bool) -> None:
        """Write this rank's blocks."""
        own = [
            t for tensors in self.files.values() for t in tensors.values() if _writes(t)
        ]
        total = sum(c.tensor.nbytes for t in own for c in chunks(t))
        with progress_bar(total, "writing", progress) as bar:
            for file, tensors in self.files.items():
                if not self.partial(file).exists():
                    raise FileNotFoundError(
                        f"{self.folder}: expected a folder that all ranks share, found"
                        f" no {file} of rank 0's"
                    )
                _, starts, _ = layout_of(tensors)
                with open(self.partial(file), "rb+") as f:
                    for name, t in tensors.items():
                        if _writes(t):
                            write(f, t, starts[name], bar)
                    f.flush()
                    os.fsync(f.fileno())  # tells what the disk had no room for

    def finish(self, config: Any) -> None:
        """Give the files their names, the index last. Those of an earlier export go:
        they would be mixed with these."""
        if hasattr(config, "save_pretrained"):
            config.save_pretrained(self.folder)
        new = list(self.files)
        if len(self.files) > 1:
            size = sum(
                t.nbytes for tensors in self.files.values() for t in tensors.values()
            )
            where = {
                name: file for file, tensors in self.files.items() for name in tensors
            }
            text = json.dumps(
                {"metadata": {"total_size": size}, "weight_map": where}, indent=2
            )
            self.partial(INDEX).write_text(text + "\n")
            new.append(INDEX)
        for old in (
            self.folder / INDEX,
            self.folder / SINGLE,
            *self.folder.glob("model-?????-of-?????.safetensors"),
        ):
            if old.name not in new or old.name == INDEX:
                old.unlink(missing_ok=True)
        for name in new:
            self.partial(name).replace(self.folder / name)

    def discard(self) -> None:
        for name in (*self.files, INDEX):
            with contextlib.suppress(OSError):
                self.partial(name).unlink()


def _with_values(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model under their first names. Raises for those that cannot be
    written."""
    tensors = {names[0]: t for t, names in tensor_names(model).items()}
    bad = [
        f"{name} ({'on meta' if t.is_meta else t.dtype})"
        for name, t in tensors.items()
        if t.is_meta or t.dtype not in NAMES
    ]
    if bad:
        raise ValueError(
            "expected tensors with values, of safetensors' dtypes, found others:"
            f" {', '.join(bad)}"
        )
    return tensors


def _bytes(size: Any) -> int:
    """5000000000 of "5GB"."""
    if type(size) is int and size > 0:
        return size
    match = (
        re.fullmatch(r"(\d+)\s*([KMGT]?)(I?)B", size.upper())
        if isinstance(size, str)
        else None
    )
    if match is None:
        raise ValueError(
            'max_shard_size: expected bytes, as an int or a text such as "5GB", found'
            f" {size!r}"
        )
    number, power, binary = match.groups()
    return int(number) * (1024 if binary else 1000) ** " KMGT".index(power or " ")


def _split(tensors: dict[str, Tensor], limit: int) -> dict[str, dict[str, Tensor]]:
    """file name -> {name: tensor}, in order, each of at most `limit` bytes, or of one
    tensor."""
    parts: list[dict[str, Tensor]] = [{}]
    room = limit
    for name, t in tensors.items():
        room -= t.nbytes
        if room < 0 and parts[-1]:
            parts.append({})
            room = limit - t.nbytes
        parts[-1][name] = t
    n = len(parts)
    if n == 1:
        return {SINGLE: parts[0]}
    return {
        f"model-{i:05}-of-{n:05}.safetensors": part for i, part in enumerate(parts, 1)
    }


def _writes(t: Tensor) -> bool:
    """Whether this rank is the one that writes its blocks of a tensor, of those that
    hold the same."""
    if not isinstance(t, DTensor):
        return is_first()
    mesh = t.device_mesh
    if (mesh.mesh == 0).any():
        at = mesh.get_coordinate()
        return at is not None and not any(
            i for i, p in zip(at, t.placements) if p.is_replicate()
        )
    if is_first():
        raise ValueError(
            "expected rank 0 to hold a part of every tensor, found one on ranks"
            f" {mesh.mesh.tolist()}"
        )
    return False  # ranks in rank 0's mesh hold the same
