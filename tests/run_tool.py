"""Tools of the repository run in the test's process, which has their imports already."""

import io
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]


def run_tool(name: str, *arguments: object) -> SimpleNamespace:
    """A tool in this process: returncode, stdout, stderr. A traceback fails the test.

    Args:
        name: below tools/, or a path from the repository's root.
    """
    path, code = str(ROOT / name if "/" in name else ROOT / "tools" / name), 0
    with (
        pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as error,
    ):  # fmt: skip
        patch.setattr(sys, "argv", [path, *map(str, arguments)])
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=error.getvalue())


def refusal(done: SimpleNamespace) -> str:
    """The one line of a run that ended with exit code 2 and nothing but that line (progress bars aside)."""
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, (done.returncode, done.stderr)
    return lines[0]
