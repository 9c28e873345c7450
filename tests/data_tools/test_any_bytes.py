"""Any bytes as input of tools/preprocess_data.py give tokens that decode to the text, or a refusal by name.

What the text is, is worked out here a second time, from the formats' definitions and with other code.
"""

import codecs
import gzip
import io
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import pyarrow as pa
import pytest
import sentencepiece
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
from pyarrow import parquet
from run_tool import refusal, run_tool
from tokenizer_files import byte_level_tokenizer, sentencepiece_model
from tokenizers import Tokenizer as FastTokenizer

from megatron_ksa.data_tools import preprocess as preprocess_module
from megatron_ksa.data_tools import tokenizers as tokenizers_module

EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
# What goes wrong in texts: marks, separators, names of special tokens, halves of pairs, SentencePiece's space.
AWKWARD = [
    "\ufeff",
    "\u2028",
    "\r\n",
    "\r",
    "\0",
    "<|endoftext|>",
    "</s>",
    "<|user|>",
    "\u2581",
    "\ud800",
    "  ",
    "é",
    "\U0001f600",
]
TEXTS = st.lists(st.one_of(st.sampled_from(AWKWARD), st.text(max_size=8)), max_size=6).map("".join)


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def tokenizer(request, tmp_path_factory):
    """Path, function from ids to text and end-of-document id; each tokenizer is loaded once."""
    folder = tmp_path_factory.mktemp("tokenizer")
    plain = tokenizers_module.load_tokenizer
    with pytest.MonkeyPatch.context() as patch:
        for module in (tokenizers_module, preprocess_module):
            patch.setattr(module, "load_tokenizer", cache(plain))
        if request.param == "bytes":
            path = byte_level_tokenizer(folder / "t", ["<|user|>"])
            model = FastTokenizer.from_file(str(path / "tokenizer.json"))
            yield path, lambda ids: model.decode(ids, skip_special_tokens=False), plain(str(path)).end_of_document
        else:
            path = sentencepiece_model(folder / "t.model", user_defined_symbols=["<|user|>", "<|endoftext|>"])
            model = sentencepiece.SentencePieceProcessor(model_file=str(path))
            yield path, model.decode, model.eos_id()


def check(tokenizer, name: str, content: bytes, expected: list[str | None] | None) -> None:
    """Run the tool on a file or, for a text, on its folder, with and without --skip-bad-lines.

    Args:
        expected: text of each document, None for a bad one; None where the file as a whole is to be refused.
    """
    path, decode, end = tokenizer
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "in").mkdir()
        (folder / "in" / name).write_bytes(content)
        source = folder / "in" if ".txt" in name else folder / "in" / name
        arguments = ("--input", source, "--glob", "*", "--output-prefix", folder / "out", "--tokenizer-model", path)
        texts = [text for text in expected or () if text]
        for skip in (False, True):
            done = run_tool("preprocess_data.py", *arguments, *["--skip-bad-lines"] * skip, "--overwrite")
            if not texts or (None in expected and not skip):
                line = refusal(done)
                assert name in line or "(no document at all)" in line
                assert sorted(file.name for file in folder.iterdir()) == ["in"]
                continue
            assert done.returncode == 0, done.stderr
            dataset = IndexedDataset(str(folder / "out"))
            found = [dataset[i].tolist() for i in range(len(dataset))]
            assert all(ids[-1] == end and end not in ids[:-1] for ids in found)
            assert [decode(ids[:-1]) for ids in found] == texts
            left_out = folder / "out.skipped.jsonl"
            lines = left_out.read_text().splitlines() if left_out.exists() else []
            assert len(lines) == len(expected) - len(texts)
            assert all(name in json.loads(line)["origin"] and json.loads(line)["reason"] for line in lines)
    finally:
        shutil.rmtree(folder)


def text_of(content: bytes) -> str | None:
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError:
        return None


def text_of_line(line: bytes) -> str | None:
    """The text that a line of JSONL means; None for a bad line."""
    try:
        pairs = json.loads(line.removeprefix(codecs.BOM_UTF8).decode(), object_pairs_hook=tuple)
        names = [name for name, _ in pairs]
        text = dict(pairs)["text"]
        text.encode()
        return text if len(set(names)) == len(names) and isinstance(text, str) else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def texts_of_lines(content: bytes) -> list[str | None]:
    lines = [line.removeprefix(codecs.BOM_UTF8) for line in content.split(b"\n")]
    return [text_of_line(line) for line in lines if line.strip()]


RECORDS = st.builds(
    lambda text, ascii, other: json.dumps({**other, "text": text}, ensure_ascii=ascii).encode("utf-8", "surrogatepass"),
    TEXTS, st.booleans(), st.sampled_from([{}, {"id": 1}, {"meta": {"text": "no"}}]),
)  # fmt: skip
JUNK = st.one_of(
    st.binary(max_size=20),
    st.sampled_from([b"", b" ", b"[]", b"null", b'{"text": null}', b'{"text": "a", "text": "b"}', b'{"body": ""}',
                     b'{"text": "cut', b"[" * 2000, b'{"text": ' + b"9" * 5000 + b"}"]),
)  # fmt: skip
LINES = st.builds(
    lambda start, end, lines: start + end.join(lines),
    st.sampled_from([b"", codecs.BOM_UTF8]), st.sampled_from([b"\n", b"\r\n"]),
    st.lists(st.one_of(RECORDS, RECORDS, JUNK), max_size=6),
)  # fmt: skip
PACKED = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


