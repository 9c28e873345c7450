"""The reading step: raw files to `records.jsonl`, and every raw document left out to `rejected.jsonl` with why."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import batched
from pathlib import Path

from tqdm import tqdm

from megatron_ksa.data_tools.documents import BadDocument, RawDocument
from megatron_ksa.data_tools.tags.engine import Engine
from megatron_ksa.data_tools.tags.files import json_line
from megatron_ksa.data_tools.tags.formats import TABLE_SUFFIXES, read_raw, source_name
from megatron_ksa.data_tools.tags.records import RecordSettings, own_id, parse_record
from megatron_ksa.data_tools.tags.step import Context, Step
from megatron_ksa.errors import UsageError
from megatron_ksa.files import whole_file

RECORDS, REJECTED = "records.jsonl", "rejected.jsonl"
DUPLICATE = "duplicate id"
DOCUMENTS_PER_TASK = 256
# Fields of other names are counted together: a document may have any number.
FIELDS, OTHERS = 1000, "(others)"


@dataclass(frozen=True)
class _Parsed:
    """What came of one raw document.

    Args:
        origin: file and line.
        file: its file.
        bytes_read: bytes of input that it took.
        name: the record's id; of a document that is no record its own id, or `file:line`.
        record: None where it is left out.
        left: names of its fields that the record does not hold.
        reason, detail: why it is left out.
    """

    origin: str
    file: str
    bytes_read: int
    name: str
    record: dict | None = None
    left: tuple[str, ...] = ()
    reason: str = ""
    detail: str = ""


def _parse(documents: tuple[RawDocument, ...], settings: RecordSettings) -> list[_Parsed]:
    results = []
    for document in documents:
        file = document.origin.rpartition(":")[0] if document.is_json else document.origin
        place = document.origin, file, document.bytes_read
        from_table, source = file.lower().endswith(TABLE_SUFFIXES), source_name(Path(file))
        try:
            record, left = parse_record(document, source, settings, from_table=from_table)
            results.append(_Parsed(*place, record["id"], record, tuple(left)))
        except BadDocument as error:
            name = own_id(document, source, settings) or document.origin
            results.append(_Parsed(*place, name, reason=error.reason, detail=error.detail))
    return results


def _digest(*texts: str) -> int:
    """64 bits of a SHA-256: those of ten million ids take little memory."""
    return int.from_bytes(hashlib.sha256("\0".join(texts).encode("utf-8")).digest()[:8])


class _Ids:
    """The ids that were given.

    Within a file an id names one record. The same record under the same id in another file is a copy; another record is
    not, since shards and sources that were joined count from 1 again: it is kept under an id of its own.
    """

    def __init__(self) -> None:
        # Of each id the file that gave it first and the content, all as digests.
        self._seen: dict[int, tuple[int, int]] = {}

    def is_new(self, record: dict, file: str) -> bool:
        """Whether the record is to be kept; gives it another id where its own is taken by another file."""
        name = record["id"]
        content = _digest(json_line({key: record.get(key) for key in ("messages", "tools", "text")}))
        mine = _digest(file), content
        if _digest(name) not in self._seen:
            self._seen[_digest(name)] = mine
            return True
        first = self._seen[_digest(name)]
        record["id"] = f"{name}#{content:016x}"
        keys = _digest(file, name), _digest(record["id"])
        if first[0] == mine[0] or first[1] == content or any(key in self._seen for key in keys):
            return False
        self._seen |= dict.fromkeys(keys, mine)
        return True


def read(files: list[Path], folder: Path, settings: RecordSettings, engine: Engine) -> dict:
    """Write both files; returns counts: records, rejected by reason, sources, and fields that records do not hold.

    Raises:
        UsageError: no record that can be used.
    """
    ids, count = _Ids(), 0
    reasons: Counter[str] = Counter()
    first: dict[str, str] = {}
    sources: Counter[str] = Counter()
    left: Counter[str] = Counter()
    total = sum(path.stat().st_size for path in files)
    tasks = batched(read_raw(files), DOCUMENTS_PER_TASK)
    with (
        whole_file(folder / RECORDS) as records,
        whole_file(folder / REJECTED) as rejected,
        tqdm(total=total, unit="B", unit_scale=True, desc="read") as progress,
    ):
        for batch in engine.map(partial(_parse, settings=settings), tasks):
            for parsed in batch:
                progress.update(parsed.bytes_read)
                name, reason, detail = parsed.name, parsed.reason, parsed.detail
                if parsed.record is not None:
                    if ids.is_new(parsed.record, parsed.file):
                        count += 1
                        sources[parsed.record["source"]] += 1
                        left.update(each if each in left or len(left) < FIELDS else OTHERS for each in parsed.left)
                        records.write(json_line(parsed.record))
                        continue
                    reason, detail = DUPLICATE, "the first one is kept"
                reasons[reason] += 1
                first.setdefault(reason, f"{parsed.origin}: {detail}" if detail else parsed.origin)
                rejected.write(json_line({"origin": parsed.origin, "id": name, "reason": reason, "detail": detail}))
        if not count:
            said = [f"{each:,} {reason}, the first {first[reason]}" for reason, each in reasons.most_common(3)]
            raise UsageError(
                f"--input: no record that can be used ({'; '.join(said) or 'no line'}); data_tools/tags/README.md has "
                "the schemas"
            )
    return {
        "records": count, "rejected": sum(reasons.values()), "reasons": dict(reasons), "sources": dict(sources),
        "fields_not_carried": dict(left),
    }  # fmt: skip


def _run(context: Context, settings: RecordSettings) -> dict:
    return read(list(context.inputs), context.folder, settings, context.engine)


def _raw_files(context: Context, settings: RecordSettings) -> dict[str, Path]:
    return {f"input:{number}:{path.name}": path for number, path in enumerate(context.inputs)}


STEP = Step("read", {"records": RecordSettings}, reads=(), writes=(RECORDS, REJECTED), run=_run, also_reads=_raw_files)
