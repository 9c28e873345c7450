"""One way to refuse bad input: one line on stderr, exit code 2, nothing written."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(Exception):
    """The user's input cannot work. The message names the value, the rule and the flag that fixes it, in one line."""


@contextmanager
def usage_errors_exit() -> Iterator[None]:
    """Turn a `UsageError` raised in the body into one line on stderr (one a node under torchrun) and exit code 2.

    Wrap the body of every entry point in it.
    """
    try:
        yield
    except UsageError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
