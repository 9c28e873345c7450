"""Speed and value of the TAGS sampler on synthetic pools, against a dense sampler in the manner of MIG.

    python -m megatron_ksa.data_tools.benchmarks.tags_sampler --out results.json

`large` is one selection from a pool of the given size. `dense` takes a pool that a dense sampler can hold and times
some of its steps: the exact gain of every instance, phi(x + row) - phi(x) summed over all labels, in float32 with every
core, and the first-order gain that MIG uses, the rows times phi'(x). Both then have a selection under both objectives.
"""

import argparse
import os
import resource
import time
from pathlib import Path

import numpy as np

from megatron_ksa.data_tools.tags.baselines import LABEL_POWER as POWER
from megatron_ksa.data_tools.tags.baselines import label_graph, label_information
from megatron_ksa.data_tools.tags.files import write_json
from megatron_ksa.data_tools.tags.greedy import greedy
from megatron_ksa.data_tools.tags.objective import (
    EPSILON,
    Coverage,
    default_shape,
    default_share_exponent,
    node_weights,
    strengths,
    tree_information,
)  # fmt: skip
from megatron_ksa.data_tools.tags.pool import Pool

TAGS_PER_INSTANCE = 5
BRANCHING = 10
TOPIC_TAGS = 100


def synthetic_pool(instances: int, tags: int, seed: int = 0) -> Pool:
    """Instances of one topic each, topics as frequent as rank^-0.8, scores 1 to 10, and a tree of branching 10."""
    generator = np.random.default_rng(seed)
    levels = [tags]
    while levels[-1] > 1:
        levels.append(-(-levels[-1] // BRANCHING))
    sizes = np.array(levels[::-1])
    first = np.concatenate([[0], np.cumsum(sizes)])
    parent = np.concatenate(
        [[-1], *(first[d - 1] + np.arange(sizes[d]) // BRANCHING for d in range(1, len(sizes)))]
    ).astype(np.int32)
    topics = -(-tags // TOPIC_TAGS)
    frequency = (1.0 + generator.permutation(topics)) ** -0.8
    topic = generator.choice(topics, instances, p=frequency / frequency.sum())
    tag = topic[:, None] * TOPIC_TAGS + generator.integers(TOPIC_TAGS, size=(instances, TAGS_PER_INSTANCE))
    # Labels of a topic are near each other, so that the label graph has edges.
    vectors = generator.normal(size=(topics, 16)).repeat(TOPIC_TAGS, axis=0)[:tags] + 0.3 * generator.normal(
        size=(tags, 16)
    )
    quality, difficulty = generator.integers(1, 11, (2, instances)).astype(np.float64)
    return Pool(
        np.arange(0, TAGS_PER_INSTANCE * instances + 1, TAGS_PER_INSTANCE),
        np.sort(first[-2] + np.minimum(tag, tags - 1)).astype(np.int32).ravel(),
        quality, difficulty, parent, np.repeat(np.arange(len(sizes)), sizes), leaf_vectors=vectors,
    )  # fmt: skip


def tree_of(pool: Pool) -> Coverage:
    """Tree information with the sampler's defaults."""
    exponent, (power, branches) = default_share_exponent(pool.shares), default_shape(pool.shares)
    weight = node_weights(
        pool.held, pool.parent, pool.depth, power=power, share_exponent=exponent, branch_weight=branches
    )
    return tree_information(pool.shares, strengths(pool.quality, pool.difficulty), pool.parent, weight, power=power)


def timed(function, *arguments):
    """The result and the seconds it took."""
    start = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - start


def large(instances: int, tags: int, choose: int) -> dict:
    """One selection by tree information."""
    pool = synthetic_pool(instances, tags)
    information, grounding = timed(tree_of, pool)
    found, seconds = timed(lambda: greedy(information, choose, show_progress=True))
    return {
        "instances": instances, "tags": tags, "nodes": len(pool.parent), "chosen": len(found.chosen),
        "grounding_seconds": grounding, "greedy_seconds": seconds, "gains_computed": found.evaluations,
        "information": information.value(found.chosen),
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }  # fmt: skip


def _exact_step(rows: np.ndarray, total: np.ndarray) -> int:
    gains = np.empty(len(rows), np.float32)
    reached = ((total + EPSILON) ** POWER).sum()
    for first in range(0, len(rows), 1024):
        gains[first : first + 1024] = ((rows[first : first + 1024] + (total + EPSILON)) ** POWER).sum(axis=1) - reached
    return int(gains.argmax())


def _first_order_step(rows: np.ndarray, total: np.ndarray) -> int:
    return int((rows @ (POWER * (total + EPSILON) ** (POWER - 1))).argmax())


def _dense_seconds(rows: np.ndarray, step, steps: int) -> float:
    """Median seconds of a step of a dense greedy."""
    total, seconds, taken = np.zeros(rows.shape[1], np.float32), [], []
    for _ in range(steps):
        best, elapsed = timed(step, rows, total)
        total = total + rows[best]
        seconds.append(elapsed)
        taken.append(best)
    return float(np.median(seconds))


def dense(instances: int, tags: int, choose: int, steps: int) -> dict:
    """Tree information against the label graph, lazily and densely."""
    pool = synthetic_pool(instances, tags)
    strength = strengths(pool.quality, pool.difficulty)
    tree = tree_of(pool)
    labels = label_information(pool.shares, strength, pool.leaf_nodes, label_graph(pool.leaf_vectors))
    by_tree, tree_seconds = timed(greedy, tree, choose)
    by_labels, label_seconds = timed(greedy, labels, choose)
    random = np.random.default_rng(0).permutation(instances)[:choose]
    rows = labels.mass.astype(np.float32).toarray()
    exact, first_order = (_dense_seconds(rows, step, steps) for step in (_exact_step, _first_order_step))
    return {
        "instances": instances, "tags": tags, "chosen": choose, "steps_timed": steps,
        "seconds": {
            "tree, lazy": tree_seconds, "label graph, lazy": label_seconds,
            "dense exact step": exact, "dense exact, all steps": exact * choose,
            "dense first-order step": first_order, "dense first-order, all steps": first_order * choose,
        },
        "times_faster": {
            name: {"tree": seconds * choose / tree_seconds, "label graph": seconds * choose / label_seconds}
            for name, seconds in (("dense exact", exact), ("dense first-order", first_order))
        },
        "value": {
            name: {"tree information": tree.value(chosen), "label information": labels.value(chosen)}
            for name, chosen in (("tree", by_tree.chosen), ("label graph", by_labels.chosen), ("random", random))
        },
    }  # fmt: skip


def main() -> None:
    """Run both parts and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--large", type=int, nargs=3, default=[1_000_000, 100_000, 50_000], metavar=("INSTANCES", "TAGS", "CHOOSE")
    )
    parser.add_argument(
        "--dense", type=int, nargs=3, default=[50_000, 4_000, 2_500], metavar=("INSTANCES", "TAGS", "CHOOSE")
    )
    parser.add_argument("--steps", type=int, default=20, help="steps of the dense sampler to time")
    args = parser.parse_args()
    instances, tags, choose = args.dense
    # The large pool first: the peak of memory is that of the whole process.
    result = {
        "cpus": len(os.sched_getaffinity(0)),
        "large": large(*args.large),
        "dense": dense(instances, tags, choose, args.steps),
    }
    write_json(args.out, result)
    print(args.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
