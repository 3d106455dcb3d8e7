"""torch.distributed.checkpoint on chunks: it writes and reads the blocks of a tensor that a rank
holds.

It does not place fused pieces (`_StridedShard`) by itself, unpickles a checkpoint's index with
nothing barred, and opens files by their path, whatever was put there meanwhile; that is mended here
and in index.py, at its points of extension. What is written is its own format:
`torch.distributed.checkpoint.load` reads it.
"""

import contextlib
import pathlib
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from .chunks import chunks


@dataclass
class Item:
    """A tensor to save or to fill: its path in the nested state dict, its whole shape, and this
    rank's chunks of it."""

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
                tensor_data=TensorWriteData(
                    _placed(c), TensorProperties(dtype=item.dtype), item.shape
                ),
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
        reads = [
            create_read_items_for_chunk_list(n, saved[n], list(map(_placed, item.chunks)))
            for n, item in items
        ]
        return LoadPlan(sum(reads, []))

    def lookup_tensor(self, index):
        return self.state_dict[index.fqn].at(index)


class Reader(FileSystemReader):
    """Reads from an `Opened` checkpoint, whose index was read and checked before."""

    def __init__(self, checkpoint, index):
        super().__init__(checkpoint.path)
        self.fs, self.checkpoint, self.index = _Within(checkpoint), checkpoint, index

    def read_metadata(self, *args, **kwargs):
        if getattr(self.index, "storage_meta", None) is None:
            self.index.storage_meta = StorageMeta()
        self.index.storage_meta.load_id = self.load_id
        return self.index

    def prepare_local_plan(self, plan):
        """Before any rank has read: this one has all files that it will."""
        self.checkpoint.keep(
            sorted({self.storage_data[item.storage_index].relative_path for item in plan.items})
        )
        return plan


class _Within(FileSystem):
    """The files of an `Opened` checkpoint."""

    def __init__(self, checkpoint):
        self.checkpoint = checkpoint

    @contextlib.contextmanager
    def create_stream(self, path, mode):
        with self.checkpoint.open(pathlib.Path(path).name) as file:
            yield file
