"""The folder of a checkpoint: complete or not there. It is written beside its place, as `<name>.saving`, and renamed
when all is in it; what was there before is `<name>.old` for that moment. `manifest.json` holds the size and checksum of
every other file."""

import json
import os
import shutil
import zlib

import torch.distributed as dist

MANIFEST, STATE = "manifest.json", "state.pt"
BLOCK = 1 << 24  # bytes read at once for a checksum


def begin(path):
    """Make the folder to write to. Refuses to replace what is no checkpoint."""
    if path.exists() and not (path / MANIFEST).exists() and (path.is_file() or any(path.iterdir())):
        raise FileExistsError(f"{path}: expected a checkpoint or nothing, found something else: choose another place")
    shutil.rmtree(saving(path), ignore_errors=True)
    saving(path).mkdir(parents=True)


def finish(path, files):
    """All is written: note its checksums, and put it in its place."""
    temporary, old = saving(path), _old(path)
    write_file(temporary / MANIFEST, json.dumps({"version": 1, "files": files}, indent=1).encode())
    _sync(temporary)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    temporary.rename(path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def saving(path):
    return path.with_name(path.name + ".saving")


def _old(path):
    return path.with_name(path.name + ".old")


def write_file(path, data):
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder):
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def checksum(path):
    """[size, CRC-32] of a file."""
    crc, size = 0, 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]


def complete(path):
    """The complete checkpoint at a path: there, or set aside by a save that was killed as it put the next one there."""
    old, half = _old(path), saving(path)
    if path.exists():
        return path
    if (old / MANIFEST).exists():
        return old
    also = f"; {half.name} is a half-written one" if half.exists() else ""
    raise FileNotFoundError(f"{path}: expected a checkpoint that save_checkpoint made, found nothing{also}")


def manifest_of(path):
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = manifest["files"]
        if manifest["version"] != 1 or {STATE, ".metadata"} - files.keys() or any("/" in name for name in files):
            raise ValueError("its entries are others")
        return files
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        found = "none" if isinstance(e, OSError) else f"one that cannot be read ({e})"
        raise ValueError(
            f"{path}: expected a checkpoint with a {MANIFEST}, as save_checkpoint makes, found {found}"
        ) from e


def verify(path, files):
    """Every file is as it was written. The ranks share the work."""
    rank, n = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for name in sorted(files)[rank::n]:
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path / name}: expected a file of the checkpoint, found none")
        if (found := checksum(path / name)) != files[name]:
            expected = "expected {} bytes with checksum {:08x}".format(*files[name])
            raise ValueError(f"{path / name}: {expected}, found {found[0]} with {found[1]:08x}: the file is damaged")
