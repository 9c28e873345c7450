"""The helper processes of a save: they end with their rank, and not on a SIGTERM to everything that the job runs.

Slurm sends the SIGTERM before a time limit to every process of a job step. A rank notes it and saves; Megatron's
helpers have no handler and die of it, and the rank's save fails with them. A synchronous save needs no helper: what its
threads have written is told within the process.
"""

import multiprocessing
import queue
import signal
from collections.abc import Callable
from functools import cache, wraps
from multiprocessing.managers import SyncManager

from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

from megatron_ksa.child_processes import blocked, serve_one_rank
from megatron_ksa.upstream import checkpoint_sums
from megatron_ksa.upstream.patches import Patch, apply_for_good


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
    with blocked(signal.SIGTERM):
        manager.start(serve_one_rank)
    return manager


def _write_saves(*args: object) -> None:
    """Megatron's worker, which lives as long as the trainer; in a new process, where nothing is replaced."""
    serve_one_rank()
    apply_for_good(checkpoint_sums.patches(contents=True))
    PersistentAsyncCaller.async_loop(*args)


def _own_queue(original: Callable, async_save: bool) -> Callable:
    results = _queue_of_processes if async_save else _queue_of_threads

    @wraps(original)
    def get_write_results_queue(mp_mode: str = "spawn") -> queue.Queue:
        return results()

    return get_write_results_queue


def _start_blocked(original: Callable) -> Callable:
    @wraps(original)
    def schedule_async_call(self: object, async_req: object) -> None:
        with blocked(signal.SIGTERM):
            original(self, async_req)

    return schedule_async_call


PATCHES = (
    # `given(async_save)`: whether saves are asynchronous, after Megatron's validation.
    Patch(
        "megatron.core.dist_checkpointing.strategies.filesystem_async:get_write_results_queue",
        _own_queue,
        why="the process that queues the results of saves dies of a SIGTERM to the job, and outlives a killed rank",
        expects="(mp_mode='spawn')",
    ),
    # Not a wrapper: it is handed to another process, which imports it by its name.
    Patch(
        "megatron.core.dist_checkpointing.strategies.async_utils:PersistentAsyncCaller.async_loop",
        lambda original: _write_saves,
        why="the process that writes asynchronous saves dies of a SIGTERM to the job, and outlives a killed rank",
        expects="(rank, queue, preload_q, comp_q, log_level=20, cpu_priority=10, io_priority=None)",
    ),
    Patch(
        "megatron.core.dist_checkpointing.strategies.async_utils:PersistentAsyncCaller.schedule_async_call",
        _start_blocked,
        why="the first call starts the process that writes, and numpy's threads there would take a SIGTERM",
        expects="(self, async_req)",
    ),
)


def patches(async_save: bool) -> tuple[Patch, ...]:
    """The queue and the worker of saves."""
    results, *worker = PATCHES
    return results.given(async_save), *worker
