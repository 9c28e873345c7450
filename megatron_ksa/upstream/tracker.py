"""The tracker, which names the newest checkpoint, is replaced and never rewritten.

Megatron truncates the file and then writes it. A rank killed between the two leaves an empty tracker: the next start
says "Invalid metadata file" and ends with exit code 0, although whole checkpoints are there.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import IO

from megatron.core.msc_utils import MaybeMultiStorageClient

from megatron_ksa.upstream.patches import Patch


class _WholeFiles(MaybeMultiStorageClient):
    def __init__(self, check: Callable[[], None]) -> None:
        super().__init__()
        self._check = check

    def __getattr__(self, name: str):
        found = super().__getattr__(name)
        # Where the storage client has an open of its own, files are objects in a store, which are whole or absent.
        return partial(_open, self._check) if found is open else found


def _open(check: Callable[[], None], path: str, mode: str = "r", **options: object):
    return _replace(path, check) if mode == "w" and not options else open(path, mode, **options)


@contextmanager
def _replace(path: str, check: Callable[[], None]) -> Iterator[IO[str]]:
    part = f"{path}.part"
    with open(part, "w", encoding="utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    check()
    os.replace(part, path)


PATCHES = (
    # `make` also takes a function, which is called before the file gets its name.
    Patch(
        "megatron.training.checkpointing:maybe_msc",
        lambda original, check: _WholeFiles(check),
        why="the tracker file is truncated before it is written, and a rank killed between the two does not resume",
        expects="MaybeMultiStorageClient",
    ),
)


def patches(check: Callable[[], None]) -> tuple[Patch, ...]:
    """Trackers that are replaced, after a check that this run still writes the folder."""
    return tuple(patch.given(check) for patch in PATCHES)
