"""Processes that end with the one that started them: workers of the data tools, and helpers of a rank.

Imports no Megatron: these processes need none of it.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def blocked(number: signal.Signals) -> Iterator[None]:
    """Start processes in the body: their threads have the signal blocked from the first one on, which may be numpy's.

    A signal that comes meanwhile is delivered at the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """End this process with the one that started it, which tells it nothing when it is killed."""
    threading.Thread(target=_parent_ended, daemon=True).start()


def serve_one_rank() -> None:
    """End this process with the rank that started it, or on its SIGTERM; nobody else's SIGTERM counts.

    Without `blocked(SIGTERM)` around its start, a SIGTERM still ends the process through threads of libraries.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    end_with_parent()
    threading.Thread(target=_rank_asked, daemon=True).start()


def _parent_ended() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _rank_asked() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != multiprocessing.parent_process().pid:
        pass
    os._exit(0)
