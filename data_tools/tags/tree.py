"""The tree step: canonical tags are clustered bottom-up, level by level, into one tree with named inner nodes.

`clustering.py` tells how nodes of a level are joined, and why so.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from megatron_ksa.config.options import option
from megatron_ksa.data_tools.tags.canonicalise import CARRIED, EMBEDDER, EMBEDDINGS, MERGES, VOCABULARY, read_carried
from megatron_ksa.data_tools.tags.clustering import cluster, membership, refine, refine_by_instances
from megatron_ksa.data_tools.tags.embed import unit
from megatron_ksa.data_tools.tags.files import copy_whole, read_arrays, read_jsonl, write_arrays
from megatron_ksa.data_tools.tags.step import Context, Step
from megatron_ksa.errors import UsageError

TREE = "tree.npz"
ROOT_NAME = "root"
INSTANCES = 50_000
FIELDS = ("parent", "depth", "name", "tag", "count")
# What records need to be put on a tree.
# Written by `naming.py`, beside the tree.
BRANCH_NAMES = "branch_names.jsonl"
TREE_FILES = (VOCABULARY, MERGES, EMBEDDINGS, EMBEDDER, TREE)


@dataclass(frozen=True)
class TreeSettings:
    """Shape of the tree.

    Raises:
        UsageError: a value out of range.
    """

    branching: int = option(
        0,
        "Children of an inner node, on average; 0 gives each level the square root of the nodes below it.",
        flag="--branching",
    )
    top: int = option(
        24, "Top branches, at most: the level that has no more of them hangs from the root.", flag="--top-branches"
    )
    levels: int = option(10, "Levels below the root, at most.", flag="--levels")

    def __post_init__(self) -> None:
        if self.branching == 1 or self.branching < 0:
            raise UsageError(f"--branching {self.branching}: at least 2, or 0 for the square root")
        if self.top < 2:
            raise UsageError(f"--top-branches {self.top}: at least 2")
        if self.levels < 1:
            raise UsageError(f"--levels {self.levels}: at least 1")


@dataclass(frozen=True)
class Tree:
    """One tree over the canonical tags; nodes in order of depth, so that node 0 is the root.

    Args:
        parent: int32 [nodes], -1 at the root.
        depth: int16 [nodes].
        name: str [nodes].
        tag: int32 [nodes], index of a leaf's canonical tag, -1 for inner nodes.
        count: int64 [nodes], instances' tags at or below.
    """

    parent: np.ndarray
    depth: np.ndarray
    name: np.ndarray
    tag: np.ndarray
    count: np.ndarray

    @property
    def leaf_of_tag(self) -> np.ndarray:
        """int64 [tags], the leaf of each canonical tag."""
        leaves = np.flatnonzero(self.tag >= 0)
        result = np.empty(len(leaves), np.int64)
        result[self.tag[leaves]] = leaves
        return result

    def branch_at(self, depth: int) -> np.ndarray:
        """int64 [nodes], each node's ancestor at a depth, itself where it is not deeper."""
        branch = np.arange(len(self.parent))
        while True:
            deeper = self.depth[branch] > depth
            if not deeper.any():
                return branch
            branch = np.where(deeper, self.parent[branch], branch)

    def save(self, path: Path) -> None:
        """Write `tree.npz`."""
        write_arrays(path, **{field: getattr(self, field) for field in FIELDS})


def load_tree(path: Path) -> Tree:
    """The tree that `save` wrote.

    Raises:
        UsageError: the file is missing or holds another thing.
    """
    arrays = read_arrays(path)
    missing = [field for field in FIELDS if field not in arrays]
    if missing:
        raise UsageError(f"{path}: no array {', '.join(missing)}; it is no tree of this tool")
    return Tree(**{field: arrays[field] for field in FIELDS})


