"""Files of measured results: settings, the machine, and a list of measurements that grows and is gone on with."""

import json
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Lock

from megatron_ksa.errors import UsageError
from megatron_ksa.files import MAX_JSON_BYTES, read_small, whole_file


def _content(path: Path) -> tuple[object, list[dict]]:
    """What a file of results says of its settings, None where it says nothing, and its measurements.

    Raises:
        UsageError: a file of something else.
    """
    try:
        content = json.loads(read_small(path, limit=MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from None
    settings, runs = (content.get("settings"), content.get("runs")) if isinstance(content, dict) else (None, content)
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise UsageError(f"{path} holds no results of this program: choose another output")
    return settings, runs


def stored_runs(path: Path) -> list[dict]:
    """The measurements in a file of results; none where there is no file.

    Raises:
        UsageError: a file of something else.
    """
    return _content(path)[1] if path.exists() else []


def check_settings(path: Path, there: object, here: dict) -> None:
    """Refuse to go on with results of other settings.

    Args:
        path: of the results, for the message.
        there: their settings, as JSON gives them; None where they have none.
        here: the settings of this run.

    Raises:
        UsageError: they differ; the message names the first that does.
    """
    if not isinstance(there, dict):
        raise UsageError(f"{path} does not say of which settings it is: choose another output")
    here = json.loads(json.dumps(here))
    for key in [*here, *there]:
        if here.get(key) != there.get(key):
            differs = f"{key} {there.get(key)}, here {here.get(key)}"
            raise UsageError(f"{path} is of other settings ({differs}): choose another output")


class Results:
    """A JSON file: settings, machine, and a list of measurements that are told apart by their keys.

    Args:
        report: called after each measurement, by one thread at a time.
        packages: installed packages whose versions are part of the machine.
    """

    def __init__(
        self, path: Path, settings: dict, keys: Sequence[str], commit: str | None = None,
        report: Callable[[], object] = lambda: None, packages: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.path, self.keys, self._report = path, tuple(keys), report
        self._head = {"settings": settings, "machine": machine(commit, packages)}
        self._lock = Lock()

    @property
    def commit(self) -> str:
        """Of the code that measures; the machine in the file is that of the last measurement."""
        return self._head["machine"]["commit"]

    def stored(self) -> list[dict]:
        """Measurements of an earlier call with the same settings; none where there is no file.

        Raises:
            UsageError: the file is of other settings.
        """
        if not self.path.exists():
            return []
        settings, runs = _content(self.path)
        check_settings(self.path, settings, self._head["settings"])
        return runs

    def add(self, found: dict) -> None:
        """Add a measurement, in the place of one with the same keys."""
        with self._lock:
            known = stored_runs(self.path)
            same = [found[key] for key in self.keys]
            runs = [run for run in known if [run[key] for key in self.keys] != same] + [found]
            with whole_file(self.path) as stream:
                json.dump(self._head | {"runs": runs}, stream)
                stream.write("\n")
            self._report()


def machine(commit: str | None = None, packages: Sequence[str] = ()) -> dict[str, str]:
    """The device, the processor, the versions and the commit that a result comes from.

    Args:
        commit: of the code, where it is no git checkout.
        packages: whose versions are told beside those of Python, torch and Triton.
    """
    import torch
    import triton

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    found = {"device": device, "processor": processor(), "python": platform.python_version()}
    found |= {"torch": torch.__version__, "triton": triton.__version__}
    found |= {name: _version(name) for name in packages}
    command = ["git", "-C", str(Path(__file__).resolve().parents[1]), "rev-parse", "--short", "HEAD"]
    read = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return found | {"commit": commit or read or "unknown"}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """The processor's name and number of cores."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
