"""The grounding step: instances on the leaves of a tree, of the pool it was built from or of new data."""

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import batched
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array
from tqdm import tqdm

from megatron_ksa.config.options import option
from megatron_ksa.data_tools.tags.canonicalise import EMBEDDER, EMBEDDINGS, MERGES, TagTable, nearest
from megatron_ksa.data_tools.tags.embed import load_embedder
from megatron_ksa.data_tools.tags.engine import Engine
from megatron_ksa.data_tools.tags.files import read_jsonl, write_arrays, write_jsonl
from megatron_ksa.data_tools.tags.read import RECORDS
from megatron_ksa.data_tools.tags.records import record_text
from megatron_ksa.data_tools.tags.step import Context, Step
from megatron_ksa.data_tools.tags.tag import TAGS
from megatron_ksa.data_tools.tags.tagged import DUPLICATES, kept_lines, kept_tags, kept_texts
from megatron_ksa.data_tools.tags.tree import TREE, TREE_FILES, load_tree, read_vocabulary
from megatron_ksa.errors import UsageError

GROUNDING, UNPLACED, PLACED = "grounding.npz", "unplaced.jsonl", "placed_tags.jsonl"
RECORDS_PER_TASK = 256


@dataclass(frozen=True)
class GroundSettings:
    """New tags on a tree built before.

    Raises:
        UsageError: a cosine out of range.
    """

    cosine: float = option(
        0.5, "Cosine from which a tag that the tree does not know counts as its nearest leaf.", flag="--place-cosine"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.cosine <= 1:
            raise UsageError(f"--place-cosine {self.cosine}: from 0 to 1")


def _canonical(tree_folder: Path) -> dict[str, int]:
    """Canonical tag of every folded tag that the tree's pool had."""
    names, _ = read_vocabulary(tree_folder)
    known = {name: tag for tag, name in enumerate(names)}
    into = {row["tag"]: row["into"] for row in read_jsonl(tree_folder / MERGES) if row["reason"] != "folding"}
    for name, target in into.items():
        while target not in known:
            target = into[target]
        known.setdefault(name, known[target])
    return known


def _place(
    folder: Path, tree_folder: Path, table: TagTable, unknown: list[int], settings: GroundSettings, engine: Engine
) -> Iterator[tuple[int, int, float]]:
    """Unknown tags that are near enough to a canonical one, with it and the cosine."""
    embedder = load_embedder(tree_folder / EMBEDDER, engine)
    carried = csr_array(csr_array(table.carried.T)[np.array(unknown)])
    vectors = embedder.embed([table.names[tag] for tag in unknown], carried, partial(kept_texts, folder))
    found, cosine = nearest(vectors, np.load(tree_folder / EMBEDDINGS))
    for tag, other, near in zip(unknown, found, cosine, strict=True):
        if near >= settings.cosine:
            yield tag, int(other), float(near)


def _leaves(carried: csr_array, leaf: np.ndarray, known: np.ndarray) -> csr_array:
    """[instances, nodes] with an entry for each leaf of an instance, rising.

    Args:
        carried: [instances, tags].
        leaf: int64 [tags], leaf of each tag that is on the tree.
        known: bool [tags], whether it is.
    """
    stays = known[carried.indices]
    indptr = np.concatenate([[0], np.cumsum(stays)])[carried.indptr]
    columns = leaf[carried.indices[stays]].astype(np.int32)
    entries = (np.ones(len(columns), np.int8), columns, indptr)
    result = csr_array(entries, shape=(carried.shape[0], int(columns.max(initial=0)) + 1))
    result.sum_duplicates()
    return result


def _measure(lines: tuple[tuple[bytes, bytes], ...]) -> dict[str, np.ndarray]:
    """Characters of text and scores of each instance, NaN where there is none."""
    rows = [json.loads(tags) for _, tags in lines]
    lengths = [len(record_text(json.loads(record))) for record, _ in lines]
    scores = {name: [np.nan if row[name] is None else row[name] for row in rows] for name in ("quality", "difficulty")}
    return {"length": np.array(lengths, np.int64), **{name: np.array(row, np.float64) for name, row in scores.items()}}


def _measures(folder: Path, engine: Engine, total: int) -> dict[str, np.ndarray]:
    """For each instance its line, characters and scores: int64, int64, float64, float64 [instances]."""
    numbers = array("q")  # 8 bytes an instance, without an object for each

    def tasks() -> Iterator[tuple[tuple[bytes, bytes], ...]]:
        for batch in batched(kept_lines(folder), RECORDS_PER_TASK):
            numbers.extend(each.line for each in batch)
            yield tuple((each.record, each.tags) for each in batch)

    with tqdm(total=total, desc="ground", unit=" records") as progress:
        found = []
        for part in engine.map(_measure, tasks()):
            found.append(part)
            progress.update(len(part["length"]))
    arrays = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    return {"record": np.frombuffer(numbers, np.int64), **arrays}


def ground(folder: Path, tree_folder: Path, settings: GroundSettings, engine: Engine) -> dict:
    """Write `grounding.npz`, `placed_tags.jsonl` and `unplaced.jsonl`; returns counts.

    Args:
        folder: work folder of the instances.
        tree_folder: work folder of the tree; the same for the pool that it was built from.

    Raises:
        UsageError: no instance has a tag on the tree.
    """
    tree, known = load_tree(tree_folder / TREE), _canonical(tree_folder)
    names, _ = read_vocabulary(tree_folder)
    table = TagTable(kept_tags(folder))
    canonical = np.array([known.get(name, -1) for name in table.names], np.int64)
    placed = []
    unknown = np.flatnonzero(canonical < 0).tolist()
    if unknown:
        for tag, other, near in _place(folder, tree_folder, table, unknown, settings, engine):
            canonical[tag] = other
            placed.append({"tag": table.names[tag], "into": names[other], "similarity": round(near, 4)})
    on_leaves = _leaves(table.carried, tree.leaf_of_tag[canonical], canonical >= 0)
    placed_rows = np.flatnonzero(np.diff(on_leaves.indptr))
    if not len(placed_rows):
        raise UsageError(f"{folder}: none of its tags is on the tree of {tree_folder}; tag both with the same tagger")
    arrays = _measures(folder, engine, table.carried.shape[0])
    unplaced = np.diff(on_leaves.indptr) == 0
    write_jsonl(folder / PLACED, placed)
    rows = (json.loads(each.tags) for each, none in zip(kept_lines(folder), unplaced, strict=True) if none)
    write_jsonl(folder / UNPLACED, ({"id": row["id"], "tags": row["tags"]} for row in rows))
    write_arrays(
        folder / GROUNDING, indptr=on_leaves.indptr[np.append(placed_rows, len(unplaced))].astype(np.int64),
        leaves=on_leaves.indices.astype(np.int32), **{name: values[placed_rows] for name, values in arrays.items()},
    )  # fmt: skip
    counts = {"instances": len(placed_rows), "unplaced": int(unplaced.sum()), "unknown_tags": len(unknown)}
    return counts | {"placed_tags": len(placed), "tags": on_leaves.nnz}


def _run(context: Context, settings: GroundSettings) -> dict:
    return ground(context.folder, context.tree_folder, settings, context.engine)


def _tree(context: Context, settings: GroundSettings) -> dict[str, Path]:
    return context.files(context.tree_folder, "tree", *TREE_FILES)


STEP = Step(
    "ground", {"grounding": GroundSettings}, reads=(RECORDS, TAGS, DUPLICATES), writes=(GROUNDING, PLACED, UNPLACED),
    run=_run, also_reads=_tree,
)  # fmt: skip
