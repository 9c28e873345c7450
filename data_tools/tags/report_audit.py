"""What was left out, merged and set on the way to a selection, for the report: counts of all, rows of some."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from itertools import islice
from pathlib import Path

from megatron_ksa.config.options import flag
from megatron_ksa.data_tools.tags import (
    canonicalise,
    decontaminate,
    export,
    ground,
    naming,
    read,
    selection,
    tag,
    tree,
    write,
)
from megatron_ksa.data_tools.tags import duplicates as duplicates_step
from megatron_ksa.data_tools.tags.canonicalise import MERGES
from megatron_ksa.data_tools.tags.decontaminate import CONTAMINATED, TARGET
from megatron_ksa.data_tools.tags.duplicates import DUPLICATES
from megatron_ksa.data_tools.tags.files import read_jsonl
from megatron_ksa.data_tools.tags.ground import UNPLACED
from megatron_ksa.data_tools.tags.manifest import MANIFEST
from megatron_ksa.data_tools.tags.read import RECORDS, REJECTED
from megatron_ksa.data_tools.tags.records import message_text
from megatron_ksa.data_tools.tags.selection import UNWRITABLE
from megatron_ksa.data_tools.tags.tag import FAILED
from megatron_ksa.data_tools.tags.write import BLEND, UNWRITTEN
from megatron_ksa.files import LIST_BYTES, read_small

LEFT_OUT = {
    REJECTED: "could not be read",
    FAILED: "could not be tagged",
    DUPLICATES: "near-duplicates",
    UNPLACED: "no tag on the tree",
    CONTAMINATED: "hold evaluation data",
    UNWRITABLE: "cannot be written",
    f"{BLEND}/{UNWRITTEN}": "chosen, but not written",
}
# Those whose settings the report shows by their flags.
STEPS = (
    read.STEP, tag.STEP, duplicates_step.STEP, canonicalise.STEP, tree.STEP, naming.STEP, ground.STEP,
    decontaminate.STEP, selection.STEP, export.STEP, write.STEP,
)  # fmt: skip
MERGE_ROWS, DUPLICATE_ROWS, FAILED_ROWS = 2000, 200, 200
CELL, PAIR_TEXT = 200, 300


def left_out(work: Path) -> dict[str, dict[str, int]]:
    """For each file of instances that are left out, how many there are for each reason."""
    return {
        name: dict(sorted(Counter(
            row.get("reason", reason) for row in read_jsonl(work / name) if row.get("left_out", True)
        ).items()))
        for name, reason in LEFT_OUT.items()
        if (work / name).exists()
    }  # fmt: skip


def _cell(value: object) -> object:
    if value is None or isinstance(value, bool):
        return "" if value is None else str(value).lower()
    if isinstance(value, int | float):
        return round(value, 4)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= CELL else text[:CELL] + " …"


def _table(title: str, rows: list[dict], total: int) -> dict:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name)) for name in columns] for row in rows]
    return {"title": title, "columns": columns, "rows": cells, "total": total}


def _spread(path: Path, most: int) -> tuple[list[dict], int]:
    """At most so many rows of a file, spread evenly, and how many there are."""
    if not path.exists():
        return [], 0
    total = sum(1 for _ in read_jsonl(path))
    step = max(1, -(-total // most))
    return list(islice(read_jsonl(path), 0, None, step)), total


def _texts(work: Path, ids: set[str], excerpt: int) -> dict[str, str]:
    """Starts of the records of these ids."""
    found: dict[str, str] = {}
    for record in read_jsonl(work / RECORDS):
        if record["id"] in ids:
            found[record["id"]] = record_excerpt(record, excerpt)
            if len(found) == len(ids):
                break
    return found


def record_excerpt(record: dict, most: int) -> str:
    """The start of a record's text, its turns with their roles."""
    text = record.get("text")
    if text is None:
        text = "\n".join(f"[{message['role']}] {message_text(message)}" for message in record["messages"])
    return text if len(text) <= most else text[:most] + " …"


def merges(work: Path) -> dict:
    """Tags that became others."""
    return _table("merged tags", *_spread(work / MERGES, MERGE_ROWS))


def duplicates(work: Path) -> dict:
    """Instances left out as near-duplicates, with the text of both sides."""
    rows, total = _spread(work / DUPLICATES, DUPLICATE_ROWS)
    texts = _texts(work, {str(row[side]) for row in rows for side in ("id", "kept") if row.get(side)}, PAIR_TEXT)
    full = [
        row | {"text": texts.get(str(row.get("id")), ""), "text of the one kept": texts.get(str(row.get("kept")), "")}
        for row in rows
    ]
    return _table("near-duplicates left out", full, total)


def contaminated(work: Path) -> dict:
    """Instances that hold a question of the target or another evaluation, with the matching texts."""
    return _table("instances with evaluation data", *_spread(work / CONTAMINATED, DUPLICATE_ROWS))


def failures(work: Path) -> dict:
    """Instances without tags, with what was said about them."""
    return _table("instances without tags", *_spread(work / FAILED, FAILED_ROWS))


def _flat(settings: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _flags() -> dict[tuple[str, str], str]:
    """The flag of each setting of a step."""
    return {
        (step.name, field.name): flag(field, "")
        for step in STEPS for config in step.settings.values() for field in fields(config)
    }  # fmt: skip


def _done(work: Path) -> dict[str, dict]:
    path = work / MANIFEST
    return json.loads(read_small(path, limit=LIST_BYTES))["steps"] if path.exists() else {}


def _files(steps: dict[str, dict], flags: dict[str, str]) -> list[dict]:
    """Names of the files that flags gave, which a manifest has as `input:0:NAME`."""
    named = [(step, *name.split(":", 2)) for step, done in steps.items() for name in done["inputs"] if ":" in name]
    return [
        {"step": step, "setting": flags[kind], "value": rest[-1]}
        for step, kind, *rest in named if kind in flags and rest[-1]
    ]  # fmt: skip


def settings(work: Path) -> dict:
    """Settings of each step's last run by their flags, and the names of what was read."""
    steps, flags = _done(work), _flags()
    rows = _files(steps, {"input": "--input", "evaluation": "--decontaminate", "batch": "--batch-in"})
    rows += _files(_done(work / TARGET), {"input": "--target"})
    rows += [
        {"step": step, "setting": flags.get((step, name), name), "value": value}
        for step, done in steps.items() for name, value in _flat(done["settings"]) if step != "report"
    ]  # fmt: skip
    return _table("settings", rows, len(rows))
