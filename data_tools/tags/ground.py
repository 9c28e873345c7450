"""The grounding step: instances on the leaves of a tree, of the pool it was built from or of new data."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array

from megatron_ksa.config.options import option
from megatron_ksa.data_tools.tags.canonicalise import EMBEDDER, EMBEDDINGS, MERGES, TagTable, kept_instances, nearest
from megatron_ksa.data_tools.tags.duplicates import DUPLICATES
from megatron_ksa.data_tools.tags.embed import load_embedder
from megatron_ksa.data_tools.tags.engine import Engine
from megatron_ksa.data_tools.tags.files import read_jsonl, write_arrays, write_jsonl
from megatron_ksa.data_tools.tags.read import RECORDS
from megatron_ksa.data_tools.tags.records import record_text
from megatron_ksa.data_tools.tags.step import Context, Step
from megatron_ksa.data_tools.tags.tag import TAGS
from megatron_ksa.data_tools.tags.tree import TREE, TREE_FILES, load_tree, read_vocabulary
from megatron_ksa.errors import UsageError

GROUNDING, UNPLACED, PLACED = "grounding.npz", "unplaced.jsonl", "placed_tags.jsonl"


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
    texts = lambda: (record_text(record) for _, record, _ in kept_instances(folder))  # noqa: E731
    vectors = embedder.embed([table.names[tag] for tag in unknown], carried, texts)
    found, cosine = nearest(vectors, np.load(tree_folder / EMBEDDINGS))
    for tag, other, near in zip(unknown, found, cosine, strict=True):
        if near >= settings.cosine:
            yield tag, int(other), float(near)


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
    table = TagTable(row["tags"] for _, _, row in kept_instances(folder))
    canonical = np.array([known.get(name, -1) for name in table.names], np.int64)
    placed = []
    unknown = np.flatnonzero(canonical < 0).tolist()
    if unknown:
        for tag, other, near in _place(folder, tree_folder, table, unknown, settings, engine):
            canonical[tag] = other
            placed.append({"tag": table.names[tag], "into": names[other], "similarity": round(near, 4)})
    leaf_of_tag = tree.leaf_of_tag
    rows: dict[str, list] = {name: [] for name in ("record", "quality", "difficulty", "length")}
    indptr, leaves, unplaced = [0], [], []
    bounds, columns = table.carried.indptr, table.carried.indices
    for number, (line, record, tags) in enumerate(kept_instances(folder)):
        held = canonical[columns[bounds[number] : bounds[number + 1]]]
        held = np.unique(leaf_of_tag[held[held >= 0]])
        if not len(held):
            unplaced.append({"id": record["id"], "tags": tags["tags"]})
            continue
        leaves.append(held)
        indptr.append(indptr[-1] + len(held))
        rows["record"].append(line)
        rows["length"].append(len(record_text(record)))
        for name in ("quality", "difficulty"):
            rows[name].append(np.nan if tags[name] is None else tags[name])
    if not leaves:
        raise UsageError(f"{folder}: none of its tags is on the tree of {tree_folder}; tag both with the same tagger")
    types = {"record": np.int64, "length": np.int64, "quality": np.float64, "difficulty": np.float64}
    arrays = {name: np.array(values, types[name]) for name, values in rows.items()}
    write_jsonl(folder / PLACED, placed)
    write_jsonl(folder / UNPLACED, unplaced)
    write_arrays(
        folder / GROUNDING, indptr=np.array(indptr, np.int64), leaves=np.concatenate(leaves).astype(np.int32), **arrays
    )
    counts = {
        "instances": len(indptr) - 1,
        "unplaced": len(unplaced),
        "unknown_tags": len(unknown),
        "placed_tags": len(placed),
    }
    return counts | {"tags": indptr[-1]}


def _run(context: Context, settings: GroundSettings) -> dict:
    return ground(context.folder, context.tree_folder, settings, context.engine)


def _tree(context: Context, settings: GroundSettings) -> dict[str, Path]:
    return context.files(context.tree_folder, "tree", *TREE_FILES)


STEP = Step(
    "ground", {"grounding": GroundSettings}, reads=(RECORDS, TAGS, DUPLICATES), writes=(GROUNDING, PLACED, UNPLACED),
    run=_run, also_reads=_tree,
)  # fmt: skip
