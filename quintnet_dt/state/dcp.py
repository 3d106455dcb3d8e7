"""torch.distributed.checkpoint on chunks: it writes and reads the blocks of a tensor
that a rank holds.

It does not place fused pieces (`_StridedShard`) by itself (pieces.py teaches DTensor
to), unpickles a checkpoint's index with nothing barred, and opens files by their path,
whatever was put there meanwhile; that is mended here and in index.py, at its points of
extension: tensors that know their blocks, and a storage reader. What is written is its
own format: `torch.distributed.checkpoint.load` reads it.
"""

import contextlib
import pathlib
import warnings

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from .chunks import Chunk, chunks


class Blocks(torch.Tensor):
    """A tensor of one element's memory, which knows the blocks of it that this rank
    holds, whatever its layout. The default planners of torch.distributed.checkpoint ask
    it, as they ask a DTensor."""

    chunks: list[Chunk]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Blocks":
        """The blocks of a tensor, plain or distributed."""
        return cls.held(tensor, chunks(tensor))

    @classmethod
    def held(cls, like: torch.Tensor, chunks: list[Chunk]) -> "Blocks":
        """These blocks, of a tensor of the shape and dtype of another."""
        # Not on meta: there the planners would give it memory.
        blocks = torch.empty((), dtype=like.dtype).expand(like.shape).as_subclass(cls)
        blocks.chunks = chunks
        return blocks

    def copied(self) -> "Blocks":
        """Copies of the blocks, on the CPU."""
        copies = [Chunk(c.offsets, c.tensor.to("cpu", copy=True)) for c in self.chunks]
        return Blocks.held(self, copies)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(c.offsets), c.tensor.shape)
            for c in self.chunks
        ]

    def __create_write_items__(self, fqn: str, object: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return next(c.tensor for c in self.chunks if c.offsets == tuple(index.offset))


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
            sorted(
                {
                    self.storage_data[item.storage_index].relative_path
                    for item in plan.items
                }
            )
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


def run_dcp(function, *args, **kwargs):
    """Call torch.distributed.checkpoint. Its exception is no Exception, and is raised
    on every rank with the ranks'."""
    alone = not dist.is_initialized()
    try:
        with warnings.catch_warnings():
            if alone:  # it warns that it does what it was told to
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
            function(*args, no_dist=alone, **kwargs)
    except CheckpointException as e:
        failed = "; ".join(
            f"rank {rank}: {type(x).__name__}: {x}"
            for rank, (x, _) in e.failures.items()
        )
        raise RuntimeError(f"the checkpoint failed: {failed}") from next(
            iter(e.failures.values())
        )[0]
