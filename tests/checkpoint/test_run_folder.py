"""The folder of a run: one writer, a tracker that is not lost."""

import argparse
import threading
import time
from pathlib import Path

import pytest

from megatron_ksa import locks
from megatron_ksa.checkpoint import run_folder
from megatron_ksa.checkpoint.load import TRACKER
from megatron_ksa.errors import UsageError


def flags(load: Path | None = None, save: Path | None = None, rank: int = 0) -> argparse.Namespace:
    name = {"load": load and str(load), "save": save and str(save)}
    return argparse.Namespace(**name, rank=rank, enable_msc=False)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Iterations 1, 2 and an incomplete 3, without a tracker."""
    for number in (1, 2, 3):
        (tmp_path / f"iter_{number:07d}").mkdir()
    monkeypatch.setattr(run_folder, "damage", lambda path, **options: "incomplete" if path.name.endswith("3") else None)
    return tmp_path


def test_a_run_goes_on_from_its_newest_whole_iteration(folder, capsys):
    """A deleted tracker beside iterations made training start at iteration 1, over them."""
    run_folder.restore_tracker(flags(folder, folder))
    assert (folder / TRACKER).read_text() == "2"
    assert "going on from iteration 2" in capsys.readouterr().out


def test_a_tracker_that_is_no_file_is_named(folder):
    """A folder of the tracker's name: training started at iteration 1, beside iterations 1 to 3."""
    (folder / TRACKER).mkdir()
    with pytest.raises(UsageError, match=f"{TRACKER}' is no file that can be written"):
        run_folder.restore_tracker(flags(folder, folder))


def test_a_folder_that_is_only_read_is_refused(folder):
    with pytest.raises(UsageError, match=f"has iterations 3, 2, 1 but no {TRACKER}.* is the number 2"):
        run_folder.restore_tracker(flags(folder))
    assert not (folder / TRACKER).exists()


def test_a_first_save_that_was_killed_is_no_checkpoint(folder, monkeypatch, capsys):
    monkeypatch.setattr(run_folder, "damage", lambda path, **options: "incomplete")
    run_folder.restore_tracker(flags(folder, folder))
    assert "training starts anew" in capsys.readouterr().out and not (folder / TRACKER).exists()


def test_a_second_run_is_refused_and_names_the_first(tmp_path):
    """Two trainings with one --save replaced each other's checkpoints."""
    args = flags(save=tmp_path / "save")
    named = pytest.raises(UsageError, match="host .*process .*since")
    with run_folder.only_writer(args), named, run_folder.only_writer(args):
        pass
    with run_folder.only_writer(args), run_folder.only_writer(flags(save=tmp_path / "save", rank=1)):
        pass


def test_other_ranks_wait_for_the_lock(tmp_path, monkeypatch):
    """They read the tracker while the run before was still saving, and began at another iteration than the first."""
    save = tmp_path / "save"
    monkeypatch.setenv("MASTER_PORT", "1")
    first, entered = flags(save, save), []
    monkeypatch.setattr(locks, "OTHERS_LOCK_SECONDS", 0.3)

    def other() -> None:
        with run_folder.only_writer(flags(save, save, rank=1)):
            entered.append((save / "tracker").exists())

    with locks.exclusive_folder(save, "the run before"):
        monkeypatch.setenv("MASTER_PORT", "2")
        with pytest.raises(UsageError, match="held by the run before .* the first rank of this run did not take it"):
            other()
        monkeypatch.setattr(locks, "OTHERS_LOCK_SECONDS", 60)
        rank = threading.Thread(target=other)
        rank.start()
        time.sleep(0.3)
        assert not entered
        (save / "tracker").write_text("its last save")
    with run_folder.only_writer(first):
        rank.join(10)
    assert entered == [True]


def test_other_ranks_do_not_wait_for_a_lock_that_they_cannot_see(tmp_path, monkeypatch):
    """A folder of another machine's disk; and one that is not loaded from needs no lock."""
    monkeypatch.setattr(locks, "NO_LOCK_SECONDS", 0.2)
    with run_folder.only_writer(flags(tmp_path, tmp_path, rank=1)):
        pass
    with locks.exclusive_folder(tmp_path, "another"), run_folder.only_writer(flags(save=tmp_path, rank=1)):
        pass


def test_a_folder_that_cannot_be_written_is_noticed_at_start(tmp_path):
    """It was noticed at the first save."""
    (tmp_path / "file").write_text("")
    args = flags(save=tmp_path / "file/save")
    with pytest.raises(UsageError, match="cannot be written"), run_folder.only_writer(args):
        pass


def test_a_refused_command_line_leaves_no_folder(tmp_path):
    args = flags(save=tmp_path / "runs/a/save")
    with pytest.raises(UsageError, match="a mistake"), run_folder.only_writer(args):
        assert (tmp_path / "runs/a/save/run.lock").exists()
        raise UsageError("a mistake")
    assert not list(tmp_path.iterdir())
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/notes").write_text("kept")
    with pytest.raises(UsageError, match="a mistake"), run_folder.only_writer(args):
        raise UsageError("a mistake")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["notes"]
