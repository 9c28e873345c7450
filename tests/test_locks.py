"""Locks: the second run is refused in one line that names the first; the lock of a dead run blocks nobody."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_ksa import locks
from megatron_ksa.errors import UsageError
from megatron_ksa.locks import exclusive, exclusive_folder

ROOT = Path(__file__).parents[1]


@pytest.fixture
def quick(monkeypatch):
    """Seconds as hundredths, so that a silent holder is found dead within a test."""
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(locks, "SILENT_SECONDS", 0.6)
    monkeypatch.setattr(locks, "_POLL_SECONDS", 0.02)


def write_lock(path: Path, **changes: object) -> locks.Holder:
    """The lock of a run that is not this process, by default of a process of this machine that is gone."""
    holder = replace(locks._this_run("tools/first.py"), **{"pid": 1 << 22, "started": 5, "token": "f" * 32, **changes})
    path.write_text(json.dumps(asdict(holder)))
    return holder


ELSEWHERE = {"host": "node17", "machine": "another/1"}


def test_second_run_is_refused_and_the_first_one_named(tmp_path, monkeypatch):
    """Two runs with one output: the second overwrote the first's files, and both could end with exit code 0."""
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with exclusive(tmp_path / "out", "tools/first.py"):
        with pytest.raises(UsageError) as refused, exclusive(tmp_path / "out", "tools/second.py"):
            pytest.fail("two holders")
        line = str(refused.value)
        for part in ("out is being written by tools/first.py", f"process {os.getpid()}", "Slurm job 4711", "since 20"):
            assert part in line and "\n" not in line
        with exclusive(tmp_path / "other", "tools/second.py"), exclusive_folder(tmp_path / "work", "tools/second.py"):
            assert (tmp_path / "work" / "run.lock").exists()
    with exclusive(tmp_path / "out", "tools/second.py"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["work"] and not list((tmp_path / "work").iterdir())


def test_lock_is_given_back_when_the_body_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), exclusive(tmp_path / "out", "a"):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


HOLD = (
    "import sys, time; from megatron_ksa.locks import exclusive\n"
    "with exclusive(sys.argv[1], 'tools/first.py'):\n    print('held', flush=True); time.sleep(60)"
)


def test_lock_of_a_killed_run_is_taken_over(tmp_path, capfd):
    """A run killed with -9 leaves its lock; the same command again must work at once."""
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert first.stdout.readline() == b"held\n"
    with pytest.raises(UsageError, match=f"tools/first.py .*process {first.pid}"), exclusive(tmp_path / "out", "b"):
        pytest.fail("two holders")
    first.send_signal(signal.SIGKILL)
    # Not waited for: a process that has ended but is not collected is dead as well.
    while locks._started(first.pid) is not None:
        time.sleep(0.01)
    with exclusive(tmp_path / "out", "b"):
        assert "taking over from a run that is gone, tools/first.py" in capfd.readouterr().err
    first.wait()
    assert not list(tmp_path.iterdir())


def test_process_id_that_another_process_has_now_is_no_holder(tmp_path):
    """Process ids are used again, in containers nearly always: the start time tells them apart."""
    write_lock(tmp_path / "out.lock", pid=os.getpid())
    with exclusive(tmp_path / "out", "b"):
        pass


def test_requeued_job_takes_its_lock_on_another_host(tmp_path, monkeypatch):
    """Slurm requeues a job elsewhere when its node dies: the same job id with another restart count is its past."""
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    write_lock(tmp_path / "out.lock", **ELSEWHERE, job="4711", restart="")
    start = time.monotonic()
    with exclusive(tmp_path / "out", "b"):
        assert time.monotonic() - start < 5


@pytest.mark.parametrize("job", ["", "4711"])
def test_silent_holder_on_another_host_is_dead_and_one_that_touches_its_lock_is_not(job, quick, tmp_path, monkeypatch):
    """Processes elsewhere, and other steps of one job, are judged by the touches of their lock alone."""
    monkeypatch.setenv("SLURM_JOB_ID", job)
    lock = tmp_path / "out.lock"
    write_lock(lock, **ELSEWHERE, job=job)
    os.utime(lock, (0, 0))  # how long ago by whose clock ever
    with exclusive(tmp_path / "out", "b"):
        pass
    holder, end = write_lock(lock, **ELSEWHERE, job=job), threading.Event()

    def beat() -> None:
        while not end.wait(0.05):
            os.utime(lock)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UsageError, match="tools/first.py .host node17"), exclusive(tmp_path / "out", "b"):
            pytest.fail("two holders")
    finally:
        end.set()
        thread.join()
    assert json.loads(lock.read_text())["token"] == holder.token


def test_run_that_waits_takes_the_lock_that_is_given_back(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "SILENT_SECONDS", 30)
    write_lock(tmp_path / "out.lock", **ELSEWHERE)
    threading.Timer(0.2, (tmp_path / "out.lock").unlink).start()
    with exclusive(tmp_path / "out", "b"):
        pass


@pytest.mark.parametrize("content", ["", "{", '{"pid": 1}', "[1]"])
def test_lock_that_says_nothing_is_watched(content, quick, tmp_path):
    """A file without content is what a full disk or another program leaves."""
    (tmp_path / "out.lock").write_text(content)
    with exclusive(tmp_path / "out", "b"):
        pass
    assert not list(tmp_path.iterdir())


def test_holder_touches_its_lock_and_notices_its_loss(quick, tmp_path):
    lock = tmp_path / "out.lock"
    with (
        pytest.raises(UsageError, match="lost its lock to tools/first.py .host node17"),
        exclusive(tmp_path / "out", "b") as held,
    ):
        held.check()
        os.utime(lock, (0, 0))
        while lock.stat().st_mtime == 0:
            time.sleep(0.01)
        write_lock(lock, **ELSEWHERE)
        held.check()
    assert lock.exists()  # it is another run's now


@pytest.mark.parametrize("links", [True, False])
def test_takers_of_a_dead_lock_exclude_each_other(links, tmp_path, monkeypatch):
    """Several runs find the same dead holder at once, some die as they take over: one at a time holds the lock.

    Each adds to a file without any protection but the lock; what is lost was written by two at once.
    """
    if not links:

        def link(*_: object) -> None:
            raise OSError(locks.errno.EPERM, "no links on this file system")

        monkeypatch.setattr(os, "link", link)
    (tmp_path / "count").write_text("0")
    write_lock(tmp_path / "out.lock")
    write_lock(tmp_path / f"out.lock.{'f' * 32}.next", token="e" * 32)  # died while it took over
    context = multiprocessing.get_context("fork")
    takers = [context.Process(target=_add, args=(tmp_path,)) for _ in range(4)]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join(60)
        assert taker.exitcode == 0
    assert (tmp_path / "count").read_text() == "40"
    assert [path.name for path in tmp_path.iterdir()] == ["count"]


def _add(folder: Path) -> None:
    done = 0
    while done < 10:
        try:
            with exclusive(folder / "out", "taker"):
                count = int((folder / "count").read_text())
                time.sleep(0.002)
                (folder / "count").write_text(str(count + 1))
                done += 1
                if done == 5:  # as if killed: the lock stays, and its process ends
                    write_lock(folder / "out.lock")
        except UsageError:
            time.sleep(0.001)


def test_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written: "), exclusive(tmp_path / "file" / "out", "b"):
        pytest.fail("held")
