"""Preprocessing: the same bytes for any number of workers, ids that training agrees with, and nothing half-written."""

import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.arguments import parse_args
from run_tool import refusal, run_tool
from sessions import processes_of

from megatron_ksa.data_tools import indexed
from megatron_ksa.data_tools.indexed import IndexedDatasetWriter, check_indexed_dataset
from megatron_ksa.data_tools.preprocess import PreprocessSettings, preprocess
from megatron_ksa.data_tools.tokenizers import load_tokenizer, train_sentencepiece, write_byte_level
from megatron_ksa.errors import UsageError

ROOT = Path(__file__).parents[2]
TEXTS = [f"def  f{i}(x):\n\treturn x ** {i}  # Größe {i * i}\n" for i in range(300)] + [
    "<|endoftext|> </s> as text",
    "  ",
]
# Runs a tool once for each list of arguments, and says how much memory the process had at most after each, in bytes.
PEAKS = """
import json, resource, runpy, sys
_, tool, runs = sys.argv
peaks = []
for run in json.loads(runs):
    sys.argv = [tool, *run]
    try:
        runpy.run_path(tool, run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(json.dumps(peaks))
"""


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    write_byte_level(folder / "bytes")
    train_sentencepiece(TEXTS, folder / "bpe", vocab_size=320, threads=1)
    return {
        "bytes": folder / "bytes",
        "sentencepiece": folder / "bpe.model",
        "json": folder / "bytes" / "tokenizer.json",
    }


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS)), encoding="utf-8"
    )
    return path


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "json"])
def test_ids_are_those_of_the_tokenizer_that_training_builds(kind, tokenizers, monkeypatch):
    ours = load_tokenizer(str(tokenizers[kind]))
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *ours.training_flags.split()])
    args = SimpleNamespace(**{**vars(parse_args(ignore_unknown_args=True)), "pad_vocab_size": False})
    megatrons = build_tokenizer(args)
    assert ours.end_of_document == megatrons.eod
    assert ours.vocab_size == megatrons.vocab_size
    for text in TEXTS[:5]:
        assert ours.encode(text) == megatrons.tokenize(text)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_text_survives_and_its_own_end_of_document_stays_text(kind, tokenizers):
    tokenizer = load_tokenizer(str(tokenizers[kind]))
    ids = tokenizer.encode(TEXTS[-2])
    assert tokenizer.end_of_document not in ids
    assert len(ids) > 5


@pytest.mark.slow
def test_bytes_do_not_depend_on_workers_and_documents_come_back(jsonl, tokenizers, tmp_path):
    for workers in (1, 2):
        done = run_tool(
            "preprocess_data.py", "--input", jsonl, "--output-prefix", tmp_path / f"w{workers}",
            "--tokenizer-model", tokenizers["bytes"], "--workers", workers,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"w1{suffix}").read_bytes() == (tmp_path / f"w2{suffix}").read_bytes()
    dataset = IndexedDataset(str(tmp_path / "w1"))
    tokenizer = load_tokenizer(str(tokenizers["bytes"]))
    assert len(dataset) == len(TEXTS)
    for i in (0, 17, len(TEXTS) - 1):
        np.testing.assert_array_equal(dataset[i], [*tokenizer.encode(TEXTS[i]), tokenizer.end_of_document])
    check_indexed_dataset(str(tmp_path / "w1"))


