"""Flags of the tools and examples, fuzzed with values of every type and size: one line and exit code 2, nothing else.

Each command names inputs that are not there or outputs that cannot be, so that no command line can work.
"""

import argparse
import contextlib
import random
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_tool import ROOT, run_tool

pytestmark = pytest.mark.slow

# {none}: a path below a regular file, where nothing can be.
COMMANDS = {
    "tools/convert_checkpoint.py": [
        "import --input {none} --output {none}/x", "export --input {none} --output {none}/x",
    ],
    "tools/generate.py": ["--load {none} --prompt x", "--load {none} --input {none} --output {none}/x"],
    "tools/inspect_summaries.py": ["--load {none} --text {none} --tokenizer-model {none} --output {none}/x.html"],
    "tools/plan_cluster.py": ["--model {model} --gpus 8 --write {none}/x", "--model {none} --gpus 8"],
    "tools/preprocess_data.py": [
        "--input {text} --output-prefix {none}/x --tokenizer-model {bytes}",
        "--input {none} --output-prefix {free} --tokenizer-model {none}",
    ],
    "tools/search_harpe_bases.py": ["--output {none}/x.json"],
    "tools/train_tokenizer.py": [
        "--output {none}/x.model --input {text}", "--type byte-level --output {none}/x",
        "--output {free}.model --input {none}",
    ],
    "tools/upsample_lengths.py": ["--data-path {none} --output-prefix {none}/x --share 0.5"],
    "examples/checkpoint_sums/measure.py": ["--folder {none} --out {none}/x"],
    "examples/demo/run.py": ["--output {none}/x"],
    "examples/evaluate/needle.py": ["--load {none} --output {none}/x"],
    "examples/evaluate/perplexity.py": ["--load {none} --output {none}/x --data-path {none}"],
    "examples/evaluate/ruler.py": ["--load {none} --output {none}/x --haystack {none}"],
    "examples/generation_speed/run.py": ["--out {none}/x"],
    "examples/harpe_extend/experiment.py": ["--out {none}/x"],
    "examples/harpe_extend/extend.py": [
        "--load {none} --save {none}/x --data-path {none} --length 128 --steps 2",
    ],
    "examples/ksa_evidence/experiment.py": ["--out {none}/x"],
    "examples/ksa_from_dense/run.py": ["--input {none} --data-path {none} --work {none}/x"],
    "examples/tags/reasoning_gym_pool.py": ["--output {none}/x"],
    "examples/tags/small_llm.py": ["--input {none} --work {none}/x"],
    "examples/tags/tagger_comparison.py": ["--pool {none} --work {none}/x"],
    "examples/tags/topics.py": ["--work {none}"],
    "examples/throughput_1b9/run.py": ["--out {none}/x"],
}  # fmt: skip
NUMBERS = (
    "0", "1", "2", "3", "7", "64", "-1", "-0", "127", "65536", "2147483648", "9223372036854775808", "1" + "0" * 30,
    "9" * 400, "9" * 5000, "1e3", "1e18", "1e308", "1e999", "-1e999", "1e-320", "0.5", "nan", "inf", "-inf", "0x10",
    "1_000", "٣",
)  # fmt: skip
TEXTS = (
    "", " ", "None", "x" * 5000, "2 2 2 2", "1,2", "2k,4k", "1k,1k,99999999999999k", "-1k", "nan,1", "{}", "[]", "𝟘",
    "%s%n", "'; x", "a/../b", "all", "\udcff", "text\nmore", "-", "**", "../x", "~",
)  # fmt: skip
TRIES = 25
SECONDS = 5.0


class _Known(Exception):
    """The parser that a script parses its command line with."""


@contextlib.contextmanager
def beside(script: str) -> Iterator[None]:
    """Modules beside a script are found in the body, and forgotten: two examples have a `report`."""
    known = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str((ROOT / script).parent))
        yield
    for name in set(sys.modules) - known:
        if (file := getattr(sys.modules[name], "__file__", None)) and Path(file).parent == (ROOT / script).parent:
            del sys.modules[name]


