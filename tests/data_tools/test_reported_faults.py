"""Faults that users of such tools report, replayed with small inputs: the text is stored, or refused in one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from megatron.core.datasets.indexed_dataset import IndexedDataset
from run_tool import refusal, run_tool
from tokenizer_files import byte_level_tokenizer, llama_tokenizer, sentencepiece_model
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from megatron_ksa.data_tools.plain_encoding import ContentError
from megatron_ksa.data_tools.tokenizers import load_tokenizer, write_byte_level
from megatron_ksa.errors import UsageError

CASES = Path(__file__).parent / "cases"


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """The byte-level tokenizer of tools/train_tokenizer.py: byte b has an id, 256 ends documents."""
    folder = tmp_path_factory.mktemp("tokenizers") / "bytes"
    write_byte_level(folder)
    return folder


def documents(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


def texts(prefix: Path, tokenizer: Path) -> list[str]:
    """Text of each document of a dataset; each ends with the end-of-document id and has no other."""
    model = FastTokenizer.from_file(str(tokenizer / "tokenizer.json"))
    end = load_tokenizer(str(tokenizer)).end_of_document
    found = documents(prefix)
    assert all(ids[-1] == end and end not in ids[:-1] for ids in found)
    return [model.decode(ids[:-1], skip_special_tokens=False) for ids in found]


def tokenise(source: Path, prefix: Path, tokenizer: Path, *flags: object):
    return run_tool(
        "preprocess_data.py", "--input", source, "--output-prefix", prefix, "--tokenizer-model", tokenizer, *flags
    )


def test_column_of_bytes_is_text(plain, tmp_path):
    """A Parquet column of bytes was tokenised as Python's repr: the text b'A caf\\xc3\\xa9...'."""
    assert tokenise(CASES / "bytes_column.parquet", tmp_path / "out", plain).returncode == 0
    assert texts(tmp_path / "out", plain) == ["A café\non the corner."]


def test_cell_that_is_not_utf8_is_named_and_can_be_skipped(plain, tmp_path):
    """A Parquet cell that is not UTF-8 ended in a traceback, with --skip-bad-lines too."""
    source = CASES / "bad_utf8.parquet"
    line = refusal(tokenise(source, tmp_path / "out", plain))
    assert f"{source}:2: invalid UTF-8" in line and "--skip-bad-lines" in line
    assert not list(tmp_path.iterdir())
    done = tokenise(source, tmp_path / "out", plain, "--skip-bad-lines")
    assert done.returncode == 0 and len(texts(tmp_path / "out", plain)) == 2
    (skipped,) = map(json.loads, (tmp_path / "out.skipped.jsonl").read_text().splitlines())
    assert skipped["origin"] == f"{source}:2" and skipped["reason"] == "invalid UTF-8"
    assert "1 bad" in done.stdout and str(tmp_path / "out.skipped.jsonl") in done.stdout


def test_name_of_the_end_token_in_a_text_ends_no_document(tmp_path):
    """A text that writes <|endoftext|> got the end-of-document id in its middle: one document counted as two."""
    tokenizer = byte_level_tokenizer(tmp_path / "tokenizer")
    assert tokenise(CASES / "quotes_end_of_text.jsonl", tmp_path / "out", tokenizer).returncode == 0
    assert texts(tmp_path / "out", tokenizer) == ["The mark <|endoftext|> ends a document of that model."]


@pytest.mark.parametrize("added", [AddedToken("<|im_end|>", special=True), AddedToken("<tool_call>", special=False)])
def test_no_added_marker_comes_out_of_a_text(added, tmp_path):
    """Added tokens that a tokenizer does not call special, such as Qwen's <tool_call>, were control ids in texts."""
    tokenizer = byte_level_tokenizer(tmp_path / "tokenizer", [added])
    model = load_tokenizer(str(tokenizer))
    marker = model.encode(str(added))
    assert len(marker) == 1 and marker[0] >= 256
    ids = model.encode_content(f"a {added} b")
    assert max(ids) < 256 and bytes_of(tokenizer, ids) == f"a {added} b"


