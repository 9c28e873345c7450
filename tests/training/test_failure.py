"""Ranks that die: the others name themselves and end, and a run that is started again loses nothing."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from trainer import MODEL, TRAINING, launch, steps, write_documents

from megatron_ksa.platform.ports import free_port

pytestmark = pytest.mark.slow
ENTRY = Path(__file__).with_name("recorded_pretrain.py")
ITERATIONS = 40
SAVING = f"--train-iters {ITERATIONS} --save-interval 2 --use-distributed-optimizer"


class TwoRanks:
    """The trainer on two ranks without a launcher, which would end the second when the first dies."""

    def __init__(self, folder: Path, record: Path, flags: str) -> None:
        if not (folder / "documents.idx").exists():
            write_documents(folder / "documents")
        flags = [*MODEL, *TRAINING, "--data-path", str(folder / "documents"), *flags.split()]
        runs = folder / "runs.json"
        runs.write_text(json.dumps([{"record": str(record), "flags": flags}]))
        port = free_port()
        self.record, self.logs, self.ranks = record, [], []
        for rank in range(2):
            ids = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            env = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in ids.items()}}
            self.logs.append(folder / f"rank{rank}.log")
            with self.logs[-1].open("w") as log:
                command = [sys.executable, str(ENTRY), str(runs)]
                # A session for each rank and its helpers, so that a signal can reach all of them.
                self.ranks.append(
                    subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
                )

    def until(self, iterations: int, seconds: float = 120) -> None:
        """Wait for the record of so many iterations, or the end of the run."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.ranks[1].poll() is None:
            try:
                if len(steps(self.record)) >= iterations:
                    return
            except (FileNotFoundError, json.JSONDecodeError):
                pass
            time.sleep(0.02)
        assert self.ranks[1].poll() == 0, "".join(log.read_text()[-2000:] for log in self.logs)

    def wait(self, seconds: float) -> list[int]:
        """Exit codes; a rank that does not end in time fails the test."""
        try:
            return [rank.wait(seconds) for rank in self.ranks]
        finally:
            for rank in self.ranks:
                rank.kill()
                rank.wait()

    def errors(self, rank: int) -> list[str]:
        """The lines that begin with `error:`."""
        return [line for line in self.logs[rank].read_text().splitlines() if line.startswith("error: ")]


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
    run.ranks[1].send_signal(signal.SIGSTOP)
    try:
        assert run.ranks[0].wait(100) == 1
    finally:
        run.ranks[1].kill()
        run.wait(10)
    (line,) = run.errors(0)
    assert line.startswith(f"error: rank 0 of 2 on host {socket.gethostname()} failed in ") and "imed out" in line


def processes_of(session: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            state, _, _, of, *_ = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(of) == session and state != "Z":
            found.append(int(process))
    return found


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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    done = launch([(folder / "record.json", f"{SAVING} --save {folder}/saved")], processes=2)
    assert (folder / "record.json").exists(), done.stderr[-3000:]
    return steps(folder / "record.json")


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=[pytest.mark.long, pytest.mark.timeout(1200)])])
def test_killed_at_random_and_resumed_ends_with_the_same_numbers(kills, undisturbed, tmp_path):
    """Every iteration of every attempt, those that were trained twice as well; saves are hit as often as steps."""
    moments = random.Random(0)
    flags = f"{SAVING} --save {tmp_path}/saved --load {tmp_path}/saved"
    attempts = []
    for attempt in range(kills + 1):
        record = tmp_path / f"record{attempt}.json"
        run = TwoRanks(tmp_path, record, flags)
        if attempt < kills:
            run.until(moments.randint(1, ITERATIONS // (kills + 1)))
            time.sleep(moments.uniform(0, 0.2))
            run.ranks[moments.randrange(2)].send_signal(signal.SIGKILL)
        codes = run.wait(120)
        assert (codes == [0, 0]) == (attempt == kills), run.logs[0].read_text()[-3000:]
        attempts.append(steps(record) if record.exists() else {})
    assert max(attempts[-1]) == ITERATIONS
    for iterations in attempts:
        for iteration, values in iterations.items():
            assert values == pytest.approx(undisturbed[iteration], rel=1e-7), iteration
