"""Where the report's map shows instances: t-SNE of the tree's branches, and each instance between the nearest of them.

scikit-learn's t-SNE of all instances would take hours at a million of them. Up to `ANCHORS` branches are laid out
instead (landmark t-SNE), on one thread, so that the same pool gives the same map.
"""

import numpy as np
from scipy.stats import rankdata
from threadpoolctl import threadpool_limits

from megatron_ksa.data_tools.tags.branches import branch_means, instance_vectors
from megatron_ksa.data_tools.tags.pool import Pool

ANCHORS = 1000
NEAREST = 3
# Similarities are cosines: an anchor nearer by 0.05 pulls e times as much.
SHARPNESS = 20.0
# Instances with the same tags lie on one spot; they are spread over this share of the map's width.
SPREAD = 0.012
FEWEST_FOR_TSNE = 8
GRID = 65_535
# Dots have a size, which the map's rim must not cut.
EDGES = (0.01, 0.99)


def anchor_nodes(parent: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """int64 [anchors]: the nodes of the deepest level that has at most `ANCHORS`, with the leaves above it."""
    is_leaf = np.ones(len(parent), bool)
    is_leaf[parent[parent >= 0]] = False
    best = np.array([0])
    for level in range(1, int(depth.max()) + 1):
        nodes = np.flatnonzero((depth == level) | (is_leaf & (depth < level)))
        if len(nodes) > ANCHORS and level > 1:
            break
        best = nodes[:ANCHORS]
    return best


def lay_out(vectors: np.ndarray) -> np.ndarray:
    """float64 [anchors, 2], each coordinate from 0 to 1."""
    from sklearn.manifold import TSNE

    centred = vectors - vectors.mean(0)
    if len(vectors) < FEWEST_FOR_TSNE or not np.ptp(centred):
        left, scale, _ = np.linalg.svd(centred, full_matrices=False)
        places = np.zeros((len(vectors), 2))
        kept = min(2, left.shape[1])
        places[:, :kept] = left[:, :kept] * scale[:kept]
    else:
        perplexity = min(30.0, (len(vectors) - 1) / 3)
        with threadpool_limits(1):
            places = TSNE(2, perplexity=perplexity, init="pca", random_state=0, n_jobs=1).fit_transform(vectors)
    return _spread_out(places)


def _spread_out(places: np.ndarray) -> np.ndarray:
    """Each coordinate from 0 to 1: half of it where it lies, half its rank, so that a far group leaves no empty map."""
    low, width = places.min(0), np.ptp(places, axis=0)
    if not width.all():  # all on one line
        low, width = np.where(width > 0, low, low - 0.5), np.where(width > 0, width, 1.0)
    lies = (places - low) / width
    # Equal coordinates have one rank, the mean of theirs.
    ranks = rankdata(places, axis=0) - 1
    spread = np.ptp(ranks, axis=0)
    ranks = np.where(spread > 0, (ranks - ranks.min(0)) / np.where(spread > 0, spread, 1.0), 0.5)
    return (lies + ranks) / 2


class Map:
    """The map of one tree.

    Args:
        pool: with `leaf_vectors`.
    """

    def __init__(self, pool: Pool) -> None:
        nodes = anchor_nodes(pool.parent, pool.depth)
        self._vectors = branch_means(pool, nodes)
        self._places = lay_out(self._vectors)

    def place(self, pool: Pool, rows: np.ndarray) -> np.ndarray:
        """uint16 [rows, 2], where instances lie, 0 to 65,535 from left to right and from bottom to top.

        Args:
            pool: on the map's tree, with `leaf_vectors`.
            rows: int64 [rows].
        """
        found = np.zeros((len(rows), 2))
        nearest = min(NEAREST, len(self._vectors))
        for block, vectors in instance_vectors(pool, rows):
            near = vectors @ self._vectors.T
            best = np.sort(np.argpartition(-near, nearest - 1, axis=1)[:, :nearest], axis=1)
            weight = np.exp(SHARPNESS * (np.take_along_axis(near, best, 1) - near.max(1, keepdims=True)))
            weight /= weight.sum(1, keepdims=True)
            found[block] = np.einsum("rk,rkd->rd", weight, self._places[best])
        # The generator's draws belong to rows, so that a row lies where it did in another report of this pool.
        spread = np.random.default_rng(0).normal(0, SPREAD, (pool.instances, 2))[rows]
        return np.round(np.clip(0.03 + 0.94 * found + spread, *EDGES) * GRID).astype(np.uint16)
