"""Full disks: every tool that writes ends with one line, and leaves nothing, least of all under its output's name.

A limit on the size of files (EFBIG) stands for the full disk (ENOSPC); with the right to mount, a small file system is
filled too. Sixteen of seventeen such runs ended in a traceback, five left a `.partial`, one a model that was cut.
"""

import json
import logging
import os
import resource
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from run_tool import ROOT, refusal, run_tool

from megatron_ksa.data_tools.indexed import IndexedDatasetWriter, loss_mask_prefix
from megatron_ksa.data_tools.tokenizers import write_byte_level
from megatron_ksa.errors import UsageError
from megatron_ksa.files import disk_error, whole_file, whole_folder, writing

pytestmark = pytest.mark.slow


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process grows beyond size bytes in the body."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    logging.disable()  # pytest keeps what is logged in a file
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_byte_level(folder / "bytes")
    lines = [json.dumps({"text": f"line {i} of a text " * 5}) for i in range(300)]
    (folder / "in.jsonl").write_text("\n".join([*lines, "bad", *lines]) + "\n")
    random = np.random.default_rng(0)
    with (
        IndexedDatasetWriter(str(folder / "data"), 100) as tokens,
        IndexedDatasetWriter(loss_mask_prefix(str(folder / "data")), 2, dtype=np.uint8) as masks,
    ):
        for length in random.integers(1, 200, 60):
            tokens.add_document(np.full(length, 7))
            masks.add_document(np.ones(length, np.uint8))
    return folder


def commands(inputs: Path, folder: Path) -> dict[str, tuple]:
    return {
        "preprocess_data": (
            "preprocess_data.py", "--input", inputs / "in.jsonl", "--skip-bad-lines", "--output-prefix", folder / "out",
            "--tokenizer-model", inputs / "bytes",
        ),
        "sentencepiece": (
            "train_tokenizer.py", "--input", inputs / "in.jsonl", "--skip-bad-lines", "--output", folder / "t.model",
            "--vocab-size", 280,
        ),
        "byte-level": ("train_tokenizer.py", "--type", "byte-level", "--output", folder / "t"),
        "upsample_lengths": (
            "upsample_lengths.py", "--data-path", inputs / "data", "--output-prefix", folder / "out",
            "--threshold", 150, "--share", 0.5,
        ),
        "search_harpe_bases": (
            "search_harpe_bases.py", "--method", "uniform", "--groups", 2, "--length", 2048, "--head-dim", 64,
            "--extrema", 4, "--output", folder / "bases.json",
        ),
    }  # fmt: skip


NAMES = ("preprocess_data", "sentencepiece", "byte-level", "upsample_lengths", "search_harpe_bases")


@pytest.mark.parametrize("name", NAMES)
def test_disk_that_is_full_sooner_or_later(name, inputs, tmp_path):
    """Whatever write is the one that fails, up to a disk on which all of it fits."""
    command, refused = commands(inputs, tmp_path)[name], 0
    for size in (0, 1, 100, 700, 1500, 3000, 6000, 12_000, 25_000, 50_000, 100_000, 1 << 20, 1 << 24):
        with files_of_at_most(size):
            done = run_tool(*command)
        if done.returncode == 0:
            break
        assert "cannot be written: File too large" in refusal(done)
        assert not list(tmp_path.iterdir()), size
        refused += 1
    assert done.returncode == 0 and refused >= 3


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 64 KB; skipped where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("name", NAMES)
def test_file_system_that_is_full(name, inputs, small_disk):
    filler = small_disk / "filler"
    filler.write_bytes(bytes(60 * 1024))
    done = run_tool(*commands(inputs, small_disk)[name])
    if done.returncode:  # some outputs fit in the last page
        assert "cannot be written: No space left on device" in refusal(done)
        assert list(small_disk.iterdir()) == [filler]
    else:
        assert name in ("upsample_lengths",)


@pytest.mark.parametrize("name", NAMES)
def test_folder_that_cannot_be_written(name, inputs, tmp_path):
    """A file in the place of the output's folder; permissions do not stop a superuser."""
    (tmp_path / "file").write_text("")
    line = refusal(run_tool(*commands(inputs, tmp_path / "file")[name]))
    assert str(tmp_path / "file") in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and not (tmp_path / "file").read_text()