def test_folders_and_gzip_are_read_in_order(tokenizers, tmp_path):
    (tmp_path / "texts" / "b").mkdir(parents=True)
    (tmp_path / "texts" / "z.py").write_text("last", encoding="utf-8")
    (tmp_path / "texts" / "b" / "a.py").write_text("first", encoding="utf-8")
    (tmp_path / "texts" / "other.txt").write_text("not asked for", encoding="utf-8")
    with gzip.open(tmp_path / "more.jsonl.gz", "wt") as stream:
        stream.write('{"text": "zipped"}\n\n{"text": ""}\n')
    done = run_tool(
        "preprocess_data.py", "--input", tmp_path / "texts", tmp_path / "more.jsonl.gz", "--glob", "**/*.py",
        "--output-prefix", tmp_path / "out", "--tokenizer-model", tokenizers["bytes"], "--no-append-eod",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 documents" in done.stdout and "1 empty, 0 bad" in done.stdout
    dataset, tokenizer = IndexedDataset(str(tmp_path / "out")), load_tokenizer(str(tokenizers["bytes"]))
    for document, text in zip(dataset, ("first", "last", "zipped"), strict=True):
        np.testing.assert_array_equal(document, tokenizer.encode(text))


@pytest.mark.parametrize(
    "line",
    [b'{"text": "cut of', b'"a string"', b'{"body": "x"}', b'{"text": "\xff"}', b'{"text": "\\ud800"}', b"[" * 100000],
)
def test_bad_line_is_named_and_skipped_only_when_asked(line, tokenizers, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good too"}\n')
    settings = PreprocessSettings([path], str(tmp_path / "out"), str(tokenizers["bytes"]))
    with pytest.raises(UsageError, match=re.escape(f"{path}:2: ") + ".*--skip-bad-lines"):
        preprocess(settings)
    assert not list(tmp_path.glob("out*"))
    counts = preprocess(replace(settings, skip_bad_lines=True))
    assert (counts.documents, counts.bad, counts.empty) == (2, 1, 0)


def test_bad_line_costs_exit_code_2_and_no_traceback(tokenizers, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n{"text": "cut of', encoding="utf-8")
    arguments = ("--input", path, "--output-prefix", tmp_path / "out", "--tokenizer-model", tokenizers["bytes"])
    refused = run_tool("preprocess_data.py", *arguments, "--workers", 2)
    assert refused.returncode == 2
    assert f"error: {path}:2: " in refused.stderr.splitlines()[-1]
    assert "Traceback" not in refused.stderr
    assert not list(tmp_path.glob("out*"))
    skipped = run_tool("preprocess_data.py", *arguments, "--skip-bad-lines")
    assert skipped.returncode == 0, skipped.stderr
    assert "1 documents" in skipped.stdout and "1 bad" in skipped.stdout


@pytest.mark.slow
def test_killed_run_leaves_no_dataset_and_no_process_and_can_be_repeated(tokenizers, tmp_path):
    """Workers waited for tasks for ever when `kill -9` ended the tool alone: nobody else tells them."""
    path = tmp_path / "long.jsonl"
    path.write_text(f"{json.dumps({'text': 'x' * 20000})}\n" * 5000, encoding="utf-8")
    arguments = ["--input", path, "--output-prefix", tmp_path / "out", "--tokenizer-model", tokenizers["sentencepiece"]]
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *map(str, arguments), "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    partial = tmp_path / "out.bin.partial"
    while not (partial.exists() and partial.stat().st_size):
        assert process.poll() is None
        time.sleep(0.05)
    # Two runs with one prefix ended with wrong documents in one of seven tries, with files that do not fit in four.
    line = refusal(run_tool("preprocess_data.py", *arguments, "--overwrite"))
    assert (
        f"out is being written by tools/preprocess_data.py (host {socket.gethostname()}, process {process.pid}" in line
    )
    assert len(processes_of(process.pid)) >= 4  # the tool, the process whose forks workers are, two workers
    process.kill()
    process.wait()
    assert not (tmp_path / "out.idx").exists()
    end = time.monotonic() + 30
    while (left := processes_of(process.pid)) and time.monotonic() < end:
        time.sleep(0.05)
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert not left
    with pytest.raises(UsageError, match="does not exist"):
        check_indexed_dataset(str(tmp_path / "out"))
    path.write_text('{"text": "short"}\n', encoding="utf-8")
    assert run_tool("preprocess_data.py", *arguments).returncode == 0
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.lock"))
    check_indexed_dataset(str(tmp_path / "out"))


def test_existing_dataset_is_replaced_only_when_asked(tmp_path):
    prefix = str(tmp_path / "data")
    for tokens in ([1, 2, 3], [4, 5]):
        with IndexedDatasetWriter(prefix, 100, overwrite=tokens == [4, 5]) as writer:
            writer.add_document(np.array(tokens))
    with pytest.raises(UsageError, match="--overwrite"):
        IndexedDatasetWriter(prefix, 100)
    dataset = IndexedDataset(prefix)  # must outlive the arrays it hands out
    np.testing.assert_array_equal(dataset[0], [4, 5])


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_truncated_dataset_is_refused(suffix, tmp_path):
    prefix = str(tmp_path / "data")
    with IndexedDatasetWriter(prefix, 100) as writer:
        writer.add_document(np.arange(50))
        writer.add_document(np.arange(7))
    check_indexed_dataset(prefix)
    whole = Path(prefix + suffix).read_bytes()
    for cut in (0, 10, len(whole) - 1):
        Path(prefix + suffix).write_bytes(whole[:cut])
        with pytest.raises(UsageError, match="truncated"):
            check_indexed_dataset(prefix)


@pytest.mark.parametrize("block", [1, 2, 1 << 20])
def test_index_that_points_elsewhere_is_refused(block, tmp_path, monkeypatch):
    """A damaged index was noticed when a sample came from the damaged place, or never: only its last entry was read."""
    monkeypatch.setattr(indexed, "_BLOCK", block)
    prefix = str(tmp_path / "data")
    with IndexedDatasetWriter(prefix, 100) as writer:
        for size in (5, 3, 0, 7):
            writer.add_document(np.full(size, 90 + size))
    check_indexed_dataset(prefix)
    assert indexed.id_range(prefix)[1] == 97
    whole = Path(f"{prefix}.idx").read_bytes()
    header, sequences = 34, 4
    for place, message in (
        (header + 4, "sequence 2 is not where"), (header + sequences * 4 + 8, "sequence 1 is not where"),
        (header + sequences * 12 + 8, "its documents do not follow"), (len(whole) - 8, "do not follow|end before"),
        (header + sequences * 12, "do not follow"),
    ):  # fmt: skip
        damaged = bytearray(whole)
        damaged[place] ^= 8
        Path(f"{prefix}.idx").write_bytes(damaged)
        with pytest.raises(UsageError, match=message):
            check_indexed_dataset(prefix)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "missing.jsonl"], "no such file or folder"),
        (["--input", "README.md"], "pass a folder for text"),
        (["--input", "tests/golden", "--glob", "*.nothing"], "matches --glob"),
        (["--tokenizer-model", "missing.model"], "tools/train_tokenizer.py"),
        (["--tokenizer-model", "README.md"], "not a SentencePiece model"),
        (["--tokenizer-model", "tests"], "no tokenizer.json"),
        (["--workers", "0"], "at least 1"),
    ],
)
def test_bad_arguments_cost_one_line(arguments, message, jsonl, tokenizers, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = {"--input": jsonl, "--output-prefix": tmp_path / "out", "--tokenizer-model": tokenizers["bytes"]}
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    done = run_tool("preprocess_data.py", *(word for pair in given.items() for word in pair))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and message in done.stderr
    assert not list(tmp_path.iterdir())


def test_what_is_left_out_is_listed_with_its_place(tokenizers, tmp_path):
    """The count of skipped lines was printed, but not which lines: nobody could look at what the data lacks."""
    path, out = tmp_path / "in.jsonl", tmp_path / "out.skipped.jsonl"
    path.write_bytes(
        b'{"text": "a"}\n{"text": ""}\n{"text": "\xff"}\n\n[1]\n{"body": 1}\n{"text": "' + b"x" * 2000 + b'"}\n'
    )
    arguments = ("--input", path, "--output-prefix", tmp_path / "out", "--tokenizer-model", tokenizers["bytes"])
    limits = ("--skip-bad-lines", "--max-document-bytes", 1000, "--overwrite")
    done = run_tool("preprocess_data.py", *arguments, *limits, "--workers", 1)
    assert done.returncode == 0 and f"left out: 1 empty, 4 bad, listed in {out}" in done.stdout
    found = [tuple(json.loads(line).values()) for line in out.read_text().splitlines()]
    assert [(origin, reason) for origin, reason, _ in found] == [
        (f"{path}:2", "empty"), (f"{path}:3", "invalid UTF-8"), (f"{path}:5", "not an object"),
        (f"{path}:6", "no text"), (f"{path}:7", "too large"),
    ]  # fmt: skip
    assert "'body'" in found[3][2] and "more than 1,000" in found[4][2]
    path.write_text('{"text": "a"}\n')
    done = run_tool("preprocess_data.py", *arguments, *limits)
    assert "0 empty, 0 bad\n" in done.stdout and not out.exists()  # that of the earlier run is gone


def test_mask_of_another_dataset_is_not_left_beside_a_new_one(tokenizers, tmp_path):
    """A dataset written over one with a loss mask kept the old mask, which training then took for its own."""
    for name in ("out", "out_loss_mask"):
        with IndexedDatasetWriter(str(tmp_path / name), 2) as writer:
            writer.add_document(np.array([1, 1]))
    (tmp_path / "out.idx").unlink()
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    arguments = (
        "--input",
        tmp_path / "in.jsonl",
        "--output-prefix",
        tmp_path / "out",
        "--tokenizer-model",
        tokenizers["bytes"],
    )
    assert "out_loss_mask.idx exists, the loss mask of another dataset" in refusal(
        run_tool("preprocess_data.py", *arguments)
    )
    assert run_tool("preprocess_data.py", *arguments, "--overwrite").returncode == 0
    assert not list(tmp_path.glob("out_loss_mask*"))


@pytest.mark.parametrize(
    ("tool", "flag", "value"),
    [
        ("preprocess_data.py", "--workers", "9" * 400), ("preprocess_data.py", "--max-document-bytes", "9" * 400),
        ("preprocess_data.py", "--max-document-bytes", 0), ("train_tokenizer.py", "--vocab-size", "9" * 30),
        ("train_tokenizer.py", "--vocab-size", 0), ("train_tokenizer.py", "--sample-megabytes", "nan"),
        ("train_tokenizer.py", "--sample-megabytes", "1e400"), ("train_tokenizer.py", "--sample-megabytes", -1),
        ("upsample_lengths.py", "--threshold", -1), ("upsample_lengths.py", "--threshold", "9" * 400),
        ("upsample_lengths.py", "--seed", -1), ("upsample_lengths.py", "--share", "nan"),
        ("upsample_lengths.py", "--share", 1 - 1e-15),
    ],
)  # fmt: skip
def test_absurd_numbers_cost_one_line(tool, flag, value, jsonl, tokenizers, tmp_path):
    """Numbers of 400 digits, NaN and negative seeds ended in tracebacks of the libraries that took them."""
    with IndexedDatasetWriter(str(tmp_path / "data"), 100) as writer:
        for size in (3, 30, 300):
            writer.add_document(np.arange(size) % 100)
    given = {
        "preprocess_data.py": {
            "--input": jsonl, "--output-prefix": tmp_path / "out", "--tokenizer-model": tokenizers["bytes"]
        },
        "train_tokenizer.py": {"--input": jsonl, "--output": tmp_path / "out.model"},
        "upsample_lengths.py": {
            "--data-path": tmp_path / "data", "--output-prefix": tmp_path / "out", "--share": 0.99, "--threshold": 100
        },
    }[tool] | {flag: value}  # fmt: skip
    assert flag in refusal(run_tool(tool, *(word for pair in given.items() for word in pair)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.idx"]


@pytest.mark.slow
def test_long_line_takes_no_memory(tokenizers, tmp_path):
    """One line of 50 MB took 8.8 GB and ended the run: skipping it takes less than 200 MB beyond a short one."""
    (tmp_path / "short.jsonl").write_text('{"text": "a"}\n')
    with open(tmp_path / "long.jsonl", "w", encoding="utf-8") as stream:
        stream.write('{"text": "a"}\n' + json.dumps({"text": "x" * 50_000_000}) + '\n{"text": "b"}\n')
    runs = [
        ["--input", f"{tmp_path}/{name}.jsonl", "--output-prefix", f"{tmp_path}/{name}.jsonl.out", "--tokenizer-model",
         str(tokenizers["sentencepiece"]), "--skip-bad-lines"]
        for name in ("short", "long")
    ]  # fmt: skip
    command = [sys.executable, "-c", PEAKS, str(ROOT / "tools" / "preprocess_data.py"), json.dumps(runs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    short, long = json.loads(done.stdout.splitlines()[-1])
    assert long - short < 200_000_000
    assert len(IndexedDataset(str(tmp_path / "long.jsonl.out"))) == 2


def test_bad_documents_of_a_sample_are_named(tmp_path):
    """train_tokenizer.py passed over documents that it could not read, without a word."""
    (tmp_path / "in.jsonl").write_text("".join(f'{{"text": "word {i} of them"}}\n' for i in range(200)) + "{cut\n")
    arguments = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "t.model", "--vocab-size", 280)
    assert f"{tmp_path}/in.jsonl:201: invalid JSON" in refusal(run_tool("train_tokenizer.py", *arguments))
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    done = run_tool("train_tokenizer.py", *arguments, "--skip-bad-lines")
    assert done.returncode == 0 and "1 invalid JSON; listed in" in done.stdout
    assert json.loads((tmp_path / "t.model.skipped.jsonl").read_text())["origin"] == f"{tmp_path}/in.jsonl:201"


def test_train_tokenizer_makes_both_kinds(jsonl, tmp_path):
    model = tmp_path / "bpe.model"
    trained = run_tool("train_tokenizer.py", "--input", jsonl, "--output", model, "--vocab-size", 320)
    assert trained.returncode == 0, trained.stderr
    assert load_tokenizer(str(model)).vocab_size == 320
    assert run_tool("train_tokenizer.py", "--type", "byte-level", "--output", tmp_path / "bytes").returncode == 0
    assert load_tokenizer(str(tmp_path / "bytes")).vocab_size == 257
    again = run_tool("train_tokenizer.py", "--input", jsonl, "--output", model)
    assert again.returncode == 2 and "exists" in again.stderr
    too_many = run_tool(
        "train_tokenizer.py", "--input", jsonl, "--output", tmp_path / "big.model", "--vocab-size", 10**6
    )
    assert too_many.returncode == 2 and "--vocab-size" in too_many.stderr.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bpe.model", "bytes"]
