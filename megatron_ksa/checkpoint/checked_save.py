"""A save that fails says in one line which folder could not be written, and which checkpoint is there."""

import argparse
from collections.abc import Callable
from functools import wraps
from pathlib import Path

from megatron_ksa.checkpoint.integrity import newest_whole
from megatron_ksa.errors import RankUsageError
from megatron_ksa.files import disk_error


def checked_save(save_checkpoint: Callable, args: argparse.Namespace) -> Callable:
    """`save_checkpoint` whose errors of the disk are one line; others stay what they are.

    An asynchronous save fails in a later call, where Megatron finalises it: the iteration in its line is then that of
    the call.
    """

    @wraps(save_checkpoint)
    def save(iteration: int, *rest, **options) -> None:
        try:
            save_checkpoint(iteration, *rest, **options)
        # Megatron's CheckpointException is a BaseException.
        except BaseException as error:
            root = Path(args.save)
            reason = disk_error(error, root)
            if reason is None:
                raise
            number = newest_whole(root)
            left = (
                "no whole checkpoint is there"
                if number is None
                else (f"iteration {number} is whole and --load {root} takes it")
            )
            raise RankUsageError(f"--save {root}: iteration {iteration} cannot be written: {reason}; {left}") from None

    return save
