"""A full disk during a save is one line that says which checkpoint is left."""

import argparse
import errno
import os

import pytest
from torch.distributed.checkpoint.api import CheckpointException

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


def test_without_a_folder_nothing_is_saved(capsys):
    """Where the loss was not finite Megatron saved, without --save too, and the run ended in a TypeError of a path."""
    checked_save(failing(ZeroDivisionError()), argparse.Namespace(save=None))(7)
    assert "iteration 7: the trainer ends here; nothing is kept, --save is not given" in capsys.readouterr().out
