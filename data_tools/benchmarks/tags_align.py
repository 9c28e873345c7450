"""Alignment to a target: how far the divergence falls and what it costs, for near and far-off targets.

    python -m megatron_ksa.data_tools.benchmarks.tags_align [--readme data_tools/tags/README.md]

Pool and target have the same topics in other frequencies, rank^-tilt each in an order of its own, so the target is
known.
"""

import argparse
from pathlib import Path

import numpy as np

from megatron_ksa.data_tools.tags.pool import Pool
from megatron_ksa.data_tools.tags.sample import SampleSettings, sample
from megatron_ksa.errors import usage_errors_exit
from megatron_ksa.markdown import replace_section, table

INSTANCES, BUDGET = 20_000, "5%"
# Topics, tilt of the pool, tilt of the target, seed.
CASES = (
    (10, 1.0, 0.0, 0), (10, 0.5, 1.0, 0), (10, 1.0, 1.0, 0), (20, 1.0, 1.0, 0), (10, 1.0, 1.5, 3), (10, 0.0, 2.0, 0),
    (20, 1.0, 1.5, 3), (20, 1.0, 2.0, 1), (20, 1.0, 2.0, 0),
)  # fmt: skip
WEIGHTS = (0.3, 0.4, 0.5, 0.7)


def topic_pool(
    instances: int = 4000, topics: int = 8, leaves: int = 10, tilt: float = 1.0, target_tilt: float = 1.0, seed: int = 0
) -> tuple[Pool, np.ndarray]:
    """Instances of one topic each, five tags of it, topics as frequent as rank^-tilt; and a target with other
    frequencies.

    The tree is root, topics, leaves. The target, float64 [nodes], is uniform over the leaves of a topic.
    """
    generator = np.random.default_rng(seed)
    nodes = 1 + topics + topics * leaves
    parent = np.concatenate([[-1], np.zeros(topics, int), 1 + np.arange(topics * leaves) // leaves]).astype(np.int32)
    depth = np.concatenate([[0], np.ones(topics, int), np.full(topics * leaves, 2)])
    frequency = (1.0 + np.arange(topics)) ** -tilt
    wanted = (1.0 + generator.permutation(topics)) ** -target_tilt
    topic = generator.choice(topics, instances, p=frequency / frequency.sum())
    tags = 1 + topics + topic[:, None] * leaves + generator.integers(0, leaves, (instances, 5))
    target = np.zeros(nodes)
    target[1 + topics :] = np.repeat(wanted / wanted.sum() / leaves, leaves)
    quality, difficulty = generator.integers(1, 11, (2, instances)).astype(float)
    tokens = generator.integers(5, 200, instances)
    pool = Pool(
        np.arange(0, 5 * instances + 1, 5), tags.ravel().astype(np.int32), quality, difficulty, parent, depth, tokens
    )
    return pool, target


def measure(case: tuple[int, float, float, int]) -> list[str]:
    """Cells of one row: divergence without alignment; with each weight, how many times lower, and information kept."""
    topics, tilt, target_tilt, seed = case
    pool, target = topic_pool(INSTANCES, topics, 10, tilt, target_tilt, seed)
    cells: list[str] = []
    for weight in WEIGHTS:
        found = sample(pool, SampleSettings(BUDGET, align_weight=weight), target).summary
        without = found["without_alignment"]
        cells = cells or [f"{without['divergence']:.2f}"]
        lower, kept = without["divergence"] / found["divergence"], found["information"] / without["information"]
        cells.append(f"{lower:.1f} times, {100 * kept:.1f} %")
    return cells


def main() -> None:
    """Run; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--readme", type=Path, help="file with a section tags_align that takes the table")
        args = parser.parse_args()
        rows = sorted((measure(case) for case in CASES), key=lambda cells: float(cells[0]))
        text = table(["KL without, nats", *(f"weight {weight}" for weight in WEIGHTS)], rows)
        print(text)
        if args.readme:
            replace_section(args.readme, "tags_align", text)


if __name__ == "__main__":
    main()