@pytest.mark.parametrize("name", NAMES[:4])
def test_folder_that_is_missing_is_made(name, inputs, tmp_path):
    assert run_tool(*commands(inputs, tmp_path / "a" / "b")[name]).returncode == 0
    assert list((tmp_path / "a" / "b").iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_second_run_with_one_output_is_refused(name, inputs, tmp_path):
    """Both wrote the same temporary files, and what came out was of neither."""
    from megatron_ksa.locks import exclusive

    command = commands(inputs, tmp_path)[name]
    output = command[command.index("--output" if "--output" in command else "--output-prefix") + 1]
    with exclusive(output, "tools/the_first.py"):
        line = refusal(run_tool(*command))
        assert f"{output} is being written by tools/the_first.py" in line and f"process {os.getpid()}" in line
    assert not list(tmp_path.iterdir())


def test_plan_is_written_whole_or_not_at_all(tmp_path):
    """tools/plan_cluster.py writes through `whole_file`."""
    with (
        files_of_at_most(10), pytest.raises(UsageError, match="layout.args cannot be written: File too large"),
        whole_file(tmp_path / "layout.args") as stream,
    ):  # fmt: skip
        stream.write("--tensor-model-parallel-size 8\n")
    assert not list(tmp_path.iterdir())


def test_converter_leaves_nothing(tmp_path):
    """A conversion to a full disk ended in a traceback of the library that writes the tensors."""
    sys.path.insert(0, str(ROOT / "tests" / "huggingface"))
    try:
        from models import save_family
    finally:
        sys.path.pop(0)
    save_family("llama2", tmp_path / "model")
    command = [sys.executable, str(ROOT / "tools/convert_checkpoint.py"), "import"]
    flags = ["--input", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, *flags], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-3000:]
    assert f"error: {tmp_path / 'out'} cannot be written: File too large" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and [path.name for path in tmp_path.iterdir()] == ["model"]


def example_writers(folder: Path) -> dict[str, tuple[str, str, tuple]]:
    """What the example scripts write with: a script or module, its function and the arguments."""
    from megatron_ksa.evaluation.needle import Score

    (folder / "README.md").write_text("<!-- name -->\n<!-- /name -->\n")
    losses = {"lm loss": ([1, 2], [3.0, 2.0]), "lm loss validation": ([2], [2.0])}
    scores = [Score("single", 64, depth, 1, 1.0, 1.0) for depth in (0.0, 1.0)]
    return {
        "results": ("examples/evaluate/common.py", "write_json", (folder / "out.json", {"a": [1] * 1000})),
        "loss curve": ("examples/demo/report.py", "plot_losses", (losses, 3.0, folder / "loss.png")),
        "table": ("megatron_ksa/markdown.py", "replace_section", (folder / "README.md", "name", "| a |" * 20)),
        "heat map": ("megatron_ksa/evaluation/needle.py", "plot_heat_map", (scores, folder / "map.png")),
    }


@pytest.mark.parametrize("name", ["results", "loss curve", "table", "heat map"])
def test_examples_write_whole_files(name, tmp_path):
    """The example scripts wrote their figures and tables under the final name, and a full disk cut them."""
    script, function, arguments = example_writers(tmp_path)[name]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    write = runpy.run_path(str(ROOT / script))[function]
    with files_of_at_most(50), pytest.raises(UsageError, match="cannot be written: File too large"):
        write(*arguments)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    write(*arguments)
    written = [path for path in tmp_path.iterdir() if path.read_bytes() != before.get(path)]
    assert len(written) == 1 and written[0].suffix != ".partial"


def test_demo_corpus_is_whole(tmp_path):
    write = runpy.run_path(str(ROOT / "examples/demo/corpus.py"))["write_corpus"]
    with files_of_at_most(100_000), pytest.raises(UsageError, match="cannot be written"):
        write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_whole_folder_is_synced_and_removed(tmp_path):
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "a") as folder:
        (folder / "file").write_text("x")
        _ = 1 / 0
    assert not list(tmp_path.iterdir())
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".a.partial" / "of a killed run").write_text("x")
    with whole_folder(tmp_path / "a") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "a").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


def test_errors_of_other_files_are_not_the_outputs(tmp_path):
    """Only what the disk or the output's folder says is turned into the line about the output."""
    with pytest.raises(FileNotFoundError), writing(tmp_path / "out" / "a"):
        (tmp_path / "in").read_text()
    with pytest.raises(ValueError), writing(tmp_path / "a"):
        raise ValueError("code: 2")
    rust = RuntimeError('IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })')
    for error in (rust, Exception("No space left on device (os error 28)"), BaseExceptionGroup("", [OSError(28, "")])):
        assert disk_error(error, tmp_path) == "No space left on device"
