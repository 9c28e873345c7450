"""The trainer on two ranks, for tests that stop, kill and damage while it runs."""

import json
import os
import time
from pathlib import Path

from trainer import MODEL, TRAINING, steps, write_documents
from warm import Started

from megatron_ksa.platform.ports import free_port

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
            # A session for each rank and its helpers, so that a signal can reach all of them.
            self.ranks.append(Started(ENTRY, runs, log=self.logs[-1], environment=env))

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
