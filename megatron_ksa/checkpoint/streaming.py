"""Megatron distributed checkpoints (`--ckpt-format torch_dist`) written and read one tensor at a time, without a model.

The format is PyTorch's distributed checkpoint; what is Megatron's own are the names, the `common_state` object with
the trainer's arguments, and `metadata.json`. Planners that make a tensor only when it is written, and that ask for a
part of one only when it is needed, keep memory at the size of what is in hand.
"""

import contextlib
import dataclasses
import io
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_ksa.checkpoint.norm_names import stored_name
from megatron_ksa.errors import UsageError
from megatron_ksa.upstream.checkpoint_sums import recorded, store_common

COMMON_STATE = ShardedObject("common_state", None, (1,), (0,)).unique_key


@dataclass(frozen=True)
class Slot:
    """A part of a stored tensor: `shape` from `offset` on of the tensor `key`, whose whole shape is `size`.

    `is_layer` says that the first dimension counts layers and is 1 in `shape`.
    """

    key: str
    size: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    is_layer: bool = False

    @classmethod
    def whole(cls, key: str, shape: tuple[int, ...]) -> "Slot":
        """All of a tensor."""
        return cls(key, shape, (0,) * len(shape), shape)

    @classmethod
    def stacked(cls, key: str, shape: tuple[int, ...], layer: int, num_layers: int) -> "Slot":
        """One layer's part of a tensor that holds all layers along a first dimension."""
        return cls(key, (num_layers, *shape), (layer, *(0,) * len(shape)), (1, *shape), is_layer=True)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape without a layer dimension."""
        return self.shape[1:] if self.is_layer else self.shape

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offset), torch.Size(self.shape))


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One process is meant: torch warns of it at every call."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class _SavePlanner(DefaultSavePlanner):
    """Plans the given slots and objects; asks for a tensor when the writer comes to it."""

    def __init__(
        self, slots: dict[Slot, torch.dtype], make: Callable[[Slot], Tensor], objects: dict[str, object]
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.make, self.objects = make, objects
        self.slots = {MetadataIndex(slot.key, slot.offset): slot for slot in slots}
        self.dtypes = slots

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                index=index,
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    slot.chunk, TensorProperties(dtype=self.dtypes[slot]), torch.Size(slot.size)
                ),
            )
            for index, slot in self.slots.items()
        ]
        items += [WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO) for key in self.objects]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            # Megatron stores the objects of a key as a list.
            torch.save([self.objects[write_item.index.fqn]], stream)
            return stream
        slot = self.slots[MetadataIndex(write_item.index.fqn, write_item.index.offset)]
        return self.make(slot).reshape(slot.shape)


def save_distributed(
    folder: Path,
    slots: dict[Slot, torch.dtype],
    make: Callable[[Slot], Tensor],
    common: dict[str, object],
    empty_objects: Iterable[tuple[str, int, int]],
) -> None:
    """Write one iteration's folder, with the records of its files.

    Args:
        folder: must exist; gets the checkpoint's files.
        slots: what to write, in this order, with its dtype; slots of one key tile it.
        make: called once for each slot when its turn comes; returns its tensor.
        common: Megatron's common state: `args`, `iteration`, `checkpoint_version`.
        empty_objects: key, index and number of objects that Megatron expects but that hold nothing.
    """
    objects = {ShardedObject(key, None, (count,), (index,)).unique_key: None for key, index, count in empty_objects}
    planner = _SavePlanner(slots, make, {**objects, COMMON_STATE: common})
    with _alone(), recorded(folder):
        dcp.save({}, storage_writer=dcp.FileSystemWriter(folder), planner=planner, no_dist=True)
    save_config(CheckpointingConfig("torch_dist"), str(folder))
    store_common(folder, contents=True)


class _LoadPlanner(DefaultLoadPlanner):
    """Reads one slot, whatever parts the checkpoint stores it in."""

    def __init__(self, slot: Slot, target: Tensor) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.slot, self.target = slot, target

    def create_local_plan(self) -> LoadPlan:
        stored = self.metadata.state_dict_metadata[self.slot.key]
        return LoadPlan(create_read_items_for_chunk_list(self.slot.key, stored, [self.slot.chunk]))

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self.target
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, offset, length)
        return part


def cause(error: CheckpointException) -> BaseException:
    """The error of the first rank that failed."""
    return next(iter(error.failures.values()))[0]


def failure(error: CheckpointException) -> str:
    """What went wrong, without the traceback that torch puts into its message."""
    first = cause(error)
    return str(first) if isinstance(first, UsageError) else f"{type(first).__name__}: {first}"


class DistributedReader:
    """Tensors of one iteration's folder, by slot.

    Raises:
        UsageError: a folder that is no distributed checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            metadata = dcp.FileSystemReader(folder).read_metadata()
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ValueError, TypeError, LookupError) as error:
            raise UsageError(f"{folder} is no distributed checkpoint (--ckpt-format torch_dist): {error}") from None
        # Read once: a large model's metadata is unpickled in seconds, and every tensor is a read of its own.
        self._reader = dcp.FileSystemReader(folder)
        self._reader.read_metadata = lambda *args, **kwargs: metadata
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: stored
            for key, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }

    def name(self, slot: Slot) -> str:
        """The name of a slot's tensor here; norms have two."""
        return stored_name(slot.key, self.tensors)

    def _stored(self, slot: Slot) -> TensorStorageMetadata:
        if self.name(slot) not in self.tensors:
            raise UsageError(f"{self.folder} lacks the tensor {slot.key} of shape {slot.size}")
        return self.tensors[self.name(slot)]

    def dtype(self, slot: Slot) -> torch.dtype:
        """The dtype that a slot's tensor is stored in.

        Raises:
            UsageError: a tensor that is missing.
        """
        return self._stored(slot).properties.dtype

    def read(self, slot: Slot) -> Tensor:
        """One slot's tensor, of slot.tensor_shape.

        Raises:
            UsageError: a tensor that is missing, of another shape, or in a damaged file.
        """
        stored = self._stored(slot)
        if tuple(stored.size) != slot.size:
            raise UsageError(f"{self.folder}: {slot.key} has shape {tuple(stored.size)}, its arguments say {slot.size}")
        slot = dataclasses.replace(slot, key=self.name(slot))
        target = torch.empty(slot.shape, dtype=stored.properties.dtype)
        try:
            with _alone():
                dcp.load({}, storage_reader=self._reader, planner=_LoadPlanner(slot, target), no_dist=True)
        except CheckpointException as error:
            raise UsageError(f"{self.folder}: {slot.key} cannot be read: {failure(error)}") from None
        return target.reshape(slot.tensor_shape)
