"""Ranks that die: the others name themselves and end, and a run that is started again loses nothing."""

import os
import random
import signal
import socket
import time

import pytest
from sessions import processes_of
from trainer import launch, selected, steps
from two_ranks import ITERATIONS, SAVING, TwoRanks

pytestmark = pytest.mark.slow


def test_survivor_of_a_killed_rank_names_itself_and_ends(tmp_path):
    run = TwoRanks(tmp_path, tmp_path / "record.json", "--train-iters 100000")
    run.until(2)
    run.ranks[1].send_signal(signal.SIGKILL)
    assert run.wait(30) == [1, -signal.SIGKILL]
    (line,) = run.errors(0)
    assert line.startswith(f"error: rank 0 of 2 on host {socket.gethostname()} failed in ")


@pytest.mark.long
def test_rank_that_hangs_is_noticed_after_the_timeout(tmp_path):
    """A stopped process keeps its connections: only the timeout of one minute tells."""
    run = TwoRanks(tmp_path, tmp_path / "record.json", "--train-iters 100000 --distributed-timeout-minutes 1")
    run.until(2)
    time.sleep(3)  # for the first sign of life; a rank stopped before it is "never seen"
    run.ranks[1].send_signal(signal.SIGSTOP)
    try:
        assert run.ranks[0].wait(100) == 1
    finally:
        run.ranks[1].kill()
        run.wait(10)
    (line,) = run.errors(0)
    assert line.startswith(f"error: rank 0 of 2 on host {socket.gethostname()} failed in ") and "imed out" in line
    assert "no sign of life in 6 s from rank 1 on host" in line


def test_rank_that_stands_still_is_named_long_before_the_timeout(tmp_path):
    """Only the rank that waited was ever named."""
    run = TwoRanks(tmp_path, tmp_path / "record.json", "--train-iters 100000 --name-missing-ranks-after 5")
    run.until(2)
    time.sleep(3)  # for the first sign of life; a rank stopped before it is "never seen"
    run.ranks[1].send_signal(signal.SIGSTOP)
    end, named = time.monotonic() + 120, []
    while not named and time.monotonic() < end:
        time.sleep(0.5)
        named = [line for line in run.logs[0].read_text().splitlines() if line.startswith("warning: rank 0 of 2 ")]
    for rank in run.ranks:
        rank.kill()
    run.wait(10)
    assert named and "no sign of life in 6 s from rank 1 on host" in named[0], run.logs[0].read_text()[-2000:]


@pytest.mark.parametrize("save", [pytest.param("", marks=pytest.mark.long), "--async-save"])
def test_sigterm_to_every_process_saves(save, tmp_path):
    """As Slurm sends it before a time limit. The process in which Megatron queues the results of a save, there from the
    first save on, died of it and the last save failed.
    """
    flags = f"--train-iters 100000 --save-interval 2 --save {tmp_path}/saved --exit-signal-handler {save}"
    run = TwoRanks(tmp_path, tmp_path / "record.json", flags)
    run.until(5)
    helpers = [process for rank in run.ranks for process in processes_of(rank.pid) if process != rank.pid]
    for rank in run.ranks:
        os.killpg(rank.pid, signal.SIGTERM)
    assert run.wait(60) == [0, 0], run.logs[1].read_text()[-3000:]
    assert int((tmp_path / "saved/latest_checkpointed_iteration.txt").read_text()) == max(steps(run.record))
    assert bool(helpers) == bool(save)


def test_helpers_of_a_killed_rank_end(tmp_path):
    """They stayed for ever, with half a gigabyte each."""
    flags = f"--train-iters 100000 --save-interval 2 --save {tmp_path}/saved --async-save"
    run = TwoRanks(tmp_path, tmp_path / "record.json", flags)
    run.until(5)
    helpers = [process for rank in run.ranks for process in processes_of(rank.pid)]
    assert len(helpers) > 2
    for rank in run.ranks:
        rank.kill()
    run.wait(10)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(processes_of(rank.pid) for rank in run.ranks):
        time.sleep(0.2)
    assert not any(processes_of(rank.pid) for rank in run.ranks)


def iterations_of(kills: int) -> int:
    """Of a run that is killed so often: it saves six times for one kill."""
    return ITERATIONS if kills > 1 else 12


@pytest.fixture(scope="module")
def undisturbed(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    iterations = max(map(iterations_of, selected(request, "kills")))
    flags = f"{SAVING} --train-iters {iterations} --save {folder}/saved"
    done = launch([(folder / "record.json", flags)], processes=2)
    assert (folder / "record.json").exists(), done.stderr[-3000:]
    return steps(folder / "record.json")


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=[pytest.mark.long, pytest.mark.timeout(1200)])])
def test_killed_at_random_and_resumed_ends_with_the_same_numbers(kills, undisturbed, tmp_path):
    """Every iteration of every attempt, those that were trained twice as well; saves are hit as often as steps."""
    moments, last = random.Random(0), iterations_of(kills)
    flags = f"{SAVING} --train-iters {last} --save {tmp_path}/saved --load {tmp_path}/saved"
    attempts = []
    for attempt in range(kills + 1):
        record = tmp_path / f"record{attempt}.json"
        run = TwoRanks(tmp_path, record, flags)
        if attempt < kills:
            run.until(moments.randint(1, last // (kills + 1)))
            time.sleep(moments.uniform(0, 0.2))
            run.ranks[moments.randrange(2)].send_signal(signal.SIGKILL)
        codes = run.wait(120)
        assert (codes == [0, 0]) == (attempt == kills), run.logs[0].read_text()[-3000:]
        attempts.append(steps(record) if record.exists() else {})
    assert max(attempts[-1]) == last
    for iterations in attempts:
        for iteration, values in iterations.items():
            assert values == pytest.approx(undisturbed[iteration], rel=1e-7), iteration
