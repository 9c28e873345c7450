"""How well a tree's levels agree with known topics: adjusted mutual information, beside flat clusterings.

A record's branch on a level is the one that the write step and the report use (`branches.py`). The flat clusterings are
k-means with as many clusters as the level has branches: of the tags' vectors, with a record in the nearest of the
clusters that hold a tag of it, as on the tree; and of each record's mean vector, which knows no tags.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score

from megatron_ksa.data_tools.tags.branches import branch_of
from megatron_ksa.data_tools.tags.embed import unit
from megatron_ksa.data_tools.tags.files import read_jsonl
from megatron_ksa.data_tools.tags.objective import ancestors
from megatron_ksa.data_tools.tags.pool import Pool, load_pool
from megatron_ksa.data_tools.tags.read import RECORDS
from megatron_ksa.errors import usage_errors_exit
from megatron_ksa.files import whole_file
from megatron_ksa.markdown import replace_section, table

STARTS = 3
COLUMNS = {"tree": "tree", "votes": "tree, by votes", "flat_tags": "flat, tags", "flat_records": "flat, records"}


def by_votes(pool: Pool, nodes: np.ndarray) -> np.ndarray:
    """int64 [instances], place in `nodes` of the one with most of an instance's tags, the first among equals: what
    `branches.py` is compared with."""
    return (pool.shares @ ancestors(pool.parent)[:, nodes]).toarray().round(9).argmax(axis=1)


def flat_tags(pool: Pool, clusters: int) -> np.ndarray:
    """int64 [instances], the branch of each on a tree that has k-means of the tags as its only level."""
    leaves = pool.leaf_nodes
    weight = np.bincount(pool.leaves, minlength=len(pool.parent))[leaves]
    found = KMeans(clusters, n_init=STARTS, random_state=0).fit_predict(pool.leaf_vectors, sample_weight=weight)
    parent = np.concatenate([[-1], np.zeros(clusters, np.int64), 1 + found])
    held = 1 + clusters + np.searchsorted(leaves, pool.leaves)
    flat = Pool(
        pool.indptr, held.astype(np.int32), pool.quality, pool.difficulty,
        parent, np.minimum(np.arange(len(parent)), 1),
        leaf_vectors=pool.leaf_vectors,
    )  # fmt: skip
    return branch_of(flat, 1 + np.arange(clusters))


def agreement(work: Path) -> list[dict]:
    """One row a level: branches, and how well the tree and the flat clusterings agree with the records' sources."""
    pool = load_pool(work, vectors=True)
    sources = np.array([record["source"] for record in read_jsonl(work / RECORDS)])[pool.record]
    records = unit(pool.shares[:, pool.leaf_nodes] @ pool.leaf_vectors)
    rows = []
    for level in range(1, int(pool.depth.max())):
        # Leaves above the level are branches of their own.
        above = pool.leaf_nodes[pool.depth[pool.leaf_nodes] < level]
        nodes = np.union1d(np.flatnonzero(pool.depth == level), above)
        if len(nodes) > pool.instances // 4:
            break
        found = {
            "tree": branch_of(pool, nodes),
            "votes": by_votes(pool, nodes),
            "flat_tags": flat_tags(pool, len(nodes)),
            "flat_records": KMeans(len(nodes), n_init=STARTS, random_state=0).fit_predict(records),
        }
        scores = {name: round(float(adjusted_mutual_info_score(sources, labels)), 4) for name, labels in found.items()}
        rows.append({"level": level, "branches": len(nodes), **scores})
    return rows


def main() -> None:
    """Run; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        parser.add_argument(
            "--work",
            type=Path,
            nargs="+",
            required=True,
            help="work folders of tools/preprocess_tags.py, tree step done",
        )
        parser.add_argument("--readme", type=Path, help="file with a section topics that takes the table")
        args = parser.parse_args()
        cells = []
        for work in args.work:
            rows = agreement(work)
            with whole_file(work / "topics.json") as stream:
                stream.write(json.dumps(rows, indent=1) + "\n")
            cells += [
                [work.name, row["level"], row["branches"], *(f"{row[name]:.3f}" for name in COLUMNS)] for row in rows
            ]
        text = table(["pool", "level", "branches", *COLUMNS.values()], cells)
        print(text)
        if args.readme:
            replace_section(args.readme, "topics", text)


if __name__ == "__main__":
    sys.exit(main())
