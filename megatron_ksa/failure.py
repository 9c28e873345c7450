"""A rank that fails says which one it is, on which host and in what call, and ends at once."""

import faulthandler
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

COLLECTIVES = os.path.join("torch", "distributed", "")
FAILED = 1


@contextmanager
def failures_named(missing: Callable[[], str | None] = lambda: None) -> Iterator[None]:
    """End the process with one line that names rank, host and call where the body raises, after the traceback.

    Args:
        missing: called where a collective failed; says which ranks it waited for (`RankWatch.missing`).

    Where a rank dies, the others notice in a collective: their connection closes, or nothing arrives for
    `--distributed-timeout-minutes`. gloo raises an error then; NCCL's watchdog aborts the process and names rank and
    operation, and the Python stack of the abort follows. A process that failed does not wait for the others: leaving
    the interpreter would, in the destructors of process groups and of loading workers.
    """
    faulthandler.enable()
    try:
        yield
    except (SystemExit, KeyboardInterrupt, GeneratorExit):
        raise
    # Megatron's CheckpointException is a BaseException.
    except BaseException as error:
        traceback.print_exc()
        line = describe(error)
        # Which ranks are missing takes seconds to see, and the launcher of another rank that fails may end this one.
        if in_collective(error) and (clause := missing()):
            line += f"; {clause}"
        print(f"error: {line}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(FAILED)


def in_collective(error: BaseException) -> bool:
    """Whether the error comes from torch's communication between ranks."""
    return any(COLLECTIVES in frame.filename for frame in traceback.extract_tb(error.__traceback__))


def describe(error: BaseException) -> str:
    """One line: rank, host, the failing call (a collective where there is one) and the error's first line."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    frames = traceback.extract_tb(error.__traceback__)
    in_torch = [frame for frame in frames if COLLECTIVES in frame.filename and not frame.name.startswith("wrapper")]
    frame = (in_torch or frames)[-1] if frames else None
    call = "" if frame is None else f" in {frame.name}"
    ours = [frame for frame in frames if COLLECTIVES not in frame.filename]
    if in_torch and ours:
        call += f", called by {ours[-1].name} ({os.path.basename(ours[-1].filename)}:{ours[-1].lineno})"
    message = "; ".join([(str(error).strip().splitlines() or [""])[0], *getattr(error, "__notes__", [])])
    return f"rank {rank} of {world} on host {socket.gethostname()} failed{call}: {type(error).__name__}: {message}"
