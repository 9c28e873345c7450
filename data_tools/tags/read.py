"""The reading step: raw files to `records.jsonl`, and every line left out to `rejected.jsonl` with its reason."""

from collections import Counter
from functools import partial
from itertools import batched
from pathlib import Path

from tqdm import tqdm

from megatron_ksa.data_tools.readers import JSONL_SUFFIXES, PARQUET_SUFFIX, BadDocument, RawDocument, read_documents
from megatron_ksa.data_tools.tags.engine import Engine
from megatron_ksa.data_tools.tags.files import json_line
from megatron_ksa.data_tools.tags.records import RecordSettings, parse_record
from megatron_ksa.data_tools.tags.step import Context, Step
from megatron_ksa.errors import UsageError
from megatron_ksa.files import whole_file

RECORDS, REJECTED = "records.jsonl", "rejected.jsonl"
DUPLICATE = "duplicate id"
DOCUMENTS_PER_TASK = 256


def source_name(path: Path) -> str:
    """A file's name without the suffixes that tell its format; of a text file in a folder, the folder's name."""
    for suffix in sorted((*JSONL_SUFFIXES, PARQUET_SUFFIX), key=len, reverse=True):
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix) or path.name
    return path.parent.name or path.stem


def _source(document: RawDocument) -> str:
    return source_name(Path(document.origin.rpartition(":")[0] if document.is_json else document.origin))


def _parse(
    documents: tuple[RawDocument, ...], settings: RecordSettings
) -> list[tuple[str, int, dict | tuple[str, str]]]:
    """For each document its origin, the bytes read, and its record or why it is left out."""
    results = []
    for document in documents:
        try:
            result = parse_record(document, _source(document), settings)
        except BadDocument as error:
            result = (error.reason, error.detail)
        results.append((document.origin, document.bytes_read, result))
    return results


def read(files: list[Path], folder: Path, settings: RecordSettings, engine: Engine) -> dict:
    """Write both files; returns counts: records, rejected, sources, and rejected by reason.

    Raises:
        UsageError: no record that can be used.
    """
    seen: set[str] = set()
    reasons: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    total = sum(path.stat().st_size for path in files)
    tasks = batched(read_documents(files), DOCUMENTS_PER_TASK)
    with (
        whole_file(folder / RECORDS) as records,
        whole_file(folder / REJECTED) as rejected,
        tqdm(total=total, unit="B", unit_scale=True, desc="read") as progress,
    ):
        for batch in engine.map(partial(_parse, settings=settings), tasks):
            for origin, consumed, result in batch:
                progress.update(consumed)
                if isinstance(result, dict) and result["id"] not in seen:
                    seen.add(result["id"])
                    sources[result["source"]] += 1
                    records.write(json_line(result))
                    continue
                name = result["id"] if isinstance(result, dict) else None
                reason, detail = (DUPLICATE, "the first one is kept") if name is not None else result
                reasons[reason] += 1
                rejected.write(json_line({"origin": origin, "id": name, "reason": reason, "detail": detail}))
        if not seen:
            found = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common()) or "no line"
            raise UsageError(
                f"--input: no record that can be used ({found}); see data_tools/tags/README.md for the schemas"
            )
    return {"records": len(seen), "rejected": sum(reasons.values()), "reasons": dict(reasons), "sources": dict(sources)}


def _run(context: Context, settings: RecordSettings) -> dict:
    return read(list(context.inputs), context.folder, settings, context.engine)


def _raw_files(context: Context, settings: RecordSettings) -> dict[str, Path]:
    return {f"input:{number}:{path.name}": path for number, path in enumerate(context.inputs)}


STEP = Step("read", {"records": RecordSettings}, reads=(), writes=(RECORDS, REJECTED), run=_run, also_reads=_raw_files)
