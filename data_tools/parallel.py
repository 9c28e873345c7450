"""Work on a stream of items in several processes, with results in the order of the items."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import batched

from megatron_ksa.errors import UsageError

ITEMS_PER_TASK = 64


def map_in_order[Item, Result](
    function: Callable[[tuple[Item, ...]], list[Result]],
    items: Iterable[Item],
    *,
    workers: int,
    start: Callable[..., None],
    start_arguments: tuple = (),
) -> Iterator[tuple[Item, Result]]:
    """Each item with its result; a bounded number is in flight, and one worker is this process itself.

    Args:
        function: the results of a few items, in order; importable by name.
        start: called once in every worker before its first items.

    Raises:
        UsageError: a worker died.
    """
    tasks = batched(items, ITEMS_PER_TASK)
    if workers == 1:
        start(*start_arguments)
        for task in tasks:
            yield from zip(task, function(task), strict=True)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=start, initargs=start_arguments) as pool:
        pending: deque[tuple[tuple[Item, ...], Future]] = deque()
        try:
            for task in tasks:
                pending.append((task, pool.submit(function, task)))
                if len(pending) >= 4 * workers:
                    task, future = pending.popleft()
                    yield from zip(task, future.result(), strict=True)
            for task, future in pending:
                yield from zip(task, future.result(), strict=True)
        except BrokenProcessPool:
            raise UsageError(f"--workers {workers}: a worker died, out of memory perhaps; use fewer") from None
        finally:
            pool.shutdown(cancel_futures=True)
