"""The folder of a checkpoint: complete or not there.

It is written beside its place, as `<name>.saving-<token>`, and renamed when all is in
it; what was there before is `<name>.old-<token>` for that moment. Both hold a file that
says so: a folder without it is the user's, whatever its name, and is neither read nor
touched. `manifest.json` holds the size and checksum of every other file.
"""

import contextlib
import json
import os
import re
import zlib

MANIFEST, STATE, INDEX = "manifest.json", "state.pt", ".metadata"
# which checkpoint a folder belongs to, and the token of the save that made or set it
# aside
MARK = ".quintnet_dt.json"
BLOCK = 1 << 24  # bytes read at once for a checksum
TRIES = 3  # of a reader that comes between the two renames of a save

_OURS = re.compile(
    r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|state\.pt|manifest\.json|\.quintnet_dt\.json"
)


def saving(path, token):
    """Where the save of a token writes."""
    return path.with_name(f"{path.name}.saving-{token}")


def aside(path, token):
    """Where the save of a token puts what was there before."""
    return path.with_name(f"{path.name}.old-{token}")


def mark(folder, path, token):
    """Note that a folder is this library's."""
    write_file(
        folder / MARK, json.dumps({"checkpoint": path.name, "save": token}).encode()
    )


def marked(folder, path, token):
    """Whether a folder is one that this library made, for the checkpoint at a path, in
    the save of a token."""
    try:
        return json.loads((folder / MARK).read_bytes()) == {
            "checkpoint": path.name,
            "save": token,
        }
    except (OSError, ValueError):
        return False


# ---- writing


def begin(path, token):
    """Make the folder to write to. Refuses to replace what is no checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settle(path)
    check_replaceable(path)
    saving(path, token).mkdir()
    try:
        mark(saving(path, token), path, token)
    except OSError:  # the disk is full
        remove(saving(path, token))
        raise


def check_replaceable(path):
    """Only a checkpoint is replaced, and an empty folder."""
    if not os.path.lexists(path) or path.is_dir() and not any(path.iterdir()):
        return
    try:
        files_of((path / MANIFEST).read_bytes())
    except (OSError, ValueError) as e:
        raise FileExistsError(
            f"{path}: expected a checkpoint or nothing, found something else: choose"
            " another place"
        ) from e


def finish(path, token, files):
    """All is written: note its checksums, and put it in its place."""
    temporary, old = saving(path, token), aside(path, token)
    for name, (size, _) in files.items():
        if (
            not (temporary / name).is_file()
            or (temporary / name).stat().st_size != size
        ):
            raise FileNotFoundError(
                f"{temporary / name}: expected a file of {size} bytes that another rank"
                " wrote, found none: all ranks must save to one file system"
            )
    manifest = {"version": 1, "save": token, "files": files}
    write_file(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
    _sync(temporary)
    check_replaceable(path)
    if (path / MANIFEST).exists():
        mark(path, path, token)
        path.rename(old)
        try:
            temporary.rename(path)
        except OSError:
            old.rename(path)
            raise
    else:
        temporary.rename(path)
    _sync(path.parent)
    retire(old, path)


def settle(path):
    """Bring to an end what a save that was killed has left."""
    for token in _tokens(path):
        temporary, old = saving(path, token), aside(path, token)
        ours, its = marked(temporary, path, token), marked(old, path, token)
        if ours and its and _complete(temporary) and not os.path.lexists(path):
            temporary.rename(path)
            _sync(path.parent)
        elif ours:
            remove(temporary)
        if its and _complete(path):
            retire(old, path)


def remove(folder):
    """Remove a folder of this library's, but for files in it that are not."""
    with contextlib.suppress(OSError):
        for entry in list(folder.iterdir()):
            if _OURS.fullmatch(entry.name):
                entry.unlink()
        folder.rmdir()


def retire(old, path):
    """Remove what a save replaced. Files that somebody else put into it move to its
    successor."""
    with contextlib.suppress(OSError):
        for entry in list(old.iterdir()):
            if not _OURS.fullmatch(entry.name) and not os.path.lexists(
                path / entry.name
            ):
                entry.rename(path / entry.name)
    remove(old)


def _tokens(path):
    """Of the saves that have left something beside a path."""
    name = re.compile(re.escape(path.name) + r"\.(?:saving|old)-([0-9a-f]{16})")
    return sorted(
        {
            found[1]
            for entry in path.parent.iterdir()
            if (found := name.fullmatch(entry.name))
        }
    )


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


def checksum(file):
    """[size, CRC-32] of an open file."""
    crc, size = 0, 0
    while block := file.read(BLOCK):
        crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]


def checksums(files):
    """{name: [size, CRC-32]} of files."""
    found = {}
    for path in files:
        with open(path, "rb") as file:
            found[path.name] = checksum(file)
    return found


# ---- reading


def complete(path):
    """The complete checkpoint at a path: there, or still beside it where a save was
    killed as it put it there."""
    if path.exists():
        return path
    for token in _tokens(path) if path.parent.is_dir() else ():
        temporary, old = saving(path, token), aside(path, token)
        if (
            marked(temporary, path, token)
            and marked(old, path, token)
            and _complete(temporary)
        ):
            return temporary
    raise FileNotFoundError(
        f"{path}: expected a checkpoint that save_checkpoint made, found"
        f" nothing{_beside(path)}"
    )


def _complete(folder):
    return (folder / MANIFEST).is_file()


def _beside(path):
    """What a user may have expected to be loaded."""
    names = (
        sorted(entry.name for entry in path.parent.iterdir())
        if path.parent.is_dir()
        else []
    )
    half = [
        f"; {n} is a half-written one"
        for n in names
        if n.startswith(f"{path.name}.saving")
    ]
    old = [
        f"; {n} is there, load it by its own name"
        for n in names
        if n.startswith(f"{path.name}.old")
    ]
    return "".join([*half, *old])


def files_of(manifest):
    """{file name: [size, CRC-32]} of the bytes of a manifest. Raises ValueError."""
    try:
        manifest = json.loads(manifest)
        files = manifest["files"]
        strange = [n for n in files if not _OURS.fullmatch(n)]
        numbers = all(
            isinstance(x, int) for size, crc in files.values() for x in (size, crc)
        )
        if (
            manifest["version"] != 1
            or {STATE, INDEX} - files.keys()
            or strange
            or not numbers
        ):
            raise ValueError("its entries are others")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"one that cannot be read ({e!r})") from e
    return files
