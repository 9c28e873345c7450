"""Ranks end with their launcher: a torchrun that is killed outright cannot end them."""

import os
import sys
import threading
import time

POLL_SECONDS = 1.0


def end_with_launcher() -> None:
    """Watch, under torchrun, the process that started this one; end at once when it is gone.

    A process that a shell started, or Slurm's `srun`, is left alone: shells end before their background jobs, and Slurm
    ends the ranks of a step itself.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    threading.Thread(target=_watch, args=(os.getppid(),), name="launcher watch", daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(POLL_SECONDS)
    rank = os.environ.get("RANK", "0")
    print(f"error: rank {rank} ends: its launcher, process {launcher}, is gone", file=sys.stderr, flush=True)
    os._exit(1)
