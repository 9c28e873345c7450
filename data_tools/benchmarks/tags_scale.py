"""Seconds and memory of the steps at a million instances and more, with true tags.

    python -m megatron_ksa.data_tools.benchmarks.tags_scale --work DIR --out results.json --instances 1000000 [--workers 2]

The pool is synthetic: conversations of 60 words of a topic, of topics as frequent as rank^-0.8, with five tags of 100,000,
a score, and every tenth one a near-copy of an earlier one. Each step runs in a process of its own, by the command line,
so that its peak of memory is its own; memory is the largest resident set of that process and of any of its workers.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from megatron_ksa.data_tools.tags.files import write_json
from megatron_ksa.errors import UsageError, usage_errors_exit

ROOT = Path(__file__).resolve().parents[2]
TOPICS, TOPIC_TAGS, TAGS, WORDS, TOPIC_WORDS, LENGTH = 1000, 100, 5, 30_000, 300, 60
COPIES = 0.1
COMMANDS = ("tag", "tree", "sample")


def write_pool(path: Path, instances: int) -> None:
    """Write the pool, unless it is there."""
    if path.exists():
        return
    generator = np.random.default_rng(0)
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    words = ["".join(generator.choice(syllables, 3)) for _ in range(WORDS)]
    frequency = (1.0 + np.arange(TOPICS)) ** -0.8
    partial = path.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8") as stream:
        before: list[str] = []
        for first in range(0, instances, 10_000):
            count = min(10_000, instances - first)
            topics = generator.choice(TOPICS, count, p=frequency / frequency.sum())
            chosen = (topics[:, None] * 29 + generator.integers(0, TOPIC_WORDS, (count, LENGTH))) % WORDS
            tags = topics[:, None] * TOPIC_TAGS + generator.integers(0, TOPIC_TAGS, (count, TAGS))
            copies, quality = generator.random(count) < COPIES, generator.integers(1, 11, count)
            for row in range(count):
                text = " ".join(words[word] for word in chosen[row])
                if copies[row] and before:
                    text = before[int(chosen[row, 0]) % len(before)].replace(" ", " also ", 1)
                asked, answered = text[: len(text) // 3], text[len(text) // 3 :]
                record = {
                    "id": first + row, "quality": int(quality[row]),
                    "tags": [f"{words[tag // TOPIC_TAGS]} {words[tag % TOPIC_TAGS]} {words[tag % 9973]}" for tag in tags[row]],
                    "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}],
                }  # fmt: skip
                stream.write(json.dumps(record) + "\n")
                if not copies[row] and row % 50 == 0:
                    before.append(text)
    partial.rename(path)


def measured(arguments: list[object]) -> tuple[float, float, str]:
    """Seconds, GiB of the largest process, and what was printed, of one run of the tool in a process of its own."""
    code = (
        "import json, resource, runpy, sys\n"
        "sys.argv = json.loads(sys.argv[1])\n"
        "code = 0\n"
        "try:\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as error:\n"
        "    code = error.code or 0\n"
        "own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))\n"
        "print('PEAK', own, children)\n"
        "sys.exit(code)\n"
    )
    words = [str(ROOT / "tools" / "preprocess_tags.py"), *map(str, arguments)]
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, json.dumps(words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"{' '.join(words[1:4])}: exit code {done.returncode}: {done.stderr[-800:]}")
    printed, _, peaks = done.stdout.rpartition("PEAK ")
    return time.monotonic() - start, max(map(int, peaks.split())) / 2**20, printed.strip()


def measure(work: Path, instances: int, workers: int, engine: str) -> dict:
    """Every command once on one pool."""
    work.mkdir(parents=True, exist_ok=True)
    pool = work / f"pool-{instances}.jsonl"
    write_pool(pool, instances)
    common = ("--work", work / f"work-{instances}", "--workers", workers, "--engine", engine)
    flags = {"tag": ("--input", pool, "--tagger", "data"), "tree": (), "sample": ("--budget", "5%")}
    steps = {}
    for command in COMMANDS:
        seconds, peak, printed = measured([command, *common, *flags[command]])
        steps[command] = {"seconds": round(seconds, 1), "peak_gib": round(peak, 3), "printed": printed.splitlines()}
        print(f"{instances:,} instances: {command}: {steps[command]}", flush=True)
    return {
        "instances": instances, "workers": workers, "engine": engine, "steps": steps,
        "seconds": round(sum(step["seconds"] for step in steps.values()), 1),
        "peak_gib": max(step["peak_gib"] for step in steps.values()),
        "load_average": os.getloadavg()[0],
    }  # fmt: skip


def main() -> None:
    """Run and write the numbers; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--work", type=Path, required=True, help="folder of pools and work folders")
        parser.add_argument("--out", type=Path, required=True, help="JSON file to write; sizes that it has stay")
        parser.add_argument("--instances", type=int, nargs="+", default=[1_000_000, 2_000_000])
        parser.add_argument("--workers", type=int, default=2)
        parser.add_argument("--engine", default="local")
        args = parser.parse_args()
        before = json.loads(args.out.read_text(encoding="utf-8"))["sizes"] if args.out.exists() else []
        sizes = {row["instances"]: row for row in before}
        for instances in args.instances:
            sizes[instances] = measure(args.work, instances, args.workers, args.engine)
            result = {"cpus": len(os.sched_getaffinity(0)), "sizes": [sizes[key] for key in sorted(sizes)]}
            write_json(args.out, result)


if __name__ == "__main__":
    main()
