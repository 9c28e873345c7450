"""`kill -9` in every step and a rerun: the final bytes are those of a run that nobody disturbed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from raw_pool import write_pool

from megatron_ksa.data_tools.tokenizers import write_byte_level

STEPS = {"read", "tag", "duplicates", "canonicalise", "tree", "ground", "sample", "write", "report"}
KILLED = Path(__file__).with_name("killed_tool.py")


class Tool:
    """The command line in processes that can be killed (`killed_tool.py`)."""

    def __init__(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen([sys.executable, str(KILLED)], text=True, **pipes)

    def __call__(self, *arguments: object, die_at: int | None = None) -> tuple[int, str]:
        """Exit code, -9 where the run was killed at a rename, and everything printed."""
        self._process.stdin.write(json.dumps([die_at, [str(argument) for argument in arguments]]) + "\n")
        self._process.stdin.flush()
        code, output = json.loads(self._process.stdout.readline())
        return code, output

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait(timeout=60)


@pytest.fixture
def tool():
    started = Tool()
    yield started
    started.close()


def contents(work: Path) -> dict[str, bytes]:
    """Every file of a work folder, but for the memory of hashes, which holds times of change."""
    files = (path for path in work.rglob("*") if path.is_file() and path.name != ".digests.json")
    return {str(path.relative_to(work)): path.read_bytes() for path in files}


def done(work: Path) -> set[str]:
    """Steps that the manifests of a work folder and its target count as done."""
    manifests = {"": work / "manifest.json", "target ": work / "target" / "manifest.json"}
    found = {name: json.loads(path.read_text())["steps"] for name, path in manifests.items() if path.exists()}
    return {name + step for name, steps in found.items() for step in steps}


def test_kill_at_every_rename_and_rerun_gives_the_same_bytes(tmp_path, tool):
    """One run is killed again and again: at each rename of the step it has come to, then in the next step."""
    write_byte_level(tmp_path / "tokenizer")
    pool, target = write_pool(tmp_path / "pool.jsonl"), write_pool(tmp_path / "target.jsonl", count=12, seed=1)
    work = tmp_path / "work"
    arguments = (
        "--work", work, "--input", pool, "--target", target, "--budget", "30%",
        "--tokenizer-model", tmp_path / "tokenizer",
        "--template", "chatml", "--loss-on", "responses", "--top-branches", 3,
    )  # fmt: skip
    code, output = tool(*arguments)
    assert code == 0, output
    undisturbed, steps = contents(work), done(work)
    assert steps >= STEPS | {"target tag", "target ground"}
    shutil.rmtree(work)

    killed_in, kills, number = set(), 0, 0
    while code != 0 or not kills:
        before = done(work) if work.exists() else set()
        code, output = tool(*arguments, die_at=number)
        assert code in (0, -9), output
        kills += code == -9
        after = done(work)
        killed_in |= {step for step in steps - after if before == after}
        number = number + 1 if before == after else 0
    assert killed_in == steps and kills > 3 * len(steps)
    assert contents(work) == undisturbed
