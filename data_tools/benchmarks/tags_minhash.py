"""MinHash signatures by rensa, which TAGS takes, and by datasketch: microseconds a text, and errors.

    python -m megatron_ksa.data_tools.benchmarks.tags_minhash --out results.json

Texts have 20 to 300 shingles, given as 64-bit hashes to each; 128 permutations; the result is an array of all
signatures. The error is that of the estimated Jaccard similarity of 500 pairs of sets of 100 at 0.8. A package that is
not there is left out.
"""

import argparse
import importlib.metadata
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_ksa.data_tools.tags import minhash
from megatron_ksa.data_tools.tags.files import write_json

TEXTS, PAIRS, SET, SHARED, REPEATS = 2000, 500, 100, 89, 5


def by_datasketch(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """datasketch's bulk form with its 32-bit scheme."""
    from datasketch import MinHash

    sets = [[value.to_bytes(8, "little") for value in values[first:last].tolist()]
            for first, last in zip(bounds[:-1], bounds[1:], strict=True)]  # fmt: skip
    found = MinHash.bulk(sets, num_perm=minhash.PERMUTATIONS, seed=1, scheme="affine32")
    return np.stack([each.hashvalues for each in found])


METHODS = {"rensa": minhash.signatures, "datasketch": by_datasketch}


def measure(signatures: Callable) -> dict:
    """Microseconds a text, median of the repeats, and bias and standard deviation of the similarity."""
    generator = np.random.default_rng(0)
    bounds = np.concatenate([[0], np.cumsum(generator.integers(20, 300, TEXTS))])
    values = generator.integers(0, 1 << 63, bounds[-1], dtype=np.uint64)
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        signatures(values, bounds)
        seconds.append(time.process_time() - start)
    result = {"microseconds": float(np.median(seconds)) / TEXTS * 1e6}
    sets = [generator.integers(0, 1 << 63, 2 * SET - SHARED, dtype=np.uint64) for _ in range(PAIRS)]
    values = np.concatenate([part for each in sets for part in (each[:SET], each[SET - SHARED :])])
    found = signatures(values, np.arange(0, 2 * PAIRS * SET + 1, SET))
    if found is not None:
        error = (found[::2] == found[1::2]).mean(axis=1) - SHARED / (2 * SET - SHARED)
        result |= {"bias": float(error.mean()), "standard_deviation": float(error.std())}
    return result


def main() -> None:
    """Measure and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    methods: dict[str, dict] = {}
    for name, signatures in METHODS.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is not installed: left out")
            continue
        methods[name] = {"version": version, **measure(signatures)}
    write_json(args.out, {"similarity": SHARED / (2 * SET - SHARED), "methods": methods})
    print(args.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
