"""One way to refuse bad input: one line on stderr, exit code 2, nothing written."""

import errno
import io
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# The first rank of a node prints an error that all of its ranks meet. The others wait this many seconds for torchrun to
# end them, and then print it themselves.
FIRST_RANK_SECONDS = 10


class UsageError(Exception):
    """The user's input cannot work. The message names the value, the rule and the flag that fixes it, in one line."""


class RankUsageError(UsageError):
    """A usage error that this rank alone has met: it prints its line whatever its number is."""


@contextmanager
def usage_errors_exit() -> Iterator[None]:
    """Turn a `UsageError` raised in the body into one line on stderr (one a node under torchrun) and exit code 2.

    So does a name that is too long for a file: whoever looks for such a file is told so by an `OSError`.

    Ranks write whole lines: torchrun starts them with `python -u`, where a line and its end are two writes, between
    which another rank writes.

    Wrap the body of every entry point in it. torchrun ends all ranks of a node when one of them ends: a rank that is
    not the node's first waits to be ended so, and prints the line itself where the first rank did not come to it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Names of files and fields need not be UTF-8.
            with suppress(OSError):  # it was redirected below Python, and has no place to go back to
                stream.reconfigure(errors="backslashreplace")
                if "RANK" in os.environ and stream.write_through:
                    stream.reconfigure(line_buffering=True, write_through=False)
    try:
        yield
    except (UsageError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
            raise
        if os.environ.get("LOCAL_RANK", "0") != "0" and not isinstance(error, RankUsageError):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Megatron's handler would only take note
            time.sleep(FIRST_RANK_SECONDS)
        print(f"error: {' '.join(_own_words(error).split())}", file=sys.stderr, flush=True)
        if _in_a_world():
            # Destructors of process groups wait for other ranks, which may wait for this one.
            sys.stdout.flush()
            os._exit(2)
        raise SystemExit(2) from None


def _own_words(error: UsageError | OSError) -> str:
    """The message, without the traceback that a data loader's worker puts around it."""
    if isinstance(error, OSError):
        return f"{str(error.filename)[:100]}...: a longer name than a file can have"
    text = str(error)
    return text.rpartition("UsageError: ")[2] if text.startswith("Caught ") else text


def _in_a_world() -> bool:
    """Whether this process has joined others; without importing torch."""
    distributed = sys.modules.get("torch.distributed")
    return (
        distributed is not None
        and distributed.is_available()
        and distributed.is_initialized()
        and (distributed.get_world_size() > 1)
    )
