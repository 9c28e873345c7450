"""Helper processes of a rank: they end with it, or on its SIGTERM, and on nobody else's.

Imports no Megatron: the process that queues the results of a save needs none of it.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def sigterm_blocked() -> Iterator[None]:
    """Start helpers in the body: their threads have SIGTERM blocked from the first one on, which may be numpy's.

    A SIGTERM that comes meanwhile is delivered at the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve_one_rank() -> None:
    """End this process with the one that started it, or on its SIGTERM; nobody else's SIGTERM counts.

    Without `sigterm_blocked` around its start, a SIGTERM still ends the process through threads that libraries started.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    for ends in (_rank_ended, _rank_asked):
        threading.Thread(target=ends, daemon=True).start()


def _rank_ended() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _rank_asked() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != multiprocessing.parent_process().pid:
        pass
    os._exit(0)
