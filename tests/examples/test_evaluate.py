"""The evaluation tools on a tiny dense model: files, tables and bad input."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_ksa.data_tools.indexed import IndexedDatasetWriter
from megatron_ksa.data_tools.tokenizers import known_text, write_byte_level
from megatron_ksa.evaluation.needle import FORMS
from megatron_ksa.evaluation.token_language import VOCABULARY
from megatron_ksa.huggingface.importer import import_checkpoint

TOOLS = Path(__file__).parents[2] / "examples" / "evaluate"


@pytest.fixture(scope="module")
def folder(megatron_flags, tmp_path_factory):
    """Checkpoints that know all token ids of the language (`all`) and too few (`few`), and documents of 600 tokens.

    A byte-level tokenizer, essays and questions besides.
    """
    folder = tmp_path_factory.mktemp("evaluate")
    for name, words in (("all", VOCABULARY), ("few", 96)):
        config = LlamaConfig(
            vocab_size=words, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=64, initializer_range=0.5,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / f"{name}-hf")
        (folder / name).mkdir()
        import_checkpoint(folder / f"{name}-hf", folder / name)
    write_byte_level(folder / "tokenizer")
    (folder / "essays.txt").write_text(" ".join(f"The {letter}{other}er river ran." for letter in "bcdfghjklm"
                                                for other in "aeiouwyxqs"))  # fmt: skip
    records = [
        {"question": f"Who is {i}?", "context": f"Number {i} is Ann{i}.", "answers": [f"Ann{i}"]} for i in range(9)
    ]
    (folder / "questions.json").write_text(json.dumps(records))
    with IndexedDatasetWriter(str(folder / "documents"), 96) as writer:
        for first in range(2):
            writer.add_document([(first + 7 * token) % 96 for token in range(600)])
    return folder


def run(tool, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [tool, *map(str, words)])
    monkeypatch.syspath_prepend(str(TOOLS))
    runpy.run_path(str(TOOLS / tool), run_name="__main__")


def test_needles(folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "needles.json"
    run("needle.py", monkeypatch, "--checkpoint", folder / "all", "--output", output, "--lengths", "128,256",
        "--depths", 2, "--cases", 1)  # fmt: skip
    rows = json.loads(output.read_text())["results"]
    assert {(row["form"], row["length"], row["depth"]) for row in rows} == {
        (form, length, depth) for form in FORMS for length in (128, 256) for depth in (0.0, 1.0)
    }
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    table = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith("%")]
    assert table == list(FORMS)


@pytest.mark.slow
def test_needles_by_decoding(folder, tmp_path, monkeypatch):
    """A Megatron checkpoint and the Hugging Face folder that it was imported from write the same."""
    found = []
    for name in ("all", "all-hf"):
        output = tmp_path / f"{name}.json"
        run("needle.py", monkeypatch, "--checkpoint", folder / name, "--output", output, "--lengths", 128,
            "--depths", 2, "--cases", 2, "--generate", "--dtype", "float32")  # fmt: skip
        found.append(json.loads(output.read_text()))
        assert found[-1]["settings"]["generate"] is True
    assert found[0]["results"] == found[1]["results"] and len(found[0]["results"]) == 2 * len(FORMS)


def ruler(folder, monkeypatch, name, output, *words):
    run("ruler.py", monkeypatch, "--checkpoint", folder / name, "--output", output, "--tokenizer-model",
        folder / "tokenizer", "--haystack", folder / "essays.txt", "--dtype", "float32", *words)  # fmt: skip


@pytest.mark.slow
def test_ruler(folder, tmp_path, monkeypatch, capsys):
    """One command for a Megatron checkpoint and a Hugging Face folder, which write the same texts; it resumes."""
    words = ["--lengths", "1600,2k", "--cases", 2, "--questions", folder / "questions.json", "--tasks", "vt", "qa",
             "niah_multivalue"]  # fmt: skip
    found = []
    for name in ("all", "all-hf"):
        output = tmp_path / f"{name}.json"
        ruler(folder, monkeypatch, name, output, *words)
        found.append(json.loads(output.read_text()))
    assert found[0]["results"] == found[1]["results"]
    rows = found[0]["results"]
    assert {(row["task"], row["length"]) for row in rows} == {
        (task, length) for task in ("vt", "qa", "niah_multivalue") for length in (1600, 2048)
    }
    assert len({text for row in rows for text in row["texts"]}) > 4  # the model writes something, not always the same
    table = output.with_suffix(".md").read_text()
    assert table.splitlines()[0] == "| task | 1600 | 2k |" and table in capsys.readouterr().out
    assert table.splitlines()[-1].startswith("| average of 3 | ")
    # What is there is not done again; what is missing is.
    kept = {**found[1], "results": [{**row, "texts": ["kept"]} for row in rows[:-1]]}
    output.write_text(json.dumps(kept))
    ruler(folder, monkeypatch, "all-hf", output, *words, "--compare", tmp_path / "all.json")
    again = json.loads(output.read_text())["results"]
    assert [row["texts"] for row in again] == [["kept"]] * (len(rows) - 1) + [rows[-1]["texts"]]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        ruler(folder, monkeypatch, "all-hf", output, *words[:2], "--cases", 3)
    assert "has results with questions" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tasks vt qa", "--tasks qa needs --questions"),
        ("--tasks niah_9", "--tasks niah_9: one of niah_single_1"),
        ("--cases 0", "--cases 0: at least 1"),
        ("--seed -1", "--seed -1: 0 or more"),
        ("--lengths 100", "100 tokens are too few"),
        ("--questions nowhere", "--questions nowhere cannot be read: No such file"),
        ("--haystack {folder}/questions.json", "the haystack text has"),
        ("--compare {folder}/questions.json", "holds no results of this program"),
        ("--tasks vt --lengths 2k --checkpoint {folder}/few", "is beyond the model's vocabulary of 96"),
        ("--tasks vt --lengths 2k --checkpoint {folder}/tokenizer", "is no checkpoint folder"),
        (
            "--tasks vt --lengths 2k --checkpoint {folder}/all-hf --iteration 3",
            "is a Hugging Face folder, which has one",
        ),
    ],
)
def test_ruler_bad_input(flags, message, folder, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        ruler(folder, monkeypatch, "all", tmp_path / "out.json", *(w.format(folder=folder) for w in flags.split()))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2 and len(errors) == 1 and message in errors[0]
    assert not list(tmp_path.iterdir())


def test_perplexity_at_several_times_the_trained_length(folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "perplexity.json"
    run("perplexity.py", monkeypatch, "--checkpoint", folder / "few", "--output", output, "--data-path",
        folder / "documents", "--lengths", "256,512", "--windows", 2)  # fmt: skip
    rows = json.loads(output.read_text())["results"]
    assert [(row["length"], row["tokens"]) for row in rows] == [(256, 512), (512, 512)]
    assert "512" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tool", "flags", "message"),
    [
        ("needle.py", "", "the language of token ids has 768 of them, the model knows 96"),
        ("needle.py", "--forms single_9", "--forms single_9: one of single_1"),
        ("needle.py", "--cases 0", "--cases 0: at least 1"),
        ("needle.py", "--tokenizer-model nowhere", "--tokenizer-model needs --haystack"),
        ("needle.py", "--checkpoint {folder}/all-hf", "is a Hugging Face folder: it needs --generate"),
        ("perplexity.py", "--data-path nowhere", "nowhere"),
        ("perplexity.py", "--data-path {folder}/documents --lengths 2k", "no document has 2049 tokens"),
        ("perplexity.py", "--data-path {folder}/documents --lengths 64", "length 64 is shorter than the stride 256"),
        ("perplexity.py", "--text {folder}/documents.bin", "--text needs --tokenizer-model"),
    ],
)
def test_bad_input(tool, flags, message, folder, tmp_path, monkeypatch, capsys):
    words = [word.format(folder=folder) for word in flags.split()]
    with pytest.raises(SystemExit) as stopped:
        run(tool, monkeypatch, "--checkpoint", folder / "few", "--output", tmp_path / "out.json", *words)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2 and len(errors) == 1 and message in errors[0]
    assert not list(tmp_path.iterdir())


def test_text_of_padded_embeddings():
    """A model that wrote an id beyond its SentencePiece tokenizer ended the evaluation with an IndexError."""

    class Strict:
        vocab_size = 128

        def decode(self, ids):
            return bytes(ids).decode("ascii")

    assert known_text(Strict(), [72, 300, 105, 128]) == "Hi"
