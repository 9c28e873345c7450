"""The helper processes of a save: they end with their rank, and not on a SIGTERM to everything that the job runs.

Slurm sends the SIGTERM before a time limit to every process of a job step. A rank notes it and saves; Megatron's
helpers have no handler and die of it, and the rank's save fails with them. A synchronous save needs no helper: what its
threads have written is told within the process.
"""

import argparse
import multiprocessing
import os
import queue
import signal
import threading
from functools import cache
from multiprocessing.managers import SyncManager

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller


def install_save_helpers(args: argparse.Namespace) -> None:
    """Let saves use the queue and the worker of this module; after Megatron's validation."""
    results = _queue_of_processes if args.async_save else _queue_of_threads
    filesystem_async.get_write_results_queue = lambda mp_mode="spawn": results()
    PersistentAsyncCaller.async_loop = staticmethod(_write_saves)


@cache
def _queue_of_threads() -> queue.Queue:
    return queue.Queue()


@cache
def _queue_of_processes() -> queue.Queue:
    return _manager().Queue()


@cache
def _manager() -> SyncManager:
    # A forked one would keep the rank's connections open when the rank is killed, and its peers would not notice.
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(serve_one_rank)
    return manager


def _write_saves(*args: object) -> None:
    """Megatron's worker, which lives as long as the trainer; in a new process, where nothing is replaced."""
    serve_one_rank()
    PersistentAsyncCaller.async_loop(*args)


def serve_one_rank() -> None:
    """End this process with the one that started it, or on its SIGTERM; nobody else's SIGTERM counts."""
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
