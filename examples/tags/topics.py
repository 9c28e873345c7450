"""How well a tree's levels agree with known topics: adjusted mutual information, beside flat clusterings of the same vectors.

A record's branch on a level is the one with most of its tags. The flat clusterings have as many clusters as the level
has branches: k-means of the tags' vectors (records by most of their tags, as on the tree), and k-means of each
record's mean vector.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score

from megatron_ksa.data_tools.tags.canonicalise import EMBEDDINGS
from megatron_ksa.data_tools.tags.embed import unit
from megatron_ksa.data_tools.tags.files import read_arrays, read_jsonl, whole_file
from megatron_ksa.data_tools.tags.ground import GROUNDING
from megatron_ksa.data_tools.tags.read import RECORDS
from megatron_ksa.data_tools.tags.tree import TREE, load_tree
from megatron_ksa.errors import usage_errors_exit


def majority(carried: csr_array, group: np.ndarray) -> np.ndarray:
    """int64 [instances], the group with most of each instance's tags; the first among equals.

    Args:
        carried: [instances, tags], 1 where an instance carries a tag.
        group: int64 [tags].
    """
    member = csr_array((np.ones(len(group)), (np.arange(len(group)), group)))
    return (carried @ member).argmax(axis=1)


def agreement(work: Path) -> list[dict]:
    """One row a level: branches, and the agreement of the tree and of the flat clusterings with the records' sources."""
    tree, grounding = load_tree(work / TREE), read_arrays(work / GROUNDING)
    vectors = np.load(work / EMBEDDINGS)
    sources = np.array([record["source"] for record in read_jsonl(work / RECORDS)])[grounding["record"]]
    tags, bounds = tree.tag[grounding["leaves"]], grounding["indptr"]
    carried = csr_array((np.ones(len(tags)), tags, bounds), shape=(len(bounds) - 1, len(vectors)))
    means = unit(carried @ vectors)
    rows = []
    for level in range(1, int(tree.depth.max())):
        branch = np.unique(tree.branch_at(level)[tree.leaf_of_tag], return_inverse=True)[1]
        clusters = int(branch.max()) + 1
        if clusters > len(means) // 4:
            break
        flat_tags = KMeans(clusters, n_init=3, random_state=0).fit_predict(vectors)
        flat_records = KMeans(clusters, n_init=3, random_state=0).fit_predict(means)
        found = {
            "tree": majority(carried, branch),
            "flat_tags": majority(carried, flat_tags),
            "flat_records": flat_records,
        }
        scores = {name: round(float(adjusted_mutual_info_score(sources, labels)), 4) for name, labels in found.items()}
        rows.append({"level": level, "branches": clusters, **scores})
    return rows


def main() -> None:
    """Run; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        parser.add_argument(
            "--work", type=Path, required=True, help="work folder of tools/preprocess_tags.py, tree step done"
        )
        args = parser.parse_args()
        rows = agreement(args.work)
        with whole_file(args.work / "topics.json") as stream:
            stream.write(json.dumps(rows, indent=1) + "\n")
        print(
            f"{'level':>5} {'branches':>8} {'tree':>8} {'flat tags':>10} {'flat records':>13}   (AMI with the sources)"
        )
        for row in rows:
            print(
                f"{row['level']:>5} {row['branches']:>8} {row['tree']:>8.3f} {row['flat_tags']:>10.3f} {row['flat_records']:>13.3f}"
            )


if __name__ == "__main__":
    sys.exit(main())
