"""Time and memory of building one tree over many distinct tags, on synthetic vectors.

    python -m megatron_ksa.data_tools.benchmarks.tags_tree --out results.json

Each size and branching runs in a process of its own, so that its peak of memory is its own. The vectors are noisy
copies of 400 centres: a tag's noise is longer than the distance between centres, as tags of a real pool are not in
clean clusters. Instances, as many as the tree step takes at most, carry five tags each at random.
"""

import argparse
import multiprocessing
import os
import resource
import time
from pathlib import Path

import numpy as np

from megatron_ksa.data_tools.tags.embed import DIMENSIONS, unit
from megatron_ksa.data_tools.tags.files import write_json
from megatron_ksa.data_tools.tags.tree import INSTANCES, TreeSettings, build_tree

CENTRES = 400
NOISE = 1.2
TAGS_PER_INSTANCE = 5


def measure(tags: int, branching: int) -> dict:
    """Build one tree in this process; seconds, GiB and shape."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(CENTRES, DIMENSIONS)).astype(np.float32)
    vectors = unit(centres[generator.integers(CENTRES, size=tags)] + NOISE * generator.normal(size=(tags, DIMENSIONS)))
    counts = generator.integers(1, 50, size=tags)
    carried = generator.integers(tags, size=(INSTANCES, TAGS_PER_INSTANCE))
    instances = unit(vectors[carried].sum(axis=1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    names, settings = [f"tag {number}" for number in range(tags)], TreeSettings(branching=branching)
    tree = build_tree(names, counts, vectors, settings, instances)
    return {
        "tags": tags, "branching": branching, "dimensions": DIMENSIONS,
        "seconds": time.perf_counter() - start,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "peak_memory_before_gib": before / 2**20,
        "nodes": len(tree.parent), "levels": np.bincount(tree.depth).tolist(),
    }  # fmt: skip


def main() -> None:
    """Run every case and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--tags", type=int, nargs="+", default=[20_000, 200_000], help="distinct tags")
    parser.add_argument(
        "--branching", type=int, nargs="+", default=[0, 10], help="as --branching of preprocess_tags.py"
    )
    args = parser.parse_args()
    cases = [(tags, branching) for tags in args.tags for branching in args.branching]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        rows = [pool.apply(measure, case) for case in cases]
    write_json(args.out, {"cpus": len(os.sched_getaffinity(0)), "trees": rows})
    print(args.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
