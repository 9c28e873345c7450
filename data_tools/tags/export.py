"""The export step: the chosen records as data for any trainer, with scores, tags, branch and weight."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ksa.config.options import option
from megatron_ksa.data_tools.tags.canonicalise import EMBEDDINGS
from megatron_ksa.data_tools.tags.files import read_jsonl, write_jsonl
from megatron_ksa.data_tools.tags.ground import GROUNDING
from megatron_ksa.data_tools.tags.groups import Group, GroupSettings, check_repeated, groups_of, target_mass, weights_of
from megatron_ksa.data_tools.tags.pool import Pool, load_pool, read_records
from megatron_ksa.data_tools.tags.read import RECORDS
from megatron_ksa.data_tools.tags.selection import SELECTION, selected_rows
from megatron_ksa.data_tools.tags.step import Context, Step
from megatron_ksa.data_tools.tags.tag import TAGS
from megatron_ksa.data_tools.tags.tree import TREE
from megatron_ksa.errors import UsageError
from megatron_ksa.files import whole_file

FORMATS = ("none", "jsonl", "parquet")
EXPORT = "export"
ROWS_AT_ONCE = 4096
# Fields of a message that have a column in every Parquet file.
MESSAGE_TEXTS = ("role", "content", "reasoning_content", "tool_calls")


@dataclass(frozen=True)
class ExportSettings:
    """The chosen records as data.

    Raises:
        UsageError: a format that is none, or whose package is not installed.
    """

    format: str = option(
        "none", "Write the chosen records to export/selection.jsonl or .parquet, with scores, tags, branch and weight.",
        choices=FORMATS, flag="--export",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"--export {self.format}: not one of {', '.join(FORMATS)}")
        if self.format == "parquet":
            try:
                import pyarrow  # noqa: F401
            except ModuleNotFoundError:
                raise UsageError("--export parquet needs a package: pip install pyarrow") from None


def _tags(work: Path, ids: list[str]) -> dict[str, list[str]]:
    wanted = set(ids)
    return {row["id"]: row["tags"] for row in read_jsonl(work / TAGS) if row["id"] in wanted}


def _weights(pool: Pool, groups: list[Group], settings: GroupSettings, target: np.ndarray | None) -> list[float]:
    """How often an instance counts, 1 on average: the weight of its dataset, spread over the dataset.

    Without a tokenizer an instance counts as one token, so that by tokens all count alike.
    """
    every = list({group.prefix: group for group in groups}.values())
    weight_of = {
        group.prefix: weight / group.instances
        for group, weight in zip(every, weights_of(every, settings, target), strict=True)
    }
    weights = [weight_of[group.prefix] for group in groups]
    mean = sum(weights) / pool.instances
    return [weight / mean for weight in weights]


def exported_rows(work: Path, settings: GroupSettings, target: Path | None = None) -> Iterator[dict]:
    """The chosen records in the order of `records.jsonl`, each with what the selection knows of it.

    Args:
        target: the target's folder, for `weights="target"`.
    """
    selection = selected_rows(work, settings.of_budget)
    rank = np.argsort([row["row"] for row in selection], kind="stable")
    pool = load_pool(work, vectors=True)
    pool = pool.take(np.array([selection[place]["row"] for place in rank], np.int64))
    if not pool.instances:
        raise UsageError(f"{work / SELECTION}: nothing is chosen; run the sample step again")
    groups, branch = groups_of(work, pool, settings)
    check_repeated(groups, settings)
    for group, node in zip(groups, branch.tolist(), strict=True):
        group.add(node, np.ones(1, np.uint8))
    weights = _weights(pool, groups, settings, target_mass(work, target, settings))
    tags = _tags(work, [row["id"] for row in selection])
    for i, record in enumerate(read_records(work, pool.record)):
        place = int(rank[i])
        scores = {name: getattr(pool, name)[i] for name in ("quality", "difficulty")}
        yield {
            **{name: value for name, value in record.items() if name not in ("quality", "difficulty", "tags")},
            **{name: None if np.isnan(value) else float(value) for name, value in scores.items()},
            "tags": tags[record["id"]],
            "branch": None if branch[i] < 0 else str(pool.names[branch[i]]),
            "dataset": groups[i].name,
            "weight": weights[i],
            "rank": place,
            "gain": selection[place]["gain"],
            "budget": selection[place].get("budget", 1),
        }


def _other_fields(work: Path) -> list[str]:
    """Names of the fields that messages of the pool have beside the usual ones."""
    usual = (*MESSAGE_TEXTS, "weight")
    messages = (message for record in read_jsonl(work / RECORDS) for message in record.get("messages", ()))
    names = {name for message in messages for name in message}
    return sorted(names.difference(usual))


def _flat_message(message: dict) -> dict:
    """A message with the same columns as every other; what is no text is JSON."""
    as_text = {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in message.items() if name != "weight"
    }  # fmt: skip
    return as_text | {"weight": message.get("weight")}


def _write_parquet(path: Path, rows: Iterator[dict], other_fields: list[str]) -> int:
    import pyarrow
    from pyarrow import parquet

    text, number = pyarrow.string(), pyarrow.float64()
    message = pyarrow.struct([(name, text) for name in (*MESSAGE_TEXTS, *other_fields)] + [("weight", pyarrow.int8())])
    schema = pyarrow.schema(
        [("id", text), ("source", text), ("messages", pyarrow.list_(message)), ("tools", text), ("text", text),
         ("quality", number), ("difficulty", number), ("tags", pyarrow.list_(text)), ("branch", text),
         ("dataset", text), ("weight", number), ("rank", pyarrow.int64()), ("gain", number),
         ("budget", pyarrow.int64())]
    )  # fmt: skip
    count, batch = 0, []
    with whole_file(path, "wb") as stream, parquet.ParquetWriter(stream, schema) as writer:
        for row in rows:
            messages, tools = row.get("messages"), row.get("tools")
            row["messages"] = None if messages is None else [_flat_message(each) for each in messages]
            row["tools"] = json.dumps(tools, ensure_ascii=False) if tools else None
            batch.append(row)
            count += 1
            if len(batch) == ROWS_AT_ONCE:
                writer.write_table(pyarrow.Table.from_pylist(batch, schema))
                batch = []
        if batch:
            writer.write_table(pyarrow.Table.from_pylist(batch, schema))
    return count


def export(work: Path, settings: ExportSettings, groups: GroupSettings, target: Path | None = None) -> dict:
    """Write `export/selection.jsonl` or `export/selection.parquet`, and remove the other; returns counts."""
    rows, folder = exported_rows(work, groups, target), work / EXPORT
    path = folder / f"selection.{settings.format}"
    count = write_jsonl(path, rows) if settings.format == "jsonl" else _write_parquet(path, rows, _other_fields(work))
    for old in folder.iterdir():
        if old != path:
            old.unlink()
    return {"records": count}


def _run(context: Context, settings: ExportSettings, groups: GroupSettings) -> dict:
    return export(context.folder, settings, groups, context.target)


def _target(context: Context, settings: ExportSettings, groups: GroupSettings) -> dict[str, Path]:
    if context.target is None or groups.weights != "target":
        return {}
    return context.files(context.target, "target", GROUNDING)


def _wanted(context: Context, settings: ExportSettings, groups: GroupSettings) -> bool:
    return settings.format != "none"


STEP = Step(
    "export", {"export": ExportSettings, "writing": GroupSettings},
    reads=(RECORDS, TAGS, GROUNDING, TREE, EMBEDDINGS, SELECTION), writes=(EXPORT,),
    run=_run, also_reads=_target, wanted=_wanted,
)  # fmt: skip
