"""How the nodes of one level of the tree are joined.

Ward's method on mean vectors, within blocks of at most 2,048 neighbours that k-means splits off, then a few rounds of
k-means from there. Ward makes compact clusters of even size without a start to choose, but over n nodes it takes n^2
distances: 160 GB for 200,000. Within blocks it takes 2,048^2 at a time, for any branching, where k-means alone with
as many centres as a level has parents would take n^2/branching distances in each round.

The last rounds move the centres to where instances are (`refine_by_instances`): tags that few instances carry are most
of a vocabulary and little of a pool.
"""

import numpy as np
from scipy.cluster.hierarchy import fcluster, ward
from scipy.sparse import csr_array
from sklearn.cluster import MiniBatchKMeans
from tqdm import tqdm

from megatron_ksa.data_tools.tags.embed import unit

BLOCK = 2048
REFINE_ROUNDS = 5
INSTANCE_ROUNDS = 20
# Centres of fewer instances would be noise; such a level stays a clustering of tags.
INSTANCES_PER_CLUSTER = 32
ROWS_AT_ONCE = 4096


def membership(labels: np.ndarray) -> csr_array:
    """[clusters, nodes], 1 where a node belongs to a cluster."""
    shape = (int(labels.max()) + 1, len(labels))
    return csr_array((np.ones(len(labels), np.float32), (labels, np.arange(len(labels)))), shape=shape)


def nearest_centre(vectors: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """int64 [vectors], the centre of largest cosine, the first among equals; both are unit, float32."""
    found = np.empty(len(vectors), np.int64)
    for first in range(0, len(vectors), ROWS_AT_ONCE):
        found[first : first + ROWS_AT_ONCE] = (vectors[first : first + ROWS_AT_ONCE] @ centres.T).argmax(axis=1)
    return found


def blocks(vectors: np.ndarray, size: int = BLOCK) -> list[np.ndarray]:
    """Neighbours in blocks of at most `size`: int64 [members] a block.

    Args:
        vectors: float32 [nodes, dimensions].
    """
    done, open_ = [], [np.arange(len(vectors))]
    while open_:
        members = open_.pop()
        if len(members) <= size:
            done.append(members)
            continue
        parts = min(64, -(-2 * len(members) // size))
        kmeans = MiniBatchKMeans(parts, batch_size=4096, n_init=1, max_iter=20, random_state=0)
        labels = kmeans.fit_predict(vectors[members])
        found = [members[labels == label] for label in range(parts)]
        if max(map(len, found)) == len(members):
            # Vectors that are all equal: any division is as good.
            found = np.array_split(members, -(-len(members) // size))
        open_.extend(part for part in found if len(part))
    return done


def _shares(sizes: list[int], clusters: int) -> list[int]:
    """Clusters for each block, at least 1, in proportion to its size, of sum `clusters` where that is possible."""
    edges = np.round(np.cumsum([0, *sizes]) * clusters / sum(sizes)).astype(int)
    return np.maximum(np.diff(edges), 1).tolist()


def refine(vectors: np.ndarray, sums: np.ndarray, labels: np.ndarray, rounds: int = REFINE_ROUNDS) -> np.ndarray:
    """Move nodes to the cluster with the nearest mean, a few times: spherical k-means from the labels given.

    Args:
        vectors: unit, float32 [nodes, dimensions], `sums` scaled.
        sums: float32 [nodes, dimensions], sum of the vectors of each node's tags.
        labels: int64 [nodes], from 0 without gaps.
    """
    for _ in range(rounds):
        means = unit(membership(labels) @ sums)
        moved = np.unique(nearest_centre(vectors, means), return_inverse=True)[1]
        if np.array_equal(moved, labels):
            break
        labels = moved
    return labels


def refine_by_instances(
    vectors: np.ndarray, instances: np.ndarray, centres: np.ndarray, labels: np.ndarray, rounds: int = INSTANCE_ROUNDS
) -> np.ndarray:
    """Spherical k-means of the instances from the clusters' means; each node then goes to the nearest centre.

    Where there are too few instances for as many clusters, `labels` are returned as they are.

    Args:
        vectors: unit, float32 [nodes, dimensions].
        instances: unit, float32 [instances, dimensions], means of their tags.
        centres: unit, float32 [clusters, dimensions].
        labels: int64 [nodes], the cluster of each.
    """
    if len(instances) < INSTANCES_PER_CLUSTER * len(centres):
        return labels
    last = None
    for _ in range(rounds):
        own = np.unique(nearest_centre(instances, centres), return_inverse=True)[1]
        if last is not None and np.array_equal(own, last):
            break
        last, centres = own, unit(membership(own) @ instances)
    return np.unique(nearest_centre(vectors, centres), return_inverse=True)[1]


def cluster(vectors: np.ndarray, clusters: int, progress: tqdm | None = None) -> np.ndarray:
    """Join nodes into about as many clusters with Ward's method: int64 [nodes], numbered from 0 without gaps.

    Args:
        vectors: unit, float32 [nodes, dimensions].
    """
    labels, used = np.empty(len(vectors), np.int64), 0
    parts = blocks(vectors)
    for members, share in zip(parts, _shares([len(part) for part in parts], clusters), strict=True):
        if len(members) > 1 and share < len(members):
            found = fcluster(ward(vectors[members].astype(np.float64)), share, criterion="maxclust")
        else:
            found = np.arange(len(members)) if share >= len(members) else np.zeros(len(members))
        found = np.unique(found, return_inverse=True)[1]
        labels[members] = found + used
        used += int(found.max()) + 1
        if progress is not None:
            progress.update(len(members))
    return labels
