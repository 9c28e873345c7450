"""The tool, called in the tests' own process."""

import runpy
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[3] / "tools" / "preprocess_tags.py"


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the tool in this process; gives its exit code, standard output and last line of standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(TOOL), run_name="__main__")
        except SystemExit as error:
            code = error.code
        output = capsys.readouterr()
        return code, output.out, (output.err.splitlines() or [""])[-1]

    return run
