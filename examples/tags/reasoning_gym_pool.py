"""A third pool with known topics: generated puzzles of about 100 kinds (reasoning-gym), each with its kind, as JSONL.

Needs `pip install reasoning-gym==0.1.25`. Kinds that need another package, or whose questions are longer than
`CHARACTERS`, are left out and named.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.files import whole_file

CHARACTERS = 6_000


def puzzles(count: int, seed: int, left_out: dict[str, str]) -> Iterator[dict]:
    """Records of every kind: id, source (the kind), instruction, output.

    Args:
        count: records of a kind.
        left_out: takes the kinds that cannot be had, with why.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is not installed: pip install reasoning-gym==0.1.25") from None
    for kind in sorted(name for name in DATASETS if name != "composite"):
        try:
            made = list(reasoning_gym.create_dataset(kind, size=count, seed=seed))
        except (ImportError, ValueError, TypeError, OSError, AssertionError, AttributeError) as error:
            left_out[kind] = f"{type(error).__name__}: {error}"
            continue
        if max(len(entry["question"]) for entry in made) > CHARACTERS:
            left_out[kind] = f"questions of more than {CHARACTERS:,} characters"
            continue
        for number, entry in enumerate(made):
            answer = "" if entry["answer"] is None else str(entry["answer"])
            yield {"id": f"{kind}-{number}", "source": kind, "instruction": entry["question"], "output": answer}


def main() -> None:
    """Run; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        parser.add_argument("--output", type=Path, required=True, help="JSONL file to write")
        parser.add_argument("--each", type=int, default=40, help="records of a kind (default: 40)")
        parser.add_argument("--seed", type=int, default=0, help="decides the puzzles (default: 0)")
        args = parser.parse_args()
        left_out: dict[str, str] = {}
        kinds, written = set(), 0
        with whole_file(args.output) as stream:
            for record in puzzles(args.each, args.seed, left_out):
                kinds.add(record["source"])
                written += 1
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        for kind, why in left_out.items():
            print(f"left out: {kind} ({why[:120]})")
        print(f"{args.output}: {written:,} records, {len(kinds)} kinds")


if __name__ == "__main__":
    sys.exit(main())
