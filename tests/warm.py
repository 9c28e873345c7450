"""Scripts and functions in processes that need not import Megatron: `warm_server.py`, one a test worker."""

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from megatron_ksa.platform.ports import free_port

SERVER = Path(__file__).with_name("warm_server.py")
ROOT = Path(__file__).parents[1]


class Done(NamedTuple):
    """What has run: the exit code of the first rank that failed or 0, those of all ranks, and what they printed."""

    returncode: int
    codes: list[int]
    stdout: str
    stderr: str


@functools.cache
def _server() -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    # Its own notes of what is missing on this machine are nobody's output.
    server = subprocess.Popen(
        [sys.executable, str(SERVER)], text=True, **pipes, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    def close() -> None:
        server.stdin.close()
        server.wait(timeout=60)

    atexit.register(close)
    return server


def _script(script: str | Path, arguments: tuple, environment: Mapping[str, str], out: Path, error: Path) -> dict:
    """What the server is asked to run; `script` is absolute, or below the repository's root."""
    return {
        "script": str(ROOT / script), "arguments": [str(argument) for argument in arguments], "folder": str(ROOT),
        "environment": dict(environment), "ranks": 0, "out": str(out), "error": str(error),
    }  # fmt: skip


def _ask(request: dict) -> object:
    server = _server()
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


class Started:
    """A script that runs in a fork with a session of its own; what `subprocess.Popen` of it would be.

    Args:
        log: file that gets all its output.
        environment: of the process, in place of this one's.
    """

    def __init__(self, script: Path, *arguments: object, log: Path, environment: dict[str, str]) -> None:
        self.pid = _ask(_script(script, arguments, environment, log, log) | {"session": True})

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return _ask({"ended": self.pid})

    def wait(self, seconds: float = 600) -> int:
        """The exit code.

        Raises:
            TimeoutError: it still runs.
        """
        end = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise TimeoutError(f"process {self.pid} runs after {seconds} s")
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        """Nothing where it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def run_with_forks(script: str | Path, *arguments: object) -> Done:
    """Run a Python script whose commands are forks as well (`commands_in_forks.py`)."""
    return run_script(Path(__file__).with_name("commands_in_forks.py"), ROOT / script, *arguments)


def run_script(script: str | Path, *arguments: object, ranks: int = 0) -> Done:
    """Run a Python script in a fork, or in several that are the ranks of one world.

    Args:
        script: absolute, or below the repository's root.
        ranks: 0 for one process that no launcher has started.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if ranks:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as printed:
        out, error = Path(printed) / "out", Path(printed) / "error"
        codes, first = _ask(_script(script, arguments, environment, out, error) | {"ranks": ranks})
        texts = [path.read_text(errors="replace") for path in (out, error)]
    return Done(0 if first is None else codes[first], codes, *texts)
