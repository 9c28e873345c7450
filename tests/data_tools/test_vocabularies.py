"""Tokenizer folders whose files say different things: tokenizer.json counts, and a contradiction is refused."""

import json
import shutil
from pathlib import Path

import pytest
from run_tool import refusal, run_tool
from sentencepiece import SentencePieceProcessor
from tokenizer_files import byte_level_tokenizer, llama_tokenizer, sentencepiece_model
from tokenizers import Tokenizer as FastTokenizer

from megatron_ksa.data_tools.tokenizers import load_tokenizer
from megatron_ksa.data_tools.vocabularies import token_ids
from megatron_ksa.errors import UsageError


def as_tokenizer_json(model: Path, folder: Path, change: dict[str, str] | None = None) -> None:
    """A tokenizer.json with the pieces of a SentencePiece model, some under other names."""
    pieces = SentencePieceProcessor(model_file=str(model))
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    for old, new in (change or {}).items():
        vocab[new] = vocab.pop(old)
    whole = {"model": {"type": "BPE", "vocab": vocab, "merges": []}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(whole))


def test_a_tokenizer_model_that_agrees_is_no_question(tmp_path):
    model = sentencepiece_model(tmp_path / "tokenizer.model")
    as_tokenizer_json(model, tmp_path)
    assert len(token_ids(tmp_path, "--like")) == 400


def test_a_tokenizer_model_that_disagrees_is_refused(tmp_path):
    """Which of tokenizer.model and tokenizer.json was read depended on the tool, and nobody was told."""
    model = sentencepiece_model(tmp_path / "tokenizer.model")
    as_tokenizer_json(model, tmp_path, {"L": "Q"})
    with pytest.raises(
        UsageError, match=r"--like .*: tokenizer.model gives 'L' the id \d+, and tokenizer.json"
    ) as error:
        token_ids(tmp_path, "--like")
    assert "which the transformers library reads, says otherwise: it has no 'L'; remove" in str(error.value)


def test_renamed_and_added_tokens_are_no_contradiction(tmp_path):
    """Chat models rename reserved pieces, and keep tokens of their own in added_tokens.json."""
    model = sentencepiece_model(tmp_path / "tokenizer.model", user_defined_symbols=["<unused0>"])
    as_tokenizer_json(model, tmp_path, {"<unused0>": "<turn>"})
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    whole["added_tokens"] = [{"id": whole["model"]["vocab"].pop("<turn>"), "content": "<turn>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 400}')
    assert token_ids(tmp_path, "--like")["<turn>"] == 3
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 300}')
    with pytest.raises(UsageError, match="added_tokens.json gives '<pad>' the id 300, .*it has no '<pad>'"):
        token_ids(tmp_path, "--like")


def test_ranks_of_another_format_are_not_compared(tmp_path):
    """Llama 3 has a tokenizer.model that is no SentencePiece model."""
    as_tokenizer_json(sentencepiece_model(tmp_path / "other"), tmp_path)
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    assert token_ids(tmp_path, "--like")


def test_tokenising_with_files_that_disagree_is_refused(tmp_path):
    folder = llama_tokenizer(tmp_path / "t")
    shutil.move(sentencepiece_model(tmp_path / "m"), folder / "tokenizer.model")
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    line = refusal(run_tool(
        "preprocess_data.py", "--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "out",
        "--tokenizer-model", folder,
    ))  # fmt: skip
    assert "--tokenizer-model" in line and "tokenizer.model gives" in line and not list(tmp_path.glob("out*"))


def with_class(folder: Path, name: str) -> Path:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": name}))
    return folder


@pytest.mark.parametrize("text", [" a", "  two", "a  b", "▁a", "\n a", "", " "])
def test_the_space_that_a_text_starts_with_is_kept(text, tmp_path):
    """Since transformers 5 LlamaTokenizer splits texts otherwise than its tokenizer.json: ` a` came back as `a`."""
    folder = with_class(llama_tokenizer(tmp_path / "t"), "LlamaTokenizer")
    ids = load_tokenizer(str(folder)).encode_content(text)
    assert FastTokenizer.from_file(str(folder / "tokenizer.json")).decode(ids) == text


@pytest.mark.parametrize("way", ["class", "family"])
def test_a_class_that_makes_other_tokens_is_refused(way, tmp_path):
    """A class or model_type of another family rebuilt the tokenizer, and every text became another."""
    folder = llama_tokenizer(tmp_path / "t")
    if way == "class":
        with_class(folder, "Qwen2Tokenizer")
    else:
        (folder / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(
        UsageError, match="makes a Qwen2Tokenizer of it, which gives other tokens than its tokenizer.json"
    ):
        load_tokenizer(str(folder))
    assert load_tokenizer(str(with_class(byte_level_tokenizer(tmp_path / "b"), "Qwen2Tokenizer"))).encode("a")
