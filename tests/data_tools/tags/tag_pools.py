"""Small random trees and pools, and the objective written out in loops to compare with."""

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from megatron_ksa.data_tools.tags.objective import Coverage, tag_shares, tree_information


@dataclass
class Pool:
    """A random tree (root 0, indices in no order of depth below it) and instances with up to 4 tags, some with none."""

    indptr: np.ndarray
    leaves: np.ndarray
    strength: np.ndarray
    parent: np.ndarray
    depth: np.ndarray
    phi: str = "power"

    @property
    def shares(self) -> csr_array:
        return tag_shares(self.indptr, self.leaves, len(self.parent))

    @property
    def leaf_count(self) -> int:
        return len(np.setdiff1d(np.arange(len(self.parent)), self.parent))

    def coverage(self) -> Coverage:
        return tree_information(self.shares, self.strength, self.parent, 0.9 ** self.depth.astype(float), phi=self.phi)

    def value(self, chosen) -> float:
        """I(S) of docs/tags.md, 4 and 5, in loops."""
        total = np.zeros(len(self.parent))
        for i in chosen:
            tags = self.leaves[self.indptr[i] : self.indptr[i + 1]]
            for v in tags:
                while v >= 0:
                    total[v] += self.strength[i] / len(tags)
                    v = self.parent[v]
        phi = np.log1p(total) if self.phi == "log1p" else (total + 1e-6) ** 0.4 - 1e-6**0.4
        return float((0.9 ** self.depth.astype(float)) @ phi)


def random_pool(seed: int, instances: int = 12, nodes: int = 15, phi: str = "power") -> Pool:
    """A pool that depends on the seed alone."""
    generator = np.random.default_rng(seed)
    order = np.concatenate([[0], 1 + generator.permutation(nodes - 1)])
    parent, depth = np.full(nodes, -1, np.int32), np.zeros(nodes, np.int16)
    for place in range(1, nodes):
        above = order[generator.integers(max(place // 2, 1))]
        parent[order[place]], depth[order[place]] = above, depth[above] + 1
    leaf_nodes = np.setdiff1d(np.arange(nodes), parent)
    counts = generator.integers(0, 5, instances)
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    leaves = generator.choice(leaf_nodes, indptr[-1]).astype(np.int32)
    return Pool(indptr, leaves, generator.uniform(0.1, 2.0, instances), parent, depth, phi)
