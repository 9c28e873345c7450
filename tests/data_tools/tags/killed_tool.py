"""Runs `tools/preprocess_tags.py` in forked processes that `kill -9` ends at any of their renames.

Every file of the pipeline gets its name by a rename. Killed there, with the file cut in half, a run leaves what it
can leave at worst: files of a step under their names, one in part, and no word of it in the manifest. Forks share the
imports, so that a run costs its work alone.

    python killed_tool.py < calls    # a JSON line a call: [rename to die at, arguments, sync to fail at, largest file]

Numbers count from 0, null is never. A sync that fails and a largest file, bytes, stand for a full disk: the kernel
refuses to keep what was written, or to write more in the middle of a write.
"""

import errno
import gc
import importlib
import io
import json
import os
import resource
import runpy
import signal
import sys
import tempfile
from pathlib import Path

TOOL = Path(__file__).parents[3] / "tools" / "preprocess_tags.py"


def _die_at(number: int) -> None:
    """Have this process killed at its rename of that number."""
    left = [number]
    for name, original in (("replace", Path.replace), ("rename", Path.rename)):

        def renamed(self: Path, target: Path, original=original) -> Path:
            if left[0] == 0:
                if self.is_file():
                    os.truncate(self, self.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return original(self, target)

        setattr(Path, name, renamed)


def _full_at(number: int) -> None:
    """Have every sync from that number on fail, as on a disk without room."""
    left, original = [number], os.fsync

    def synced(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    os.fsync = synced


def _call(number: int | None, arguments: list[str], full_at: int | None = None, largest: int | None = None) -> None:
    """The tool in this process, to its end."""
    if full_at is not None:
        _full_at(full_at)
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
    if number is not None:
        _die_at(number)
    sys.argv = [str(TOOL), *arguments]
    code = 0
    try:
        runpy.run_path(str(TOOL), run_name="__main__")
    except SystemExit as error:
        code = error.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def warm_up() -> None:
    """What steps import when they load a tokenizer, check a blend or draw: here once rather than in every fork."""
    for module in ("megatron.core.datasets.blended_megatron_dataset_builder", "megatron.core.datasets.helpers"):
        importlib.import_module(module)
    from matplotlib import pyplot

    from megatron_ksa.data_tools.tokenizers import load_tokenizer, write_byte_level

    with tempfile.TemporaryDirectory() as folder:
        write_byte_level(Path(folder) / "tokenizer")
        load_tokenizer(str(Path(folder) / "tokenizer"))
    figure, axes = pyplot.subplots()
    axes.set_title("fonts")
    figure.savefig(io.BytesIO())
    pyplot.close(figure)
    # A fork's collector would visit all of it again, and copy its pages.
    gc.collect()
    gc.freeze()


def main() -> None:
    """Answer each call with two lines: the process that does it, then JSON: exit code (negative: the signal), and what
    was printed."""
    runpy.run_path(str(TOOL), run_name="imported")
    warm_up()

    for line in sys.stdin:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            _call(*json.loads(line))
        os.close(writer)
        print(child, flush=True)
        with open(reader, encoding="utf-8", errors="replace") as stream:
            output = stream.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([status, output]), flush=True)


if __name__ == "__main__":
    main()