@EXAMPLES
@given(content=st.one_of(LINES, st.binary(max_size=60)), packed=st.sampled_from(list(PACKED)))
def test_lines(tokenizer, content, packed):
    check(tokenizer, f"a.jsonl{packed}", PACKED[packed](content), texts_of_lines(content))


@EXAMPLES
@given(
    content=st.one_of(TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")), st.binary(max_size=60)),
    packed=st.sampled_from(list(PACKED)),
)
def test_text_files(tokenizer, content, packed):
    check(tokenizer, f"a.txt{packed}", PACKED[packed](content), [text_of(content)])


@EXAMPLES
@given(content=LINES, packed=st.sampled_from([".gz", ".zst"]), data=st.data())
def test_damaged_archives(tokenizer, content, packed, data):
    """A byte of an archive changed, or its end cut off: what it held, or one line."""
    whole = bytearray(PACKED[packed](content))
    if data.draw(st.booleans()):
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        del whole[data.draw(st.integers(0, len(whole) - 1)) :]
    try:
        if packed == ".gz":
            content = gzip.decompress(whole)
        else:
            frame = zstandard.ZstdDecompressor().decompressobj()
            content = frame.decompress(whole)
            if whole and not (frame.eof and not frame.unused_data):
                raise EOFError
    except (OSError, EOFError, gzip.zlib.error, zstandard.ZstdError):
        content = None
    # What stood before the damage may be read and refused for itself first; then too nothing is written.
    check(tokenizer, f"a.jsonl{packed}", bytes(whole), None if content is None else texts_of_lines(content))


@EXAMPLES
@given(content=st.lists(st.one_of(RECORDS, RECORDS, JUNK), max_size=5), space=st.sampled_from(["", "\n", " \r\n"]))
def test_arrays(tokenizer, content, space):
    joined = f"{space}[{space}".encode() + f"{space},{space}".encode().join(content) + f"]{space}".encode()
    try:
        elements = json.loads(joined.decode(), object_pairs_hook=lambda pairs: json.dumps(pairs))
        expected = [text_of_line(element) for element in whole_elements(joined.decode())] if elements else []
    except (ValueError, RecursionError):
        expected = None
    check(tokenizer, "a.json", joined, expected)


def whole_elements(text: str) -> list[bytes]:
    """The text of each element of an array that is valid."""
    decoder, found, at = json.JSONDecoder(), [], text.index("[") + 1
    while True:
        while text[at] in " \r\n\t,":
            at += 1
        if text[at] == "]":
            return found
        end = decoder.raw_decode(text, at)[1]
        found.append(text[at:end].encode("utf-8", "surrogatepass"))
        at = end


CELLS = st.one_of(
    st.none(), TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")), st.binary(max_size=10)
)  # fmt: skip
KINDS = [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary()), pa.string()]


def parquet_file(cells: list[bytes | None], kind: pa.DataType, compression: str) -> bytes:
    column = pa.array(cells, pa.binary())
    if kind == pa.string():  # unchecked, as other writers do it
        column = pa.Array.from_buffers(pa.string(), len(column), column.buffers(), column.null_count)
    elif pa.types.is_dictionary(kind):
        column = column.dictionary_encode()
    else:
        column = column.cast(kind)
    sink = io.BytesIO()
    parquet.write_table(pa.table({"id": range(len(cells)), "text": column}), sink, compression=compression)
    return sink.getvalue()


@EXAMPLES
@given(cells=st.lists(CELLS, max_size=6), kind=st.sampled_from(KINDS), compression=st.sampled_from(["none", "snappy"]))
def test_parquet(tokenizer, cells, kind, compression):
    expected = []
    for cell in cells:
        try:
            expected.append(None if cell is None else cell.decode())
        except UnicodeDecodeError:
            expected.append(None)
    check(tokenizer, "a.parquet", parquet_file(cells, kind, compression), expected)


@settings(EXAMPLES, max_examples=100)
@given(data=st.data(), cells=st.lists(CELLS, min_size=1, max_size=4))
def test_damaged_parquet(tokenizer, data, cells):
    """A byte of the file changed, or its end cut off: what the library reads, or one line; no exception."""
    whole = bytearray(parquet_file(cells, pa.binary(), "snappy"))
    if data.draw(st.booleans()):
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        del whole[data.draw(st.integers(0, len(whole) - 1)) :]
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "a.parquet").write_bytes(whole)
        done = run_tool(
            "preprocess_data.py", "--input", folder / "a.parquet", "--output-prefix", folder / "out",
            "--tokenizer-model", tokenizer[0], "--skip-bad-lines",
        )  # fmt: skip
        if done.returncode:
            assert "a.parquet" in refusal(done) or "(no document at all)" in done.stderr
            assert [file.name for file in folder.iterdir()] == ["a.parquet"]
        else:
            dataset = IndexedDataset(str(folder / "out"))
            found = [tokenizer[1](dataset[i].tolist()[:-1]) for i in range(len(dataset))]
            cells = parquet.read_table(folder / "a.parquet", columns=["text"])["text"].cast(pa.binary()).to_pylist()
            assert found == [text for cell in cells if cell and (text := plain_text(cell))]
    finally:
        shutil.rmtree(folder)


def plain_text(cell: bytes) -> str | None:
    try:
        return cell.decode()
    except UnicodeDecodeError:
        return None
