"""A checkpoint that is being read: held open, so that all that is read of it is of one
save, whatever a save that runs beside puts in its place meanwhile."""

import contextlib
import functools
import hashlib
import os
import zlib

import torch.distributed as dist

from ..together import gather, together
from .folder import MANIFEST, TRIES, checksum, complete, files_of

KEPT = 256  # files that a rank holds open at most, of those that it will read


class Opened:
    """The folder of a complete checkpoint, open; to be closed.

    `path`: where it was found; `manifest`: its bytes; `files`: {name: [size, CRC-32]}.
    """

    def __init__(self, path):
        self.path, self.kept = path, {}
        try:
            self.folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except NotADirectoryError as e:
            raise ValueError(self._expected("a file")) from e
        try:
            self.manifest = self._manifest()
            self.files = self._files()
        except BaseException:
            self.close()
            raise

    def _manifest(self):
        try:
            with self._open(MANIFEST) as file:
                return file.read()
        except OSError as e:
            raise ValueError(self._expected("none")) from e

    def _files(self):
        try:
            return files_of(self.manifest)
        except ValueError as e:
            raise ValueError(self._expected(e)) from e

    def _expected(self, found):
        return (
            f"{self.path}: expected a checkpoint with a {MANIFEST}, as save_checkpoint"
            f" makes, found {found}"
        )

    def _open(self, name):
        return open(name, "rb", opener=functools.partial(os.open, dir_fd=self.folder))

    def open(self, name):
        """A file of the checkpoint, open at its beginning."""
        if name in self.kept:
            file = open(os.dup(self.kept[name].fileno()), "rb")
            file.seek(0)
            return file
        try:
            return self._open(name)
        except FileNotFoundError as e:
            raise FileNotFoundError(
                f"{self.path / name}: expected a file of the checkpoint, found none: it"
                " was damaged, or replaced by a save while it was read"
            ) from e

    def keep(self, names):
        """Hold files open that will be read, so that they are there even if a save
        removes them."""
        for name in [n for n in names if n not in self.kept][: KEPT - len(self.kept)]:
            self.kept[name] = self.open(name)

    def read(self, name):
        """The bytes of a file, which are what was written."""
        with self.open(name) as file:
            data = file.read()
        self._same(name, [len(data), zlib.crc32(data)])
        return data

    def verify(self):
        """Every file is as it was written. The ranks share the work."""
        rank, n = (
            (dist.get_rank(), dist.get_world_size())
            if dist.is_initialized()
            else (0, 1)
        )
        for name in sorted(self.files)[rank::n]:
            with self.open(name) as file:
                self._same(name, checksum(file))

    def _same(self, name, found):
        if found != self.files[name]:
            expected = "expected {} bytes with checksum {:08x}".format(
                *self.files[name]
            )
            found = "found {} with {:08x}".format(*found)
            raise ValueError(
                f"{self.path / name}: {expected}, {found}: the file is damaged"
            )

    def close(self):
        for file in self.kept.values():
            file.close()
        os.close(self.folder)


@contextlib.contextmanager
def opened(path):
    """Around what reads the checkpoint at a path, on every rank: the same save's on all
    of them, as an `Opened`."""
    for _ in range(TRIES):
        with together():
            found = _open(path)
        try:
            digests = gather(hashlib.sha256(found.manifest).hexdigest())
            if len(set(digests)) == 1:
                yield found
                return
        finally:
            found.close()
    raise RuntimeError(
        f"{path}: expected one checkpoint on all ranks, found that they read different"
        " ones: it is being saved again and again, or ranks see different file systems"
    )


def _open(path):
    """The complete checkpoint at a path. A save may rename it between a look and the
    next."""
    for left in reversed(range(TRIES)):
        try:
            return Opened(complete(path))
        except (FileNotFoundError, ValueError):
            if not left:
                raise
