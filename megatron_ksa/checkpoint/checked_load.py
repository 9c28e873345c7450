"""A checkpoint is compared with what was written while Megatron loads it, and a failed load names the damaged file."""

import argparse
import os
import pickle
import socket
from collections.abc import Callable
from functools import wraps

import torch.distributed as dist
from megatron.core.dist_checkpointing import check_is_distributed_checkpoint
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ksa.checkpoint.integrity import damage, way_out
from megatron_ksa.checkpoint.load import StoredCheckpoint
from megatron_ksa.checkpoint.model_sizes import is_by_order
from megatron_ksa.checkpoint.streaming import cause
from megatron_ksa.checkpoint.to_load import checkpoint_to_load
from megatron_ksa.config.settings import RunSettings
from megatron_ksa.errors import RankUsageError, UsageError

# What torch raises for files that cannot be read, whatever their records say.
UNREADABLE = (CheckpointException, pickle.UnpicklingError, EOFError)
# What torch and Megatron raise for files that are not as they were written, and for much else.
DAMAGED = (
    CheckpointException,
    CheckpointingException,
    pickle.UnpicklingError,
    OSError,
    EOFError,
    RuntimeError,
    KeyError,
    ValueError,
    AttributeError,
    TypeError,
    AssertionError,
)

# In the keys of the distributed optimizer's state where it is stored bucket by bucket.
BUCKET = "optimizer.distributed.dp_group_idx_"
OTHER_BUCKETS = (
    "the distributed optimizer's state is stored by buckets of the gradient buffer, and those of this run are others: "
    "give the checkpoint's --ddp-bucket-size, --overlap-grad-reduce, data-parallel, expert-parallel and "
    "virtual-pipeline sizes (none of them matters with --dist-ckpt-optim-fully-reshardable), or --no-load-optim"
)


def checked_load(load_checkpoint: Callable, args: argparse.Namespace, settings: RunSettings) -> Callable:
    """`load_checkpoint` after a check of the files' sizes, each rank of its share of them."""

    @wraps(load_checkpoint)
    def load(*rest, **options) -> tuple[int, int]:
        stored = checkpoint_to_load(args)
        if stored is None or not check_is_distributed_checkpoint(str(stored.folder)):
            return load_checkpoint(*rest, **options)
        _check_sizes_of_model(stored, args)
        share = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        sums = settings.checkpoint.content_sums
        # Tensors and objects are compared as they are read (upstream.checkpoint_comparison).
        problem = damage(stored.folder, contents=sums, items=False, share=share)
        if problem := _of_any_rank(problem):
            raise UsageError(_line(stored, problem))
        try:
            return load_checkpoint(*rest, **options)
        except UsageError:
            raise
        except DAMAGED as error:
            if BUCKET in str(error) and is_by_order(vars(stored.args)) and not _said_by_the_reader(error):
                raise RankUsageError(f"--load {stored.folder.parent}: {OTHER_BUCKETS}") from None
            problem = _said_by_the_reader(error) or damage(stored.folder, contents=sums)
            if problem is None and not isinstance(error, UNREADABLE):
                raise
            raise RankUsageError(_line(stored, problem or _first_line(error))) from None

    return load


def _line(stored: StoredCheckpoint, problem: str) -> str:
    return f"--load {stored.folder.parent}: {problem}; {way_out(stored.folder)}"


def _said_by_the_reader(error: BaseException) -> str | None:
    """What a rank's reader found of damage."""
    first = cause(error) if isinstance(error, CheckpointException) else error
    return str(first) if isinstance(first, UsageError) else None


def _first_line(error: BaseException) -> str:
    """What went wrong on this rank, without the tracebacks that torch puts into its message."""
    if isinstance(error, CheckpointException):
        error = cause(error)
    text = (str(error).strip().splitlines() or [""])[0]
    return f"rank {os.environ.get('RANK', '0')} on host {socket.gethostname()}: {type(error).__name__}: {text}"


def _of_any_rank(problem: str | None) -> str | None:
    """The problem of the first rank that has one, or None, on every rank: all ranks stop for the same reason."""
    if not dist.is_initialized():
        return problem
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, problem)
    return next(filter(None, found), None)


def _check_sizes_of_model(stored: StoredCheckpoint, args: argparse.Namespace) -> None:
    """Compare the embedding's rows, which only a built tokenizer tells.

    Raises:
        UsageError: another tokenizer or vocabulary than the checkpoint's.
    """
    saved, given = getattr(stored.args, "padded_vocab_size", None), args.padded_vocab_size
    if saved is not None and given is not None and saved != given:
        raise UsageError(
            f"--vocab-size or the tokenizer: the checkpoint {stored.folder} was written with {saved:,} rows of the "
            f"embedding, the flags say {given:,}: give the checkpoint's tokenizer"
        )
