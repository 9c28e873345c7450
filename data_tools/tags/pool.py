"""The pool as the sampler sees it: instances grounded on the tree, read from a work folder (see README.md here)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array

from megatron_ksa.data_tools.tags.canonicalise import EMBEDDINGS
from megatron_ksa.data_tools.tags.files import read_arrays, read_jsonl, read_lines, row_of
from megatron_ksa.data_tools.tags.ground import GROUNDING
from megatron_ksa.data_tools.tags.objective import ancestors, tag_shares
from megatron_ksa.data_tools.tags.read import RECORDS
from megatron_ksa.data_tools.tags.tree import BRANCH_NAMES, TREE
from megatron_ksa.errors import UsageError


@dataclass(frozen=True)
class Pool:
    """Instances grounded on a tree.

    Args:
        indptr: int64 [instances + 1], bounds of each instance's tags in `leaves`.
        leaves: int32 [tags], leaf nodes.
        quality, difficulty: float [instances], NaN where there is no score.
        parent: int32 [nodes], -1 at the root.
        depth: int [nodes], 0 at the root.
        tokens: int64 [instances], or None where they are not known.
        leaf_vectors: float [leaf nodes in rising order, dimensions], for branches and the label graph.
        count: int64 [nodes], tags of the tree's pool at or below; counted here where it is None.
        record: int64 [instances], lines of `records.jsonl`, rising.
        names: str [nodes].
    """

    indptr: np.ndarray
    leaves: np.ndarray
    quality: np.ndarray
    difficulty: np.ndarray
    parent: np.ndarray
    depth: np.ndarray
    tokens: np.ndarray | None = None
    leaf_vectors: np.ndarray | None = None
    count: np.ndarray | None = None
    record: np.ndarray | None = None
    names: np.ndarray | None = None

    @property
    def instances(self) -> int:
        """Rows of the pool."""
        return len(self.indptr) - 1

    @cached_property
    def leaf_nodes(self) -> np.ndarray:
        """int64 [leaf nodes], rising."""
        return np.setdiff1d(np.arange(len(self.parent)), self.parent)

    @cached_property
    def shares(self) -> csr_array:
        """float64 [instances, nodes], as `objective.tag_shares` gives them."""
        return tag_shares(self.indptr, self.leaves, len(self.parent))

    @cached_property
    def held(self) -> np.ndarray:
        """float64 [nodes], share of the pool's tags at or below each node."""
        mass = self.shares.sum(axis=0)
        return (mass @ ancestors(self.parent)) / (mass.sum() or 1.0)

    def take(self, rows: np.ndarray) -> "Pool":
        """The pool of the given rows, int64 [rows]."""
        shares = self.shares[rows]
        some = {name: getattr(self, name) for name in ("quality", "difficulty", "tokens", "record")}
        some = {name: None if values is None else values[rows] for name, values in some.items()}
        return replace(self, indptr=shares.indptr.astype(np.int64), leaves=shares.indices.astype(np.int32), **some)


def with_branch_names(tree: Path, names: np.ndarray) -> np.ndarray:
    """Names of a tree's nodes, str [nodes], with those that an LLM gave to branches in place of the medoid tags."""
    path = tree / BRANCH_NAMES
    given = {row["node"]: row["name"] for row in read_jsonl(path)} if path.exists() else {}
    return np.array([given.get(node, name) for node, name in enumerate(names.tolist())]) if given else names


def load_pool(work: Path, *, tree: Path | None = None, vectors: bool = False) -> Pool:
    """The pool of a work folder.

    Args:
        tree: the folder whose tree it is grounded on; its own by default.
        vectors: read the embeddings of the leaves too.

    Raises:
        UsageError: a file is missing, or the grounding belongs to another tree.
    """
    tree = tree or work
    grounding, nodes = read_arrays(work / GROUNDING), read_arrays(tree / TREE)
    leaves, parent = grounding["leaves"], nodes["parent"]
    if len(leaves) and (leaves.max() >= len(parent) or (nodes["tag"][leaves] < 0).any()):
        raise UsageError(f"{work / GROUNDING} belongs to another tree than {tree / TREE}: run the tree step again")
    pool = Pool(
        grounding["indptr"], leaves, grounding["quality"], grounding["difficulty"], parent, nodes["depth"],
        count=nodes["count"], record=grounding["record"], names=with_branch_names(tree, nodes["name"]),
    )  # fmt: skip
    if vectors:
        try:
            embeddings = np.load(tree / EMBEDDINGS, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UsageError(f"{tree / EMBEDDINGS} cannot be read ({error}): run the tree step first") from None
        return replace(pool, leaf_vectors=embeddings[nodes["tag"][pool.leaf_nodes]])
    return pool


def read_records(work: Path, lines: np.ndarray) -> Iterator[dict]:
    """Records at the given lines of `records.jsonl`, int64 [lines], rising; other lines are not parsed."""
    for number, line in zip(lines, record_lines(work, lines), strict=False):
        yield row_of(line, f"{work / RECORDS}:{number + 1}")


def record_lines(work: Path, lines: np.ndarray) -> Iterator[bytes]:
    """The given lines of `records.jsonl`, int64 [lines], rising, as they lie there."""
    wanted = iter(lines)
    line = next(wanted, None)
    for number, content in enumerate(read_lines(work / RECORDS)):
        if line is None:
            return
        if number == line:
            yield content
            line = next(wanted, None)
