"""Documents to an indexed dataset: worker processes tokenise, one process writes, in the order of the input."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_ksa.data_tools.documents import INVALID_UTF8, BadDocument, RawDocument, decoded, json_object
from megatron_ksa.data_tools.indexed import IndexedDatasetWriter, check_prefix, loss_mask_prefix
from megatron_ksa.data_tools.plain_encoding import ContentError
from megatron_ksa.data_tools.readers import read_documents
from megatron_ksa.data_tools.released import is_released, open_released, released_documents
from megatron_ksa.data_tools.skipped import SkipLog
from megatron_ksa.data_tools.tokenizers import Tokenizer, load_tokenizer
from megatron_ksa.data_tools.workers import TASKS_IN_FLIGHT, results_in_order, start_pool
from megatron_ksa.errors import UsageError
from megatron_ksa.locks import exclusive

# A task ends with the document that reaches either; four tasks a worker are in flight.
DOCUMENTS_PER_TASK, BYTES_PER_TASK = 64, 4_000_000
# Tokenizer libraries take 40 (SentencePiece) to 200 bytes (Hugging Face, bytes as tokens) for each byte of a document.
MAX_DOCUMENT_BYTES = 10_000_000
EMPTY = "empty"


@dataclass(frozen=True)
class PreprocessSettings:
    """What one run does.

    Args:
        files: input files in order; `.bin` files are of the released format (`released.py`).
        output_prefix: path of the dataset without `.bin` and `.idx`.
        tokenizer_model: as `load_tokenizer` takes it.
        json_key: field of a JSONL record, or column of a Parquet file, that holds the text.
        append_eod: end every document with the tokenizer's end-of-document id.
        workers: tokenising processes; the bytes written do not depend on it.
        skip_bad_lines: leave out and list documents that cannot be read, instead of stopping at the first.
        overwrite: replace a dataset of this name.
        max_document_bytes: larger documents are bad.
    """

    files: list[Path]
    output_prefix: str
    tokenizer_model: str
    json_key: str = "text"
    append_eod: bool = True
    workers: int = 1
    skip_bad_lines: bool = False
    overwrite: bool = False
    max_document_bytes: int = MAX_DOCUMENT_BYTES


@dataclass
class PreprocessCounts:
    """What came of a run, in documents and tokens; `listed` names the file of what is left out, if anything is."""

    documents: int = 0
    tokens: int = 0
    unknown_tokens: int = 0
    empty: int = 0
    bad: int = 0
    listed: Path | None = None


@dataclass(frozen=True)
class _Document:
    """A document on its way to the dataset: its ids, integer [tokens], and mask, uint8 [tokens], or why it is bad."""

    origin: str
    bytes_read: int
    tokens: np.ndarray | None = None
    mask: np.ndarray | None = None
    problem: tuple[str, str] | None = None


def document_text(document: RawDocument, json_key: str) -> str:
    """The text of a raw document.

    Raises:
        BadDocument: unreadable, invalid UTF-8 or JSON, not an object, or no text under the key.
    """
    if not document.is_json:
        return decoded(document.payload)
    record = json_object(document.payload)
    if not isinstance(record.get(json_key), str):
        raise BadDocument(
            "no text",
            f"no text under {json_key!r} (--json-key); its fields: {', '.join(map(repr, record))[:500] or 'none'}",
        )
    text = record[json_key]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can escape half of a surrogate pair, which has no UTF-8 and so no bytes to tokenise.
        raise BadDocument(INVALID_UTF8, error.reason) from None
    return text


# A worker process's own, from `_start_worker` on.
_tokenizer: Tokenizer


def _start_worker(tokenizer_model: str) -> None:
    global _tokenizer
    _tokenizer = load_tokenizer(tokenizer_model)


def _tokenise(documents: list[RawDocument], json_key: str) -> list[np.ndarray | tuple[str, str]]:
    """For each document its ids, int32 [tokens], or why it is bad: reason and detail."""
    results: list[np.ndarray | tuple[str, str]] = []
    for document in documents:
        try:
            results.append(np.array(_tokenizer.encode_content(document_text(document, json_key)), dtype=np.int32))
        except BadDocument as error:
            results.append((error.reason, error.detail))
        except ContentError as error:
            results.append((error.reason, str(error)))
    return results


def _tasks(documents: Iterable[RawDocument]) -> Iterator[list[RawDocument]]:
    """Documents in lists that bound what is in flight."""
    task, size = [], 0
    for document in documents:
        task.append(document)
        size += len(document.content)
        if len(task) == DOCUMENTS_PER_TASK or size >= BYTES_PER_TASK:
            yield task
            task, size = [], 0
    if task:
        yield task


def _results(task: list[RawDocument], results: list[np.ndarray | tuple[str, str]]) -> Iterator[_Document]:
    for document, result in zip(task, results, strict=True):
        if isinstance(result, tuple):
            yield _Document(document.origin, document.bytes_read, problem=result)
        else:
            yield _Document(document.origin, document.bytes_read, tokens=result)


def _tokenised(
    documents: Iterable[RawDocument], settings: PreprocessSettings, tokenizer: Tokenizer
) -> Iterator[_Document]:
    """Documents with their ids, in order; a bounded number is in flight."""
    if settings.workers == 1:
        _start_worker(settings.tokenizer_model)
        for task in _tasks(documents):
            yield from _results(task, _tokenise(task, settings.json_key))
        return
    taken: deque[list[RawDocument]] = deque()

    def tasks() -> Iterator[list[RawDocument]]:
        for task in _tasks(documents):
            taken.append(task)
            yield task

    tokenise = partial(_tokenise, json_key=settings.json_key)
    pool = start_pool(settings.workers, [__name__, *tokenizer.imports], _start_worker, (settings.tokenizer_model,))
    try:
        for results in results_in_order(pool, tokenise, tasks(), TASKS_IN_FLIGHT * settings.workers):
            yield from _results(taken.popleft(), results)
    except BrokenProcessPool:
        raise UsageError(
            f"--workers {settings.workers}: a worker died, out of memory perhaps; use fewer, or a lower "
            "--max-document-bytes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _released(files: Iterable[Path], tokenizer: Tokenizer) -> Iterator[_Document]:
    """Documents of the released format, which are tokenised already."""
    for path in files:
        data = open_released(path)
        documents = released_documents(data, tokenizer.end_of_document, tokenizer.vocab_size)
        for number, (tokens, mask) in enumerate(documents, start=1):
            yield _Document(f"{path}:{number}", len(tokens) * data.dtype.itemsize, tokens, mask)


def _documents(settings: PreprocessSettings, tokenizer: Tokenizer) -> Iterator[_Document]:
    for released, files in groupby(settings.files, is_released):
        if released:
            yield from _released(files, tokenizer)
            continue
        raw = read_documents(list(files), max_bytes=settings.max_document_bytes, text_column=settings.json_key)
        for document in _tokenised(raw, settings, tokenizer):
            if document.tokens is not None and len(document.tokens) and settings.append_eod:
                tokens = np.append(document.tokens, np.int32(tokenizer.end_of_document))
                document = _Document(document.origin, document.bytes_read, tokens)
            yield document


def _remove_masks(prefix: str) -> None:
    """A mask of an earlier dataset of this name must not be taken for this one's."""
    for suffix in (".idx", ".bin"):
        Path(loss_mask_prefix(prefix) + suffix).unlink(missing_ok=True)


