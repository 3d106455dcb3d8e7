"""torch.distributed.checkpoint on chunks: it writes and reads the blocks of a tensor that a rank holds.

It does not place fused pieces (`_StridedShard`) by itself, and unpickles a checkpoint's index with nothing barred; both
are mended here, at its points of extension. What is written is its own format: `torch.distributed.checkpoint.load`
reads it.
"""

import pathlib
import pickle
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from .chunks import chunks


@dataclass
class Item:
    """A tensor to save or to fill: its path in the nested state dict, its whole shape, and this rank's chunks of it."""

    path: tuple
    shape: torch.Size
    dtype: torch.dtype
    chunks: list

    @classmethod
    def of(cls, path, tensor):
        return cls(path, tensor.shape, tensor.dtype, chunks(tensor))

    def at(self, index):
        """The block that starts where an index says."""
        return next(c.tensor for c in self.chunks if c.offsets == tuple(index.offset))


def _placed(chunk):
    return ChunkStorageMetadata(torch.Size(chunk.offsets), chunk.tensor.shape)


class SavePlanner(DefaultSavePlanner):
    """Saves a dict of Items by name."""

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False):
        self.state_dict, self.is_coordinator = state_dict, is_coordinator
        self.mappings = {name: item.path for name, item in state_dict.items()}

    def create_local_plan(self):
        writes = [
            WriteItem(
                MetadataIndex(name, torch.Size(c.offsets)),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(_placed(c), TensorProperties(dtype=item.dtype), item.shape),
            )
            for name, item in self.state_dict.items()
            for c in item.chunks
        ]
        self.plan = SavePlan(writes, planner_data=self.mappings)
        return self.plan

    def lookup_object(self, index):
        return self.state_dict[index.fqn].at(index)


class LoadPlanner(DefaultLoadPlanner):
    """Fills a dict of Items by name."""

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False):
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self):
        saved, items = self.metadata.state_dict_metadata, self.state_dict.items()
        reads = [create_read_items_for_chunk_list(n, saved[n], list(map(_placed, item.chunks))) for n, item in items]
        return LoadPlan(sum(reads, []))

    def lookup_tensor(self, index):
        return self.state_dict[index.fqn].at(index)


class Reader(FileSystemReader):
    """Reads a checkpoint without running any code that it may hold."""

    def read_metadata(self, *args, **kwargs):
        with open(pathlib.Path(self.path) / ".metadata", "rb") as file:
            metadata = _Unpickler(file).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    """Knows the classes that the index of a checkpoint is made of, and no others."""

    def find_class(self, module, name):
        known = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        of_index = getattr(dcp_metadata, name, None) if module == dcp_metadata.__name__ else None
        known = known or isinstance(of_index, type) and of_index.__module__ == module
        known = known or module.startswith("pathlib") and name in ("PosixPath", "PurePosixPath", "WindowsPath")
        if not known and (module, name) not in _OTHERS:
            raise pickle.UnpicklingError(f"expected the index of a checkpoint, found {module}.{name} in it")
        return super().find_class(module, name)


_OTHERS = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
}
