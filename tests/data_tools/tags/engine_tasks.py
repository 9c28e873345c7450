"""Functions that worker processes and Ray can import."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from megatron_ksa.errors import UsageError


def slow_square(number: int) -> int:
    """Early tasks end last."""
    time.sleep(0.02 * (3 - number % 4))
    return number**2


def die(number: int) -> int:
    """End the worker at the third task."""
    if number == 2:
        os._exit(1)
    return number


def refuse(number: int) -> int:
    """A mistake of the user's that shows in a worker."""
    raise UsageError(f"--number {number}: no")


def own_process(number: int) -> int:
    """Where the task runs; it takes a while, so that every worker has one."""
    time.sleep(0.1)
    return os.getpid()


def held(work: Path, function: Callable, task: object) -> object:
    """The function's result; once the read step has ended it waits, and writes a file `held`, until one is `released`.

    Args:
        work: the tool's work folder; both files lie beside it.
    """
    if (work / "records.jsonl").exists():
        (work.parent / "held").touch()
        while not (work.parent / "released").exists():
            time.sleep(0.01)
    return function(task)
