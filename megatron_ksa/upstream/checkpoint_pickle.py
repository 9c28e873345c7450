"""Distributed checkpoints are read without running what their pickles name."""

import io
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, set_element
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from megatron_ksa.errors import UsageError
from megatron_ksa.upstream import safe_pickle
from megatron_ksa.upstream.patches import Patch

EXTRA_STATE = "_extra_state"


def _refusal(file: object, error: safe_pickle.UnsafePickle) -> UsageError:
    return UsageError(
        f"{file} holds {error}, which a checkpoint is not made of and which could run code when it is loaded: use "
        f"another checkpoint, or {safe_pickle.FLAG} where you know who wrote it"
    )


def _read_metadata(original: Callable) -> Callable:
    @wraps(original)
    def read_metadata(self: FileSystemReader, *args: Any, **kwargs: Any) -> Metadata:
        path = self._get_metadata_path(kwargs.get("rank"))
        with self.fs.create_stream(path, "rb") as file:
            try:
                metadata = safe_pickle.load(file)
            except safe_pickle.UnsafePickle as error:
                raise _refusal(path, error) from None
        if not isinstance(metadata, Metadata):
            raise UsageError(f"{path} holds no metadata of a checkpoint but a {type(metadata).__name__}")
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    return read_metadata


def _load_bytes(original: Callable) -> Callable:
    @wraps(original)
    def load_bytes(self: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            loaded = safe_pickle.torch_load(value)
            if EXTRA_STATE in name:
                # Transformer Engine unpickles it once more, with pickle's own lookup.
                safe_pickle.check_extra_state(loaded)
        except safe_pickle.UnsafePickle as error:
            stored = (self.metadata.storage_data or {}).get(read_item.storage_index)
            where = f"the checkpoint's {name}" if stored is None else f"{stored.relative_path} ({name})"
            raise _refusal(where, error) from None
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], loaded)
        else:
            self.state_dict[name] = loaded

    return load_bytes


PATCHES = (
    Patch(
        "torch.distributed.checkpoint.filesystem:FileSystemReader.read_metadata",
        _read_metadata,
        why="the metadata of a checkpoint is a pickle, which runs what it names",
        expects="(self, *args, **kwargs)",
    ),
    Patch(
        "torch.distributed.checkpoint.default_planner:DefaultLoadPlanner.load_bytes",
        _load_bytes,
        why="objects of a checkpoint are pickles, which run what they name",
        expects="(self, read_item, value)",
    ),
)
