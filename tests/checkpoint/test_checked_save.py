"""A full disk during a save is one line that says which checkpoint is left."""

import argparse
import errno
import os
import resource
from contextlib import contextmanager

import pytest
from torch.distributed.checkpoint.api import CheckpointException
from trainer import launch

from megatron_ksa.checkpoint.checked_save import checked_save
from megatron_ksa.errors import UsageError


def failing(error: BaseException):
    def save_checkpoint(iteration: int) -> None:
        raise error

    return save_checkpoint


@pytest.mark.parametrize("wrap", [lambda error: error, lambda error: CheckpointException("save", {0: (error, None)})])
def test_errors_of_the_disk_are_one_line(wrap, tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "iter_0000007/__0_0.distcp"))
    save = checked_save(failing(wrap(full)), argparse.Namespace(save=str(tmp_path)))
    with pytest.raises(UsageError, match="iteration 7 cannot be written: No space left.*no whole checkpoint is there"):
        save(7)


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(ZeroDivisionError):
        checked_save(failing(ZeroDivisionError()), argparse.Namespace(save=str(tmp_path)))(7)


@contextmanager
def files_of_at_most(size: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_trainer_ends_in_one_line(tmp_path):
    """The first checkpoint is whole; the second does not fit."""
    flags = f"--save {tmp_path / 'save'} --save-interval 1 --load {tmp_path / 'save'} "
    flags += "--override-opt-param-scheduler --train-iters"
    assert launch([(tmp_path / "record.json", f"{flags} 1")], 1).returncode == 0
    with files_of_at_most(500_000):
        done = launch([(tmp_path / "record2.json", f"{flags} 2")], 1, entry="counted_pretrain.py")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(errors) == 1, done.stderr
    assert "iteration 2 cannot be written: File too large; iteration 1 is whole" in errors[0]