def actions_of(script: str, words: list[str]) -> list[argparse.Action]:
    """The arguments of a script, of the subcommand that the words begin with."""

    def stop(self: argparse.ArgumentParser, *args: object, **options: object) -> argparse.Namespace:
        raise _Known(self)

    with pytest.MonkeyPatch.context() as patch, beside(script):
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [script])
        with pytest.raises(_Known) as known:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    (parser,) = known.value.args
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += action.choices[words[0]]._actions
        elif not isinstance(action, argparse._HelpAction):
            found.append(action)
    # What names the inputs and outputs stays: nothing else keeps the command from working.
    return [
        action for action in found
        if action.option_strings and not isinstance(action, argparse._HelpAction)
        and not set(action.option_strings) & set(words)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    from megatron_ksa.data_tools.tokenizers import write_byte_level

    folder = tmp_path_factory.mktemp("fuzzed")
    (folder / "file").write_text("no folder")
    (folder / "text.jsonl").write_text('{"text": "some words"}\n')
    write_byte_level(folder / "bytes")
    models = sorted((ROOT / "slurm/models").glob("*.args"))
    return {
        "none": str(folder / "file/none"), "text": str(folder / "text.jsonl"), "bytes": str(folder / "bytes"),
        "free": str(folder / "file" / "free"), "model": str(models[0]),
    }  # fmt: skip


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail what takes longer, hours of work too."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def started(self: subprocess.Popen, words: object, *_: object, **__: object) -> None:
    """In the place of a process's start: nothing that was asked for can work."""
    raise RuntimeError(f"a process was started: {words}")


def fuzzed(actions: list[argparse.Action], draw: random.Random) -> list[str]:
    """Up to three flags, with values of any kind; switches without."""
    words = []
    for action in draw.sample(actions, draw.randint(1, min(3, len(actions)))):
        flag = action.option_strings[0]
        values = [draw.choice(NUMBERS if action.type in (int, float) and draw.random() < 0.8 else (*NUMBERS, *TEXTS))]
        if action.nargs == 0:
            words.append(flag)
        elif action.nargs is None:
            words.append(f"{flag}={values[0]}")
        else:
            words += [flag, *values, *draw.choices(NUMBERS, k=draw.randint(0, 2))]
    return words


CASES = [(script, command) for script, commands in COMMANDS.items() for command in commands]


@pytest.mark.parametrize("script, command", CASES, ids=[f"{script}-{command[:6]}" for script, command in CASES])
def test_a_command_line_that_cannot_work_is_one_line(script, command, places, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess.Popen, "__init__", started)
    monkeypatch.chdir(tmp_path)  # a relative path among the values is no file of the repository
    before = command.format(**places).split()
    draw, failed = random.Random(script + command), []
    with beside(script):
        run_tool(script, *before)  # imports
    actions = actions_of(script, before)
    for words in ([], *(fuzzed(actions, draw) for _ in range(TRIES))):
        start, why = time.process_time(), ""
        try:
            with beside(script), within(SECONDS):
                done = run_tool(script, *before, *words)
            said = [line for line in done.stderr.replace("\r", "\n").splitlines() if "error: " in line]
            if done.returncode != 2 or len(said) != 1 or "Traceback" in done.stderr or not said[0].strip():
                why = f"exit code {done.returncode}: {done.stderr[-300:]}"
        except Exception as error:  # a traceback
            why = f"{type(error).__name__}: {str(error)[:200]}"
        if why:
            failed.append(f"{[word[:60] for word in words]} {time.process_time() - start:.1f} s: {why}")
    assert not failed, f"{len(failed)} of {TRIES}:\n" + "\n".join(failed)
    assert not list(tmp_path.iterdir()), "something was written"
