"""A distributed checkpoint as layer specs write it that keep norms apart from the linear layers behind them."""

import pickle
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_ksa.checkpoint.norm_names import other_name
from megatron_ksa.upstream.checkpoint_sums import store_common


def rename_norms(iteration: Path) -> list[str]:
    """Give the norms in an iteration's folder their other names; return these."""
    metadata = FileSystemReader(iteration).read_metadata()
    tensors = {key for key, kind in metadata.state_dict_metadata.items() if isinstance(kind, TensorStorageMetadata)}
    names = {key: other_name(key) for key in tensors if other_name(key) is not None}

    def renamed(index: MetadataIndex) -> MetadataIndex:
        return MetadataIndex(names.get(index.fqn, index.fqn), index.offset, index.index)

    metadata.state_dict_metadata = {names.get(key, key): kind for key, kind in metadata.state_dict_metadata.items()}
    metadata.storage_data = {renamed(index): place for index, place in metadata.storage_data.items()}
    (iteration / ".metadata").write_bytes(pickle.dumps(metadata))
    store_common(iteration, contents=True)
    return sorted(names.values())
