"""Experiments made of the repository's own commands: side by side on the GPUs at hand, resumable.

An experiment trains and scores many small models. Each command runs in a process of its own with its output in a log;
what a folder already holds is not done again. Results go to a file as `megatron_ksa/results.py` writes it.
"""

import os
import queue
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ksa.errors import UsageError
from megatron_ksa.files import writing

TRACKER = "latest_checkpointed_iteration.txt"


@dataclass
class Runs:
    """Runs commands of a repository, at most `jobs` on each GPU at a time.

    Attributes:
        root: the repository.
        jobs: commands at a time on a GPU, or on the CPU where there is none.
        at_a_time: commands that run side by side on all GPUs together.
    """

    root: Path
    jobs: int
    at_a_time: int = field(init=False)
    start: float = field(default_factory=time.monotonic)
    _slots: queue.Queue = field(init=False, repr=False)
    _threads: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        import torch

        devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else [None]
        slots = [device for _ in range(self.jobs) for device in devices]
        self._slots = queue.Queue()
        for device in slots:
            self._slots.put(device)
        self.at_a_time = len(slots)
        self._threads = max((os.cpu_count() or 1) // len(slots), 1)

    def call(self, log: Path, *words: object) -> None:
        """Run a Python program of the repository on a free GPU, with its output in a file.

        Raises:
            UsageError: it failed; the message names the log and its last lines.
        """
        with writing(log):
            log.parent.mkdir(parents=True, exist_ok=True)
        device = self._slots.get()
        try:
            environment = {"OMP_NUM_THREADS": str(self._threads), **os.environ}
            if device is not None:
                environment["CUDA_VISIBLE_DEVICES"] = str(device)
            with writing(log), open(log, "a", encoding="utf-8") as out:
                command = [sys.executable, *map(str, words)]
                done = subprocess.run(command, cwd=self.root, stdout=out, stderr=out, env=environment, check=False)
        finally:
            self._slots.put(device)
        if done.returncode:
            tail = log.read_text(encoding="utf-8", errors="replace")[-600:]
            raise UsageError(f"{words[0]} ended with exit code {done.returncode}: {log}: {tail}")

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def tell(self, what: str) -> None:
        """A line of progress with the seconds since the start."""
        print(f"{self.seconds:6.0f} s  {what}", flush=True)


def iterations_done(checkpoint: Path) -> int:
    """Iterations of the newest checkpoint in a folder, 0 without one."""
    tracker = checkpoint / TRACKER
    return int(tracker.read_text(encoding="utf-8")) if tracker.exists() else 0