def bytes_of(tokenizer: Path, ids: list[int]) -> str:
    return FastTokenizer.from_file(str(tokenizer / "tokenizer.json")).decode(ids, skip_special_tokens=False)


def test_user_defined_pieces_of_sentencepiece_stay_text(tmp_path):
    """SentencePiece finds user-defined pieces in every text: <|endoftext|> as such a piece ended documents."""
    path = sentencepiece_model(
        tmp_path / "t.model", user_defined_symbols=["<|user|>", "[SEP]", "the"], control_symbols=["<|hidden|>"]
    )
    ours, theirs = load_tokenizer(str(path)), sentencepiece.SentencePieceProcessor(model_file=str(path))
    text = "say <|user|> and [SEP] and </s> and <|hidden|>, not the"
    ids = ours.encode_content(text)
    pieces = {theirs.id_to_piece(id) for id in ids}
    assert theirs.decode(ids) == text and not pieces & {"<|user|>", "[SEP]", "</s>", "<|hidden|>"}
    assert "the" in pieces  # a word is no marker
    assert theirs.piece_to_id("<|user|>") in ours.encode(text)  # markup may use it


def test_text_that_a_tokenizer_can_only_read_as_a_control_token_is_refused(tmp_path):
    """A Unigram model has </s> in its vocabulary, so that even without special tokens the text becomes its id."""
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = FastTokenizer(models.WordLevel({"[UNK]": 0, "stop": 1, "go": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="stop", unk_token="[UNK]").save_pretrained(tmp_path / "t")
    tokenizer = load_tokenizer(str(tmp_path / "t"))
    assert tokenizer.encode_content("go now") == [2, 0]
    with pytest.raises(ContentError, match="'stop', which this tokenizer reads as its control token"):
        tokenizer.encode_content("go stop go")
    (tmp_path / "in.jsonl").write_text('{"text": "go"}\n{"text": "stop"}\n')
    done = tokenise(tmp_path / "in.jsonl", tmp_path / "out", tmp_path / "t", "--skip-bad-lines")
    assert documents(tmp_path / "out") == [[2, 1]] and "1 bad" in done.stdout


def test_model_without_an_end_of_document_is_refused_before_anything_is_written(tmp_path):
    """A SentencePiece model without </s> wrote id -1 as 65535 after every document, and training died of an index."""
    path = sentencepiece_model(tmp_path / "t.model", eos_id=-1)
    (tmp_path / "in.jsonl").write_text('{"text": "Line 7"}\n')
    before = sorted(tmp_path.iterdir())
    line = refusal(tokenise(tmp_path / "in.jsonl", tmp_path / "out", path))
    assert "no end-of-document piece" in line and "--no-append-eod" in line
    assert sorted(tmp_path.iterdir()) == before
    assert tokenise(tmp_path / "in.jsonl", tmp_path / "out", path, "--no-append-eod").returncode == 0
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert [model.decode(ids) for ids in documents(tmp_path / "out")] == ["Line 7"]


def test_ids_with_a_gap_are_refused_before_anything_is_written(tmp_path):
    """Five tokens, the largest id 70000: the storage type was chosen by the count, and 70000 was stored as 4464."""
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = FastTokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "</s>": 3, "far": 70000}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(tmp_path / "t")
    (tmp_path / "in.jsonl").write_text('{"text": "a far b"}\n')
    line = refusal(tokenise(tmp_path / "in.jsonl", tmp_path / "out", tmp_path / "t"))
    assert "5 tokens, but ids up to 70,000" in line
    assert not list(tmp_path.glob("out*"))


def test_storage_holds_every_id_of_a_large_vocabulary(tmp_path):
    """The same with a vocabulary without gaps: more than 65,500 tokens are stored in 32 bits."""
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"[UNK]": 0, "</s>": 1, **{f"w{i}": i for i in range(2, 70001)}}
    words = FastTokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="[UNK]")
    fast.save_pretrained(tmp_path / "t")
    (tmp_path / "in.jsonl").write_text('{"text": "w2 w65535 w65536 w70000 other"}\n')
    done = tokenise(tmp_path / "in.jsonl", tmp_path / "out", tmp_path / "t")
    assert documents(tmp_path / "out") == [[2, 65535, 65536, 70000, 0, 1]]
    assert "6 tokens, 1 of them unknown to the tokenizer" in done.stdout


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_character_that_stands_for_a_space_is_kept(kind, tmp_path):
    """U+2581 is how SentencePiece and Llama tokenizers write a space: a text with it came back with spaces."""
    if kind == "sentencepiece":
        path = sentencepiece_model(tmp_path / "t.model")
        decode = sentencepiece.SentencePieceProcessor(model_file=str(path)).decode
    else:
        path = llama_tokenizer(tmp_path / "t")
        decode = FastTokenizer.from_file(str(path / "tokenizer.json")).decode
    tokenizer = load_tokenizer(str(path))
    for text in ("bars ▁▂▃ and a space", "▁", "▁▁ a"):
        assert decode(tokenizer.encode_content(text)) == text
    assert tokenizer.encode_content("no such thing") == tokenizer.encode("no such thing")


