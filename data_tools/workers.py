"""Pools of worker processes: forks of one process that has imported what they need, and that end with their parent."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

from megatron_ksa.child_processes import blocked, end_with_parent

TASKS_IN_FLIGHT = 4


def start_pool(
    workers: int, preload: Sequence[str], initializer: Callable | None = None, arguments: tuple = ()
) -> ProcessPoolExecutor:
    """A pool whose workers start with the first tasks; they end with this process, however it ends.

    Args:
        workers: processes at most.
        preload: modules that the process whose forks workers are imports first. It is one for all pools of this
            process, and imports what the first pool asks for.
        initializer: called in every worker with `arguments`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(initializer, arguments))


def results_in_order[Task, Result](
    pool: ProcessPoolExecutor, function: Callable[[Task], Result], tasks: Iterable[Task], in_flight: int
) -> Iterator[Result]:
    """Results in the order of the tasks, of which so many are in memory at a time.

    Raises:
        BrokenProcessPool: a worker died.
    """
    pending: deque = deque()
    try:
        for task in tasks:
            # It may start a worker, which never sees a Ctrl-C then and ends with this process instead.
            with blocked(signal.SIGINT):
                pending.append(pool.submit(function, task))
            if len(pending) >= in_flight:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def _start_worker(initializer: Callable | None, arguments: tuple) -> None:
    end_with_parent()
    if initializer is not None:
        initializer(*arguments)