def preprocess(settings: PreprocessSettings) -> PreprocessCounts:
    """Tokenise the files and write one indexed dataset; nothing that looks complete is left by an interrupted run.

    Documents left out are in PREFIX.skipped.jsonl. Released data with a loss mask gives the dataset one, in which
    documents without a mask count everywhere.

    Raises:
        UsageError: a bad document (file and line named) without `skip_bad_lines`, an output that exists or that another
            run writes, a tokenizer without an end of document where one is needed, no tokens, a full disk.
    """
    check_prefix(settings.output_prefix)
    tokenizer = load_tokenizer(settings.tokenizer_model)
    if settings.append_eod:
        _ = tokenizer.end_of_document  # refused before anything is written
    released = [open_released(path) for path in settings.files if is_released(path)]
    masked = any(data.mask for data in released)
    prefix, counts = settings.output_prefix, PreprocessCounts()
    total = sum(path.stat().st_size for path in settings.files)
    with ExitStack() as stack:
        lock = stack.enter_context(exclusive(prefix, "tools/preprocess_data.py"))
        skipped = stack.enter_context(SkipLog(Path(f"{prefix}.skipped.jsonl")))

        def ready() -> None:
            lock.check()
            if not masked:
                _remove_masks(prefix)

        def writer(name: str, size: int, dtype: type[np.integer] | None = None) -> IndexedDatasetWriter:
            return stack.enter_context(
                IndexedDatasetWriter(name, size, overwrite=settings.overwrite, dtype=dtype, check=ready)
            )

        mask_name = loss_mask_prefix(prefix)
        if not masked and not settings.overwrite and Path(f"{mask_name}.idx").exists():
            raise UsageError(f"{mask_name}.idx exists, the loss mask of another dataset: pass --overwrite to remove it")
        tokens_writer = writer(prefix, tokenizer.vocab_size)
        mask_writer = writer(mask_name, 2, np.uint8) if masked else None
        progress = stack.enter_context(tqdm(total=total, unit="B", unit_scale=True, desc="tokenise"))
        for document in _documents(settings, tokenizer):
            progress.update(document.bytes_read)
            if document.problem is not None:
                reason, detail = document.problem
                if not settings.skip_bad_lines:
                    raise UsageError(
                        f"{document.origin}: {BadDocument(reason, detail)}; mend it or pass --skip-bad-lines"
                    )
                counts.bad += 1
                skipped.add(document.origin, reason, detail)
            elif not len(document.tokens):
                counts.empty += 1
                skipped.add(document.origin, EMPTY)
            else:
                tokens_writer.add_document(document.tokens)
                if mask_writer is not None:
                    mask = document.mask
                    mask_writer.add_document(np.ones(len(document.tokens), np.uint8) if mask is None else mask)
                counts.documents += 1
                counts.tokens += len(document.tokens)
                if tokenizer.unknown is not None:
                    counts.unknown_tokens += int((document.tokens == tokenizer.unknown).sum())
        if not counts.documents:
            raise UsageError(f"no document with text in the input ({skipped.why or 'no document at all'})")
        for each in filter(None, (tokens_writer, mask_writer)):
            each.prepare()
        counts.listed = skipped.path if skipped.reasons else None
    return counts
