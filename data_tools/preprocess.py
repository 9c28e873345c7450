"""Documents to an indexed dataset: worker processes tokenise, one process writes, in the order of the input."""

import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import batched
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_ksa.data_tools.indexed import IndexedDatasetWriter
from megatron_ksa.data_tools.readers import BadDocument, RawDocument, decoded, json_object, read_documents
from megatron_ksa.data_tools.tokenizers import Tokenizer, load_tokenizer
from megatron_ksa.errors import UsageError

DOCUMENTS_PER_TASK = 64


@dataclass(frozen=True)
class PreprocessSettings:
    """What one run does.

    Args:
        files: input files in order.
        output_prefix: path of the dataset without `.bin` and `.idx`.
        tokenizer_model: as `load_tokenizer` takes it.
        json_key: field of a JSONL record that holds the text.
        append_eod: end every document with the tokenizer's end-of-document id.
        workers: tokenising processes; the bytes written do not depend on it.
        skip_bad_lines: count and skip documents that cannot be read, instead of stopping at the first.
        overwrite: replace a dataset of this name.
    """

    files: list[Path]
    output_prefix: str
    tokenizer_model: str
    json_key: str = "text"
    append_eod: bool = True
    workers: int = 1
    skip_bad_lines: bool = False
    overwrite: bool = False


@dataclass
class PreprocessCounts:
    """What came of a run, in documents and tokens."""

    documents: int = 0
    tokens: int = 0
    empty: int = 0
    bad: int = 0


def document_text(document: RawDocument, json_key: str) -> str:
    """The text of a raw document.

    Raises:
        BadDocument: invalid UTF-8 or JSON, not an object, or no text under the key.
    """
    if not document.is_json:
        return decoded(document.payload)
    record = json_object(document.payload)
    if not isinstance(record.get(json_key), str):
        raise BadDocument(
            f"no text under {json_key!r} (--json-key); its fields: {', '.join(map(repr, record)) or 'none'}"
        )
    return record[json_key]


# A worker process's own, from `_start_worker` on.
_tokenizer: Tokenizer


def _start_worker(tokenizer_model: str) -> None:
    global _tokenizer
    _tokenizer = load_tokenizer(tokenizer_model)


def _tokenise(documents: tuple[RawDocument, ...], json_key: str) -> list[np.ndarray | str]:
    """For each document its ids, int32 [tokens], or why it is bad."""
    results: list[np.ndarray | str] = []
    for document in documents:
        try:
            # A lone surrogate, which JSON can escape, has no UTF-8 and so no bytes to tokenise.
            text = document_text(document, json_key).encode("utf-8").decode("utf-8")
            results.append(np.array(_tokenizer.encode(text), dtype=np.int32))
        except BadDocument as error:
            results.append(str(error))
        except UnicodeEncodeError as error:
            results.append(f"invalid UTF-8 ({error.reason})")
    return results


def _tokenised(
    documents: Iterable[RawDocument], settings: PreprocessSettings
) -> Iterator[tuple[RawDocument, np.ndarray | str]]:
    """Documents with their ids, in order; a bounded number is in flight."""
    tasks = batched(documents, DOCUMENTS_PER_TASK)
    if settings.workers == 1:
        _start_worker(settings.tokenizer_model)
        for task in tasks:
            yield from zip(task, _tokenise(task, settings.json_key), strict=True)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        settings.workers, mp_context=context, initializer=_start_worker, initargs=(settings.tokenizer_model,)
    ) as pool:
        pending: deque[tuple[tuple[RawDocument, ...], Future]] = deque()
        try:
            for task in tasks:
                pending.append((task, pool.submit(_tokenise, task, settings.json_key)))
                if len(pending) >= 4 * settings.workers:
                    task, future = pending.popleft()
                    yield from zip(task, future.result(), strict=True)
            for task, future in pending:
                yield from zip(task, future.result(), strict=True)
        except BrokenProcessPool:
            raise UsageError(f"--workers {settings.workers}: a worker died, out of memory perhaps; use fewer") from None
        finally:
            pool.shutdown(cancel_futures=True)


def preprocess(settings: PreprocessSettings) -> PreprocessCounts:
    """Tokenise the files and write one indexed dataset; nothing that looks complete is left by an interrupted run.

    Raises:
        UsageError: a bad document (file and line named) without `skip_bad_lines`, an output that exists, no tokens.
    """
    tokenizer = load_tokenizer(settings.tokenizer_model)
    counts = PreprocessCounts()
    total = sum(path.stat().st_size for path in settings.files)
    with (
        IndexedDatasetWriter(settings.output_prefix, tokenizer.vocab_size, overwrite=settings.overwrite) as writer,
        tqdm(total=total, unit="B", unit_scale=True, desc="tokenise") as progress,
    ):
        for document, tokens in _tokenised(read_documents(settings.files), settings):
            progress.update(document.bytes_read)
            if isinstance(tokens, str):
                if not settings.skip_bad_lines:
                    raise UsageError(f"{document.origin}: {tokens}; mend it or pass --skip-bad-lines")
                counts.bad += 1
                progress.write(f"skipped {document.origin}: {tokens}")
            elif not len(tokens):
                counts.empty += 1
            else:
                if settings.append_eod:
                    tokens = np.append(tokens, np.int32(tokenizer.end_of_document))
                writer.add_document(tokens)
                counts.documents += 1
                counts.tokens += len(tokens)
        if not counts.documents:
            raise UsageError(f"no document with text in the input ({counts.empty} empty, {counts.bad} bad)")
    return counts
