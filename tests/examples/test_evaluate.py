"""The evaluation tools on a tiny dense model: files, tables and bad input."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_ksa.data_tools.indexed import IndexedDatasetWriter
from megatron_ksa.evaluation.needle import FORMS
from megatron_ksa.evaluation.token_language import VOCABULARY
from megatron_ksa.huggingface.importer import import_checkpoint

TOOLS = Path(__file__).parents[2] / "examples" / "evaluate"


@pytest.fixture(scope="module")
def folder(megatron_flags, tmp_path_factory):
    """Checkpoints that know all token ids of the language (`all`) and too few (`few`), and documents of 600 tokens."""
    folder = tmp_path_factory.mktemp("evaluate")
    for name, words in (("all", VOCABULARY), ("few", 96)):
        config = LlamaConfig(
            vocab_size=words, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=64,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / f"{name}-hf")
        (folder / name).mkdir()
        import_checkpoint(folder / f"{name}-hf", folder / name)
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
