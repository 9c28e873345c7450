"""The tracker, which names the newest checkpoint, is replaced and never rewritten.

Megatron truncates the file and then writes it. A rank killed between the two leaves an empty tracker: the next start
says "Invalid metadata file" and ends with exit code 0, although whole checkpoints are there.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from megatron.core.msc_utils import MaybeMultiStorageClient

from megatron_ksa.upstream.patches import Patch


class _WholeFiles(MaybeMultiStorageClient):
    def __getattr__(self, name: str):
        found = super().__getattr__(name)
        # A storage client of its own has objects, which are whole or absent.
        return _open if found is open else found


def _open(path: str, mode: str = "r", **options: object):
    return _replace(path) if mode == "w" and not options else open(path, mode, **options)


@contextmanager
def _replace(path: str) -> Iterator[IO[str]]:
    part = f"{path}.part"
    with open(part, "w", encoding="utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


PATCHES = (
    Patch(
        "megatron.training.checkpointing:maybe_msc",
        lambda original: _WholeFiles(),
        why="the tracker file is truncated before it is written, and a rank killed between the two does not resume",
        expects="MaybeMultiStorageClient",
    ),
)