def _levels(vectors: np.ndarray, counts: np.ndarray, instances: np.ndarray, settings: TreeSettings) -> list[np.ndarray]:
    """Cluster of each node, level by level from the tags up; the last level's nodes hang from the root."""
    result: list[np.ndarray] = []
    # Sums over the tags that instances carry: a parent's mean is theirs, however they are spread over its children.
    sums, nodes = vectors * counts.astype(np.float32)[:, None], len(vectors)
    while nodes > settings.top and len(result) + 1 < settings.levels:
        wanted = round(nodes / settings.branching) if settings.branching else round(np.sqrt(nodes))
        wanted = max(wanted, min(settings.top, nodes // 2))
        with tqdm(total=nodes, desc=f"tree level {len(result) + 1}", unit=" nodes") as progress:
            labels = refine(unit(sums), sums, cluster(unit(sums), wanted, progress))
            labels = refine_by_instances(unit(sums), instances, unit(membership(labels) @ sums), labels)
        found = int(labels.max()) + 1
        if found >= nodes:
            break
        sums, nodes = membership(labels) @ sums, found
        result.append(labels)
    return result


def _medoids(vectors: np.ndarray, counts: np.ndarray, group: np.ndarray) -> np.ndarray:
    """int64 [groups], the tag nearest to each group's mean over instances; ties go to the first.

    Args:
        vectors: unit, float32 [tags, dimensions].
        counts: int64 [tags].
        group: int64 [tags].
    """
    means = unit(membership(group) @ (vectors * counts.astype(np.float32)[:, None]))
    near = np.einsum("td,td->t", vectors, means[group])
    order = np.lexsort((np.arange(len(group)), -near, group))
    return order[np.unique(group[order], return_index=True)[1]]


def build_tree(
    names: list[str],
    counts: np.ndarray,
    vectors: np.ndarray,
    settings: TreeSettings,
    instances: np.ndarray | None = None,
) -> Tree:
    """The tree over canonical tags.

    Args:
        names: the tags.
        counts: int64 [tags], instances that carry each.
        vectors: unit, float32 [tags, dimensions].
        instances: unit, float32 [instances, dimensions], mean vectors of instances' tags, a sample of them perhaps;
            levels are clusters of tags alone where it is None.
    """
    tags = len(names)
    instances = np.empty((0, vectors.shape[1]), np.float32) if instances is None else instances
    # k-means adds up by thread, in any order: with one thread the same tags give the same tree.
    with threadpool_limits(1):
        levels = _levels(vectors, counts, instances, settings)
    parent, name, ancestor = [], [np.array(names, object)], np.arange(tags)
    offset = 0
    for labels in levels:
        parent.append(labels + offset + len(labels))
        offset += len(labels)
        ancestor = labels[ancestor]
        name.append(name[0][_medoids(vectors, counts, ancestor)])
    last = int(levels[-1].max()) + 1 if levels else tags
    parent += [np.full(last, offset + last), np.array([-1])]
    name.append(np.array([ROOT_NAME], object))
    parents = _without_only_children(np.concatenate(parent).astype(np.int64), tags)
    return _ordered(parents, np.concatenate(name), counts)


def _without_only_children(parent: np.ndarray, tags: int) -> np.ndarray:
    """Parents with each inner node of one child replaced by the child; a node left out gets -2. The root stays.

    Args:
        parent: int64 [nodes], children before parents, the first `tags` of them leaves.
    """
    parent, root = parent.copy(), len(parent) - 1
    children = np.bincount(parent[:-1], minlength=len(parent))
    for node in range(root - 1, -1, -1):
        # From the top down: a node's parent is final when the node is reached.
        above = parent[node]
        if above != root and children[above] == 1:
            parent[node] = parent[above]
            parent[above] = -2
    return parent


def _ordered(parent: np.ndarray, name: np.ndarray, counts: np.ndarray) -> Tree:
    """The tree with the root first, by depth, siblings together."""
    tags = len(counts)
    depth = np.zeros(len(parent), np.int64)
    total = np.zeros(len(parent), np.int64)
    total[:tags] = counts
    for node in range(len(parent) - 2, -1, -1):
        if parent[node] >= 0:
            depth[node] = depth[parent[node]] + 1
    for node in range(len(parent) - 1):
        if parent[node] >= 0:
            total[parent[node]] += total[node]
    place = np.full(len(parent), -1)
    order: list[np.ndarray] = []
    placed = 0
    for level in range(int(depth.max()) + 1):
        nodes = np.flatnonzero((depth == level) & (parent != -2))
        above = place[parent[nodes]] if level else np.zeros(len(nodes), np.int64)
        nodes = nodes[np.lexsort((nodes, above))]
        place[nodes] = placed + np.arange(len(nodes))
        placed += len(nodes)
        order.append(nodes)
    nodes = np.concatenate(order)
    return Tree(
        parent=np.where(parent[nodes] >= 0, place[parent[nodes]], -1).astype(np.int32),
        depth=depth[nodes].astype(np.int16),
        name=name[nodes].astype(np.str_),
        tag=np.where(nodes < tags, nodes, -1).astype(np.int32),
        count=total[nodes],
    )


def tree(folder: Path, settings: TreeSettings) -> dict:
    """Write `tree.npz` over the folder's vocabulary; returns counts."""
    names, counts = read_vocabulary(folder)
    vectors, carried = np.load(folder / EMBEDDINGS), read_carried(folder / CARRIED, len(names))
    sample = carried[:: -(-carried.shape[0] // INSTANCES)]
    built = build_tree(names, counts, vectors, settings, unit(sample @ vectors))
    built.save(folder / TREE)
    return {"nodes": len(built.parent), "leaves": len(names), "levels": np.bincount(built.depth).tolist()}


def read_vocabulary(folder: Path) -> tuple[list[str], np.ndarray]:
    """Canonical tags, and the instances that carry each, int64 [tags]."""
    rows = list(read_jsonl(folder / VOCABULARY))
    return [row["tag"] for row in rows], np.array([row["count"] for row in rows], np.int64)


def _run(context: Context, settings: TreeSettings) -> dict:
    return tree(context.folder, settings)


def _adopt(context: Context) -> dict:
    """Copy the tree of another work folder here, where the steps that follow look for it."""
    for name in TREE_FILES:
        copy_whole(context.tree / name, context.folder / name)
    return {"nodes": len(load_tree(context.folder / TREE).parent)}


def _adopted(context: Context) -> dict[str, Path]:
    return context.files(context.tree, "tree", *TREE_FILES)


def _check_other_tree(context: Context) -> None:
    """Check that the tree of another folder can be used here.

    Raises:
        UsageError: it is this folder, or it has no tree.
    """
    if context.tree.resolve() == context.folder.resolve():
        raise UsageError(f"--tree {context.tree}: name another work folder than --work")
    if not (context.tree / TREE).is_file():
        raise UsageError(f"--tree {context.tree}: no {TREE} there; run the tree step of that folder first")


STEP = Step(
    "tree", {"tree": TreeSettings}, reads=(VOCABULARY, CARRIED, EMBEDDINGS), writes=(TREE,), run=_run
)  # fmt: skip
ADOPT = Step(
    "tree", {}, reads=(), writes=TREE_FILES, run=_adopt, also_reads=_adopted, decides=lambda context: {"adopted": True},
    check=_check_other_tree,
)  # fmt: skip
