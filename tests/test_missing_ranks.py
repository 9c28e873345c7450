"""The rank that stands still is named, not the ranks that wait for it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ksa import missing_ranks
from megatron_ksa.missing_ranks import Progress, Sign, who_is_missing
from megatron_ksa.platform.ports import free_port

ROOT = Path(__file__).parents[1]
HERE = "node1"
# Ranks that step together, each when the file of its step is there, and say who is missing when one is late.
RANK = """
import datetime, os, sys, time
import torch.distributed as dist
from megatron_ksa import missing_ranks
missing_ranks.BEAT_SECONDS, missing_ranks.ANSWER_SECONDS = 0.3, 2
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", rank=rank, world_size=world)
watch = missing_ranks.RankWatch()
watch.progress.at(7)
running = watch.running(float(sys.argv[1]))
running.__enter__()
while watch._store is None or not watch._store.check([f"signs_of_life/{each}" for each in range(world)]):
    time.sleep(0.05)
dist.barrier()
print("ready", flush=True)
sys.stdin.readline()
print(watch.missing(), flush=True)
time.sleep(60)
"""


def living(*positions: tuple[int, bool]) -> tuple[list[Sign], list[Sign]]:
    """Signs of ranks that all live, at an iteration, and waiting for data or not."""
    before = [Sign(rank, 4, *position, HERE) for rank, position in enumerate(positions)]
    return before, [Sign(rank, 5, *position, HERE) for rank, position in enumerate(positions)]


def test_a_silent_rank_is_named_before_one_that_is_behind():
    before, after = living((7, False), (6, False), (7, False))
    assert who_is_missing(before, after, 6) == "behind the others: rank 1 on host node1 (iteration 6 of 7)"
    after[2] = before[2]
    assert who_is_missing(before, after, 6) == "no sign of life in 6 s from rank 2 on host node1 (iteration 7)"
    before[0] = after[0] = Sign(0)
    assert "rank 0 (never seen), rank 2" in who_is_missing(before, after, 6)


def test_a_rank_that_waits_for_its_data_is_named():
    assert "data loader: rank 1 on host" in who_is_missing(*living((7, False), (7, True)), 6)


def test_nobody_is_named_where_each_may_wait_for_another():
    """A long save or a slow evaluation is no hang."""
    assert who_is_missing(*living((7, False), (7, False)), 6) is None


def test_many_ranks_are_counted():
    before, _ = living(*[(7, False)] * 40)
    after = [*before[:39], Sign(39, 5, 7, False, HERE)]
    assert who_is_missing(before, after, 6).endswith("and 31 more")


def test_waiting_for_a_batch_is_noted():
    progress = Progress()

    def batches():
        yield progress.reads_data
        raise ValueError

    reading = progress.reading(batches())
    progress.at(3)
    assert next(reading) and not progress.reads_data and (progress.iteration, progress.moves) == (3, 2)
    with pytest.raises(ValueError):
        next(reading)
    assert not progress.reads_data


class Ranks:
    """Processes that hold a store together."""

    def __init__(self, world: int, seconds: float, log: Path) -> None:
        port = str(free_port())
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
        self.log, self.out = log, log.open("w")
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(seconds)], env={**os.environ, **shared, "RANK": str(rank)}, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.out,
            )
            for rank in range(world)
        ]  # fmt: skip
        for process in self.processes:
            assert process.stdout.readline() == "ready\n", log.read_text()

    def __enter__(self) -> list[subprocess.Popen]:
        return self.processes

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
        self.out.close()


def asked(process: subprocess.Popen) -> str:
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline()


@pytest.mark.slow
def test_stopped_ranks_of_four_are_named(tmp_path):
    """A timeout named the rank that waited. Two of four are stopped; one line names both before any timeout."""
    ranks = Ranks(4, 6, tmp_path / "log")
    with ranks as processes:
        for stopped in (1, 3):
            processes[stopped].send_signal(signal.SIGSTOP)
        line = asked(processes[2])
        assert "no sign of life" in line and "rank 1 on" in line and "rank 3 on" in line
        assert "rank 0" not in line and "rank 2" not in line
        end = time.monotonic() + 60
        while "warning" not in ranks.log.read_text() and time.monotonic() < end:
            time.sleep(0.2)
        time.sleep(1)
        (warning,) = [line for line in ranks.log.read_text().splitlines() if line.startswith("warning: rank")]
        assert "in iteration 7; no sign of life" in warning and "rank 1 on" in warning and "rank 3 on" in warning


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGSTOP, pytest.param(signal.SIGKILL, marks=pytest.mark.long)])
def test_the_rank_that_holds_the_store(end, tmp_path):
    """Without torchrun the store is rank 0's: a rank that asks it must not wait for ever."""
    with Ranks(2, 600, tmp_path / "log") as processes:
        processes[0].send_signal(end)
        start = time.monotonic()
        line = asked(processes[1])
        assert "the ranks' store at 127.0.0.1:" in line and "does not answer" in line
        assert time.monotonic() - start < 60


def test_a_world_of_one_is_not_watched(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    watch = missing_ranks.RankWatch()
    with watch.running(1):
        assert watch.missing() is None
