"""A save that fails says in one line which folder could not be written, and which checkpoint is there."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

from megatron_ksa.checkpoint.integrity import newest_whole
from megatron_ksa.errors import RankUsageError
from megatron_ksa.files import disk_error


@contextmanager
def _disk_named(args: argparse.Namespace, what: str) -> Iterator[None]:
    try:
        yield
    # Megatron's CheckpointException is a BaseException.
    except BaseException as error:
        root = Path(args.save) if args.save else None
        reason = None if root is None else disk_error(error, root)
        if reason is None:
            raise
        number = newest_whole(root)
        left = (
            "no whole checkpoint is there"
            if number is None
            else (f"iteration {number} is whole and --load {root} takes it")
        )
        raise RankUsageError(f"--save {root}: {what} cannot be written: {reason}; {left}") from None


def checked_save(save_checkpoint: Callable, args: argparse.Namespace) -> Callable:
    """`save_checkpoint` whose errors of the disk are one line; others stay what they are."""

    @wraps(save_checkpoint)
    def save(iteration: int, *rest, **options) -> None:
        if args.save is None:
            # Megatron saves where a result is not finite, whatever the flags say, and failed at the missing path.
            print(f"iteration {iteration}: the trainer ends here; nothing is kept, --save is not given", flush=True)
            return
        with _disk_named(args, f"iteration {iteration}"):
            save_checkpoint(iteration, *rest, **options)

    return save


def checked_finalize(finalize: Callable, args: argparse.Namespace) -> Callable:
    """`maybe_finalize_async_save`, where an asynchronous save fails, in the same way."""

    @wraps(finalize)
    def checked(*rest, **options) -> None:
        with _disk_named(args, "an asynchronous save"):
            finalize(*rest, **options)

    return checked
