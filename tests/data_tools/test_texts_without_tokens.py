"""Tokenizers that have no token for a part of a text, or choose at random: a named refusal or the whole text."""

import json
from pathlib import Path

import pytest
from run_tool import refusal, run_tool
from tokenizer_files import byte_level_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_ksa.data_tools.plain_encoding import ContentError, NoTokenError, changed_texts
from megatron_ksa.data_tools.tags.whole_text import WholeText
from megatron_ksa.data_tools.tokenizers import load_tokenizer, write_byte_level

VOCABULARY = {"a": 0, "b": 1, "</s>": 2}
UNIGRAM = [("a", -1.0), ("b", -1.0), ("</s>", -3.0)]
MODELS = {
    "BPE": lambda: models.BPE(vocab=VOCABULARY, merges=[]),
    "BPE with a few bytes": lambda: models.BPE(vocab={**VOCABULARY, "<0x63>": 3}, merges=[], byte_fallback=True),
    "WordLevel": lambda: models.WordLevel(vocab=VOCABULARY, unk_token="[UNK]"),
    "WordPiece": lambda: models.WordPiece(vocab=VOCABULARY, unk_token="[UNK]"),
    "Unigram": lambda: models.Unigram(UNIGRAM, unk_id=None),
}


def saved(folder: Path, model, **settings) -> Path:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **settings).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", MODELS)
def test_a_text_that_has_no_tokens_is_refused_by_its_place(kind, tmp_path):
    """BPE left such characters out: `axb` was stored as `ab`, `xyz` was empty; other kinds ended in tracebacks."""
    folder = saved(tmp_path / "t", MODELS[kind]())
    (tmp_path / "in.jsonl").write_text('{"text": "axb"}\n{"text": "a b"}\n{"text": "xyz"}\n')
    arguments = ("--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "o", "--tokenizer-model", folder)
    refused = run_tool("preprocess_data.py", *arguments)
    assert refused.returncode == 2 and "in.jsonl:1: no token (a part of the text has no token" in refused.stderr
    done = run_tool("preprocess_data.py", *arguments, "--skip-bad-lines")
    assert "1 documents, 3 tokens; left out: 0 empty, 2 bad" in done.stdout
    listed = [json.loads(line) for line in (tmp_path / "o.skipped.jsonl").read_text().splitlines()]
    assert [(line["origin"][-2:], line["reason"]) for line in listed] == [(":1", "no token"), (":3", "no token")]


def test_chats_leave_no_character_out(tmp_path):
    """The encoder of whole texts, which chat templates use, left out the same characters."""
    tokenizer = load_tokenizer(str(saved(tmp_path / "t", MODELS["BPE"]())))
    with pytest.raises(NoTokenError):
        WholeText(tokenizer).encode("axb")
    assert WholeText(tokenizer).encode("ab").ids.tolist() == [0, 1]


@pytest.mark.parametrize("model", [
    models.BPE(vocab={**VOCABULARY, "<unk>": 3}, merges=[], unk_token="<unk>"),
    models.Unigram([*UNIGRAM, ("<unk>", -9.0)], unk_id=3),
])  # fmt: skip
@pytest.mark.parametrize("settings", [{}, {"unk_token": "</s>"}])
def test_unknown_tokens_are_those_that_the_model_writes(model, settings, tmp_path):
    """The token that tokenizer_config.json calls unknown was counted: none, or each end of a document."""
    tokenizer = load_tokenizer(str(saved(tmp_path / "t", model, **settings)))
    assert tokenizer.unknown == 3 and tokenizer.encode_content("axb") == [0, 3, 1]


def test_the_end_of_documents_is_no_unknown_token(tmp_path):
    """GPT-2 has one token for both: every document counted as one with an unknown token."""
    assert load_tokenizer(str(byte_level_tokenizer(tmp_path / "t", unk_token="<|endoftext|>"))).unknown is None
    model = models.BPE(vocab=VOCABULARY, merges=[], unk_token="</s>")
    with pytest.raises(ContentError, match="'</s>', which this tokenizer reads as its control token"):
        load_tokenizer(str(saved(tmp_path / "end", model))).encode_content("axb")


def test_white_space_beside_an_added_token_is_text(tmp_path):
    """An added token that takes the white space beside it (lstrip, rstrip) made `a  foo  b` into `afoob`."""
    added = AddedToken("foo", lstrip=True, rstrip=True, normalized=False, special=False)
    tokenizer = load_tokenizer(str(byte_level_tokenizer(tmp_path / "t", [added])))
    assert tokenizer.decode(tokenizer.encode_content("a  foo  b")) == "a  foo  b"


def test_dropout_of_bpe_is_off(tmp_path):
    """With `dropout` in tokenizer.json every run stored other tokens, and the check of the class failed by chance."""
    vocabulary = {**VOCABULARY, "aa": 3, "aaaa": 4}
    merges = [("a", "a"), ("aa", "aa")]
    tokenizer = load_tokenizer(str(saved(tmp_path / "t", models.BPE(vocab=vocabulary, merges=merges, dropout=0.5))))
    assert tokenizer.encode_content("a" * 40) == tokenizer.encode("a" * 40) == [4] * 10
    assert WholeText(tokenizer).encode("a" * 40).ids.tolist() == [4] * 10


def test_a_tokenizer_that_changes_texts_is_said_to(tmp_path):
    """A normaliser lowered capitals without a word."""
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "\u2581": 2, "</s>": 3}, merges=[]))
    tokenizer.normalizer, tokenizer.decoder = normalizers.Lowercase(), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(tmp_path / "t")
    tokenizer = load_tokenizer(str(tmp_path / "t"))
    assert changed_texts(tokenizer.encode_content, tokenizer.decode) == "capitals"
    (tmp_path / "in.jsonl").write_text('{"text": "AB"}\n')
    files = ("--input", tmp_path / "in.jsonl", "--tokenizer-model", tmp_path / "t")
    done = run_tool("preprocess_data.py", *files, "--output-prefix", tmp_path / "o")
    assert "note: this tokenizer changes texts: capitals" in done.stdout
    write_byte_level(tmp_path / "bytes")
    tokenizer = load_tokenizer(str(tmp_path / "bytes"))
    assert changed_texts(tokenizer.encode_content, tokenizer.decode) == ""


def test_a_folder_is_no_prefix(tmp_path):
    """Its files were hidden ones, `.bin` and `.idx`."""
    write_byte_level(tmp_path / "t")
    (tmp_path / "in.jsonl").write_text('{"text": "AB"}\n')
    files = ("--input", tmp_path / "in.jsonl", "--tokenizer-model", tmp_path / "t")
    done = run_tool("preprocess_data.py", *files, "--output-prefix", f"{tmp_path}/")
    assert "is a folder: add what the files' names begin with" in refusal(done)
