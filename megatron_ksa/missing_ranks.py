"""Which ranks the others wait for: every rank tells, through the ranks' store, that it lives and what it does.

A rank that waits in a collective knows only that it waits. Its timeout names it, not the rank that stands still. Here a
thread of each rank sets a count and the rank's position in the store once a second. A rank whose count stands still is
stopped, dead or cut off; one that lives but has not come as far as the others holds them up.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

BEAT_SECONDS = 1.0
RANKS_A_BEAT = 1000
# So many beats must pass without a sign of life; a thread can wait that long for a busy processor.
SILENT_BEATS = 6
# The store's own answer; a store whose process is stopped gives none.
ANSWER_SECONDS = 10.0
_KEY = "signs_of_life"


@dataclass
class Progress:
    """Where this rank's main thread is.

    Attributes:
        iteration: of training, the one that runs.
        reads_data: it waits for its data loader, not for other ranks.
        moves: grows with every change.
    """

    iteration: int = 0
    reads_data: bool = False
    moves: int = 0

    def at(self, iteration: int) -> None:
        """A micro-batch of an iteration begins."""
        self.iteration, self.moves = iteration, self.moves + 1

    def reading(self, batches: Iterator) -> Iterator:
        """The batches, with a note for as long as one is waited for."""
        return _Reading(self, batches)


class _Reading:
    def __init__(self, progress: Progress, batches: Iterator) -> None:
        self._progress, self._batches = progress, batches

    def __iter__(self) -> "_Reading":
        return self

    def __next__(self) -> Any:
        self._progress.reads_data = True
        try:
            return next(self._batches)
        finally:
            self._progress.reads_data, self._progress.moves = False, self._progress.moves + 1


@dataclass(frozen=True)
class Sign:
    """What a rank last said of itself; without a host, it never said anything."""

    rank: int
    beat: int = -1
    iteration: int = 0
    reads_data: bool = False
    host: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank}" + (f" on host {self.host}" if self.host else "")


def who_is_missing(before: list[Sign], after: list[Sign], seconds: float) -> str | None:
    """A clause that names the ranks which the others wait for, or None where each could be waiting for another.

    Args:
        before, after: the signs of all ranks, `seconds` apart.
    """
    silent = [new for old, new in zip(before, after, strict=True) if new.beat == old.beat]
    alive = [new for old, new in zip(before, after, strict=True) if new.beat != old.beat]
    if silent:
        said = [f"{each} (iteration {each.iteration})" if each.host else f"{each} (never seen)" for each in silent]
        return f"no sign of life in {seconds:.0f} s from {_listed(said)}"
    furthest = max(each.iteration for each in alive)
    if behind := [each for each in alive if each.iteration < furthest]:
        said = [f"{each} (iteration {each.iteration} of {furthest})" for each in behind]
        return f"behind the others: {_listed(said)}"
    if reading := [each for each in alive if each.reads_data]:
        return f"waiting for their data loader: {_listed([str(each) for each in reading])}"
    return None


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class RankWatch:
    """Tells the others that this rank lives, and names those that are missing where nothing moves.

    Attributes:
        progress: to be told by the training step.
    """

    def __init__(self) -> None:
        self.progress = Progress()
        self._rank, self._world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        # A connection for looking; the thread that gives signs has its own.
        self._store: Any = None
        # One process answers all ranks: the more ranks there are, the more seconds lie between a rank's signs.
        self._beat = BEAT_SECONDS * max(1.0, self._world / RANKS_A_BEAT)
        self._end = threading.Event()

    @contextlib.contextmanager
    def running(self, seconds: float) -> Iterator[None]:
        """Give signs of life during the body, in a thread; the store is there when the process group is.

        Args:
            seconds: without a step, after which the missing ranks are named on stderr.
        """
        if self._world == 1:
            yield
            return
        thread = threading.Thread(target=self._run, args=(seconds,), name="signs of life", daemon=True)
        thread.start()
        failed = False
        try:
            yield
        except Exception:
            # Ranks that fail look who is missing, for seconds: this one is not.
            failed = True
            raise
        finally:
            if not failed:
                self._end.set()
                # A thread that is inside the store's client when the interpreter ends takes the process down.
                thread.join(ANSWER_SECONDS)

    def _run(self, seconds: float) -> None:
        store = _default_store(self._end)
        if store is None:
            return
        store, self._store = _own_connection(store), _own_connection(store)
        beat, moves, since, told = 0, -1, time.monotonic(), False
        while store is not None:
            beat += 1
            try:
                store.set(f"{_KEY}/{self._rank}", json.dumps([beat, *self._position()]))
            except RuntimeError:  # its process is gone or does not answer
                store = None
            if moves != self.progress.moves:
                moves, since, told = self.progress.moves, time.monotonic(), False
            elif not told and time.monotonic() - since > seconds:
                told = True
                # Signs go on while it looks.
                threading.Thread(target=self._tell, args=(since,), name="missing ranks", daemon=True).start()
            if self._end.wait(self._beat):
                return

    def _position(self) -> tuple[int, bool, str]:
        return self.progress.iteration, self.progress.reads_data, socket.gethostname()

    def _tell(self, since: float) -> None:
        """One line, of the rank that is the first to miss the others in this iteration."""
        asked = _within(ANSWER_SECONDS, lambda: self._store.add(f"{_KEY}/told/{self.progress.iteration}", 1))
        if asked is not None and asked != 1:
            return
        if clause := self.missing():
            where = f"rank {self._rank} of {self._world} on host {socket.gethostname()}"
            waited = f"has waited {time.monotonic() - since:.0f} s in iteration {self.progress.iteration}"
            print(f"warning: {where} {waited}; {clause}", file=sys.stderr, flush=True)

    def missing(self) -> str | None:
        """The clause of `who_is_missing`; None where nothing can be said. It takes some seconds."""
        if self._store is None:
            return None
        seconds = SILENT_BEATS * self._beat
        before = _within(ANSWER_SECONDS, self._signs)
        time.sleep(seconds)
        after = before and _within(ANSWER_SECONDS, self._signs)
        if not before or not after:
            address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
            return f"the ranks' store at {address}, of rank 0 or its torchrun, does not answer"
        # This one lives, whatever the store has of it.
        after[self._rank] = Sign(self._rank, before[self._rank].beat + 1, *self._position())
        return who_is_missing(before, after, seconds)

    def _signs(self) -> list[Sign]:
        keys = [f"{_KEY}/{rank}" for rank in range(self._world)]
        known = [True] * self._world if self._store.check(keys) else [self._store.check([key]) for key in keys]
        values = iter(self._store.multi_get([key for key, has in zip(keys, known, strict=True) if has]))
        return [Sign(rank, *json.loads(next(values))) if has else Sign(rank) for rank, has in enumerate(known)]


def _within(seconds: float, ask: Callable[[], Any]) -> Any:
    """What the store answers; None where it gives no answer in time. A client of a stopped process waits for ever."""
    answers: list = []

    def asked() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(ask())

    thread = threading.Thread(target=asked, name="asks the store", daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def _default_store(end: threading.Event) -> Any:
    """The store of the process group, when there is one; None where the end comes first."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    while not dist.is_initialized():
        if end.wait(BEAT_SECONDS):
            return None
    return _get_default_store()


def _own_connection(store: Any) -> Any:
    """A connection of one thread alone to the ranks' store, which waits only briefly for an answer."""
    own = store.clone()
    own.set_timeout(timedelta(seconds=ANSWER_SECONDS))
    return own