def test_character_that_stands_for_a_space_is_refused_where_it_cannot_be_kept(tmp_path):
    path = sentencepiece_model(tmp_path / "t.model", byte_fallback=False, vocab_size=200)
    with pytest.raises(ContentError, match=r"U\+2581, which this tokenizer reads as a space"):
        load_tokenizer(str(path)).encode_content("a▁b")


def test_no_writer_stores_an_id_as_another(tmp_path):
    """The last guard, for every caller: ids below 0, beyond the vocabulary or no integers are refused."""
    from megatron_ksa.data_tools.indexed import IndexedDatasetWriter

    for ids in (np.array([1, -1]), np.array([1, 70000]), np.array([1, 100]), np.array([0.5])):
        with (
            pytest.raises(UsageError, match="ids go from 0 to 99|not integers"),
            IndexedDatasetWriter(str(tmp_path / "out"), 100) as writer,
        ):
            writer.add_document(ids)
        assert not list(tmp_path.iterdir())


def test_where_all_documents_are_bad_the_first_is_named(plain, tmp_path):
    """With --skip-bad-lines and nothing left to write the counts were told, but no line and no reason."""
    (tmp_path / "in.jsonl").write_text('{"text": ""}\n{"txt": "a"}\n{"txt": "b"}\n')
    line = refusal(tokenise(tmp_path / "in.jsonl", tmp_path / "out", plain, "--skip-bad-lines"))
    assert f"(1 empty, 2 no text; the first is {tmp_path / 'in.jsonl'}:1: empty)" in line


def test_files_of_a_folder_that_are_not_read_are_counted(plain, tmp_path):
    """A folder's a.TXT and b.txt.gz were passed over without a word: the pattern is **/*.txt."""
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("read")
    for name in ("b.TXT", "sub/c.txt.gz"):
        (tmp_path / "in" / name).write_text("not read")
    done = tokenise(tmp_path / "in", tmp_path / "out", plain)
    assert texts(tmp_path / "out", plain) == ["read"]
    assert (
        f"not read: 2 files that --glob '**/*.txt' does not match, such as {tmp_path / 'in' / 'b.TXT'}" in done.stdout
    )
    assert (
        "not read"
        not in tokenise(tmp_path / "in", tmp_path / "all", plain, "--glob", "**/*.*", "--skip-bad-lines").stdout
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", "[]"), ("tokenizer_config.json", "{"), ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}, "merges": 5}}'), ("config.json", "{broken"),
    ],
)  # fmt: skip
def test_broken_files_of_a_tokenizer_are_one_line(plain, name, content, tmp_path):
    """A tokenizer_config.json that is a list ended in an AttributeError of transformers."""
    folder = Path(shutil.copytree(plain, tmp_path / "t"))
    (folder / name).write_text(content)
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    line = refusal(tokenise(tmp_path / "in.jsonl", tmp_path / "out", folder))
    assert f"--tokenizer-model {folder}" in line and not list(tmp_path.glob("out*"))
