"""The extra state of Transformer Engine's layers in checkpoints: FP8's scales, where a recipe keeps some."""

import contextlib
import os
from collections.abc import Iterator

from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from torch.distributed.checkpoint import FileSystemReader

# Without it Transformer Engine refuses a state that is a pickle, as that of delayed scaling is.
ALLOWED = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
SUFFIX = "_extra_state"


def stored_objects(folder: str) -> set[str]:
    """Names of what a distributed checkpoint holds, tensors and objects."""
    return set(FileSystemReader(folder).read_metadata().state_dict_metadata)


def without_missing(state: ShardedStateDict, stored: set[str]) -> ShardedStateDict:
    """A model's state without the extra states that a checkpoint of other layers lacks: they start as new ones do."""
    return {
        name: value for name, value in state.items()
        if not (isinstance(value, ShardedObject) and name.endswith(SUFFIX) and value.unique_key not in stored)
    }  # fmt: skip


@contextlib.contextmanager
def read_by_transformer_engine() -> Iterator[None]:
    """Let Transformer Engine unpickle extra states of distributed checkpoints, for as long as one is loaded.

    Their pickles have been looked through before (`upstream.checkpoint_pickle`), or their writer is trusted
    (`--trust-checkpoint`).
    """
    before = os.environ.get(ALLOWED)
    os.environ[ALLOWED] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[ALLOWED]
        else:
            os.environ[ALLOWED] = before
