"""Where steps that handle each record by itself run: this process, worker processes, or Ray; in order either way."""

import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, TypeVar

from megatron_ksa.data_tools.workers import TASKS_IN_FLIGHT, results_in_order, start_pool
from megatron_ksa.errors import UsageError

Task = TypeVar("Task")
Result = TypeVar("Result")

ENGINES = ("local", "ray")
# The module that imports every step's: importing takes 2.5 s of processor time.
STEPS = "megatron_ksa.data_tools.tags.pipeline"
# A pickled function of so many bytes goes with each task to workers that stay; a larger one has workers of its own.
SMALL_FUNCTION = 64 * 1024


class Engine:
    """Runs a function over tasks and gives the results in the order of the tasks, with few tasks in memory at a time.

    Args:
        kind: `local` or `ray`. Ray uses the cluster that `RAY_ADDRESS` names, or starts one on this machine.
        workers: local processes; 1 works in this one. Ray takes as many tasks at a time.

    Raises:
        UsageError: an engine that is unknown or not installed.
    """

    def __init__(self, kind: str = "local", workers: int = 1) -> None:
        if kind not in ENGINES:
            raise UsageError(f"--engine {kind}: not one of {', '.join(ENGINES)}")
        if workers < 1:
            raise UsageError(f"--workers {workers}: at least 1")
        self.kind, self.workers = kind, workers
        self._pool: ProcessPoolExecutor | None = None
        if kind == "ray":
            try:
                import ray
            except ModuleNotFoundError:
                raise UsageError("--engine ray needs a package: pip install ray") from None
            if not ray.is_initialized():
                ray.init(log_to_driver=False, include_dashboard=False)

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Results of a function that can be pickled, in order of the tasks."""
        if self.kind == "ray":
            return self._on_ray(function, tasks)
        if self.workers == 1:
            return map(function, tasks)
        return self._in_processes(function, tasks)

    def close(self) -> None:
        """End the processes that wait for more work; the next `map` starts others."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _in_processes(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        pickled = pickle.dumps(function)
        call: Callable[[Task], Any]
        if len(pickled) <= SMALL_FUNCTION:
            if self._pool is None:
                self._pool = start_pool(self.workers, [STEPS])
            pool, call = self._pool, partial(_run_pickled, pickled)
        else:
            # Sent to every worker once, not with every task.
            pool, call = start_pool(self.workers, [STEPS], _start_worker_for, (pickled,)), _run
        try:
            yield from results_in_order(pool, call, tasks, TASKS_IN_FLIGHT * self.workers)
        except BrokenProcessPool:
            self._pool = None
            raise UsageError(f"--workers {self.workers}: a worker died, out of memory perhaps; use fewer") from None
        finally:
            if pool is not self._pool:
                pool.shutdown(cancel_futures=True)

    def _on_ray(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        import ray

        shared = ray.put(function)
        call = ray.remote(_call)
        limit = TASKS_IN_FLIGHT * max(self.workers, int(ray.cluster_resources().get("CPU", 1)))
        pending: deque = deque()
        try:
            for task in tasks:
                pending.append(call.remote(shared, task))
                if len(pending) >= limit:
                    yield ray.get(pending.popleft())
            while pending:
                yield ray.get(pending.popleft())
        except ray.exceptions.RayTaskError as error:
            # Ray wraps what a task raised together with its traceback.
            raise error.cause from None
        except ray.exceptions.RayError as error:
            raise UsageError(
                f"--engine ray: a worker or the cluster failed ({type(error).__name__}); run again"
            ) from None


_function: Callable | None = None


def _start_worker_for(pickled: bytes) -> None:
    global _function
    _function = pickle.loads(pickled)


def _run(task: object) -> Any:
    return _function(task)


def _run_pickled(pickled: bytes, task: object) -> Any:
    return pickle.loads(pickled)(task)


def _call(function: Callable, task: object) -> object:
    return function(task)
