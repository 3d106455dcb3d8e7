"""The index of a checkpoint (`.metadata`): read without running any code that it may
hold, and checked to lead to every element of what is to be loaded, exactly once."""

import io
import pickle
from math import prod

import torch
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)


def read_index(data):
    """The Metadata of the bytes of an index. Raises ValueError."""
    try:
        index = _Unpickler(io.BytesIO(data)).load()
        if not isinstance(index, Metadata) or index.storage_data is None:
            raise TypeError(
                f"expected Metadata with storage_data, found {type(index).__name__}"
            )
    except Exception as e:
        raise ValueError(f"cannot be read: {type(e).__name__}: {e}") from e
    return index


class _Unpickler(pickle.Unpickler):
    """Knows the classes that the index of a checkpoint is made of, and no others."""

    def find_class(self, module, name):
        allowed = module == "torch" and (
            name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)
        )
        of_index = (
            getattr(dcp_metadata, name, None)
            if module == dcp_metadata.__name__
            else None
        )
        allowed = (
            allowed or isinstance(of_index, type) and of_index.__module__ == module
        )
        allowed = (
            allowed
            or module.startswith("pathlib")
            and name in ("PosixPath", "PurePosixPath", "WindowsPath")
        )
        if not allowed and (module, name) not in _OTHERS:
            raise pickle.UnpicklingError(
                f"expected the index of a checkpoint, found {module}.{name} in it"
            )
        return super().find_class(module, name)


_OTHERS = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
}


def check_whole(path, index, names, files):
    """Raise ValueError where not every element of these tensors is in one of the files,
    once."""
    wrong = [found for n in names if (found := faults(index, n, files))]
    if wrong:
        head = f"{path}: {len(wrong)} of its tensors are not whole:"
        raise ValueError("\n  ".join([head, *wrong[:20]]))


def faults(index, name, files):
    """What is wrong with a tensor in an index, None where every element of it is in one
    of the files, once."""
    saved = index.state_dict_metadata.get(name)
    if not isinstance(saved, TensorStorageMetadata):
        return f"{name}: expected a tensor, found {type(saved).__name__}"
    blocks = [(tuple(c.offsets), tuple(c.sizes)) for c in saved.chunks]
    if wrong := not_exact(tuple(saved.size), blocks):
        return (
            f"{name}: expected blocks that are {tuple(saved.size)} together, found"
            f" {wrong}"
        )
    for offsets, _ in blocks:
        place = index.storage_data.get(MetadataIndex(name, torch.Size(offsets)))
        if place is None or place.relative_path not in files:
            return (
                f"{name}: expected its block at {offsets} in a file of the checkpoint,"
                " found it in none"
            )
        if (
            not 0
            <= place.offset
            <= place.offset + place.length
            <= files[place.relative_path][0]
        ):
            return (
                f"{name}: expected its block at {offsets} within {place.relative_path},"
                " found it beyond its end"
            )
    return None


def not_exact(shape, blocks):
    """Why blocks [(offsets, sizes), ...] are not a tensor of a shape together, each
    element in one of them; else None."""
    for offsets, sizes in blocks:
        inside = all(
            o >= 0 and s >= 0 and o + s <= n for o, s, n in zip(offsets, sizes, shape)
        )
        if not inside or not len(offsets) == len(sizes) == len(shape):
            return f"one of {sizes} at {offsets}"
    full = sorted((offsets, sizes) for offsets, sizes in blocks if prod(sizes))
    if both := _overlap(full):
        return "overlapping ones at {} and {}".format(*both)
    held, needed = sum(prod(sizes) for _, sizes in full), prod(shape)
    return f"{held} elements of {needed}" if held != needed else None


def _overlap(blocks):
    """The offsets of two blocks that overlap. Each is compared with those that reach as
    far along the dim on which they begin at most places."""
    dims = range(len(blocks[0][0])) if blocks else ()
    dim = max(
        dims, key=lambda d: len({offsets[d] for offsets, _ in blocks}), default=None
    )
    if dim is None:
        return (blocks[0][0], blocks[1][0]) if len(blocks) > 1 else None
    reaching = []
    for offsets, sizes in sorted(blocks, key=lambda block: block[0][dim]):
        reaching = [(o, s) for o, s in reaching if o[dim] + s[dim] > offsets[dim]]
        for o, s in reaching:
            if all(a < b + n and b < a + m for a, m, b, n in zip(offsets, sizes, o, s)):
                return o, offsets
        reaching.append((offsets, sizes))
    return None
