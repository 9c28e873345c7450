"""`kill -9` in every step and a rerun: the final bytes are those of a run that nobody disturbed."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from chat_server import chat_server, good
from raw_pool import write_pool

from megatron_ksa.data_tools.tokenizers import write_byte_level

pytestmark = pytest.mark.slow
STEPS = {
    "read", "tag", "duplicates", "canonicalise", "tree", "ground", "decontaminate", "sample", "export", "write",
    "report",
}  # fmt: skip
KILLED = Path(__file__).with_name("killed_tool.py")


class Tool:
    """The command line in processes that can be killed (`killed_tool.py`)."""

    def __init__(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.child = 0
        self._process = subprocess.Popen([sys.executable, str(KILLED)], text=True, **pipes)

    def __call__(
        self, *arguments: object, die_at: int | None = None, full_at: int | None = None, largest: int | None = None
    ) -> tuple[int, str]:
        """Exit code, -9 where the run was killed at a rename, and everything printed."""
        call = [die_at, [str(argument) for argument in arguments], full_at, largest]
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        self.child = int(self._process.stdout.readline())
        code, output = json.loads(self._process.stdout.readline())
        return code, output

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait(timeout=60)


@pytest.fixture(scope="module")
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
        "--template", "chatml", "--loss-on", "responses", "--top-branches", 3, "--export", "jsonl",
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


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path, tool):
    """No room at each sync of the step that a run has come to, then room: the bytes of a run that always had it."""
    write_byte_level(tmp_path / "tokenizer")
    pool, target = write_pool(tmp_path / "pool.jsonl"), write_pool(tmp_path / "target.jsonl", count=12, seed=1)
    work = tmp_path / "work"
    arguments = (
        "--work", work, "--input", pool, "--target", target, "--budget", "30%", "--export", "jsonl",
        "--tokenizer-model", tmp_path / "tokenizer", "--template", "chatml", "--top-branches", 3,
    )  # fmt: skip
    code, output = tool(*arguments)
    assert code == 0, output
    undisturbed, steps = contents(work), done(work)
    order = [line.replace("target, ", "target ").partition(":")[0] for line in output.splitlines()]
    order = [step for step in order if step in steps]
    assert set(order) == steps
    shutil.rmtree(work)
    full_in, number = set(), 0
    while code != 0 or not full_in:
        before = done(work) if work.exists() else set()
        limit = {"largest": 64} if number == 0 else {"full_at": number}
        code, output = tool(*arguments, **limit)
        assert code in (0, 2), output
        if code == 2:
            *_, line = output.splitlines()
            assert line.startswith("error: ") and "Traceback" not in output, output
            full_in.add(next(step for step in order if step not in done(work)))
            assert not [path for path in work.rglob("*") if path.name.endswith(".partial")]
        # At every other sync: a step has several.
        number = number + 2 if before == (done(work) if work.exists() else set()) else 0
    assert full_in == steps
    assert contents(work) == undisturbed


def test_kill_while_an_endpoint_answers_and_rerun_asks_for_the_missing_only(tmp_path, tool):
    pool = write_pool(tmp_path / "pool.jsonl")
    words = "baking chess sailing genetics".split()

    def behave(text, attempt, request):
        found = sorted({word for word in words if word in text} | set(text.split()[4:6]))
        return good({"tags": found, "quality": len(text) % 10 + 1, "difficulty": 5})

    def arguments(name, server):
        flags = ("--tagger", "llm", "--llm-url", server.url, "--llm-concurrency", 4)
        return ("tag", "--work", tmp_path / name, "--input", pool, *flags)

    with chat_server(behave) as server:
        code, output = tool(*arguments("undisturbed", server))
        assert code == 0, output
        everything = set(server.attempts)

    def kill_at_thirty(text, attempt, request):
        if len(server.requests) == 30:
            os.kill(tool.child, signal.SIGKILL)
        return behave(text, attempt, request)

    with chat_server(kill_at_thirty) as server:
        assert tool(*arguments("killed", server))[0] == -9
    cache = tmp_path / "killed" / "tag_cache" / "answers.sqlite"
    with sqlite3.connect(cache) as connection:
        kept = connection.execute("SELECT count(*) FROM answer").fetchone()[0]
    # Of the requests before the kill, at most those under way are lost.
    assert 30 - 4 <= kept < len(everything)
    with chat_server(behave) as server:
        assert tool(*arguments("killed", server))[0] == 0
        assert set(server.attempts.values()) == {1} and len(server.attempts) == len(everything) - kept
    same = [
        {name: content for name, content in contents(tmp_path / folder).items() if not name.startswith("tag_cache")}
        for folder in ("undisturbed", "killed")
    ]
    assert same[0] == same[1] and {"tags.jsonl", "failed.jsonl", "manifest.json"} <= same[0].keys()
