"""Seconds and memory of the steps at a million instances and more, with true tags.

    python -m megatron_ksa.data_tools.benchmarks.tags_scale --work DIR --out results.json --workers 2

The pool is synthetic: conversations of 60 words of a topic, topics as frequent as rank^-0.8, with five tags of 100,000,
a score, and every tenth one a near-copy of an earlier one. 5 % are chosen, and written by a tokenizer of bytes with the
loss on responses. Each step, from reading to the report, runs in a process of its own, so that its peak of memory is
its own; memory is the resident set of that process, and of the largest of its workers. The load average, told for each
step as it ends, tells whether seconds are those of an idle machine. What is measured is written after each step, with
the settings of the pool and of all steps, the machine, and the commit of each step; `--first STEP` goes on from there
in the work folder that an earlier run left, whose figures stay. A file of other settings is not gone on with.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ksa.data_tools.tags.chat_template import EncodingSettings
from megatron_ksa.data_tools.tags.engine import Engine
from megatron_ksa.data_tools.tags.files import write_json
from megatron_ksa.data_tools.tags.pipeline import COMMANDS, Pipeline
from megatron_ksa.data_tools.tags.step import Context, Step
from megatron_ksa.data_tools.tags.tag import TaggerSettings
from megatron_ksa.data_tools.tokenizers import write_byte_level
from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.results import check_settings, machine

TOPICS, TOPIC_TAGS, TAGS, WORDS, TOPIC_WORDS, LENGTH = 1000, 100, 5, 30_000, 300, 60
SKEW, COPIES, TOKENIZER = -0.8, 0.1, "tokenizer"
PACKAGES = ("numpy", "scipy", "scikit-learn", "ray")
STEPS = [step for command in ("tag", "tree", "sample", "write", "report") for step in COMMANDS[command].steps]


def write_pool(path: Path, instances: int) -> None:
    """Write the pool, unless it is there."""
    if path.exists():
        return
    generator = np.random.default_rng(0)
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    words = ["".join(generator.choice(syllables, 3)) for _ in range(WORDS)]
    frequency = (1.0 + np.arange(TOPICS)) ** SKEW
    partial = path.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8") as stream:
        before: list[tuple[str, str]] = []
        for first in range(0, instances, 10_000):
            count = min(10_000, instances - first)
            topics = generator.choice(TOPICS, count, p=frequency / frequency.sum())
            chosen = (topics[:, None] * 29 + generator.integers(0, TOPIC_WORDS, (count, LENGTH))) % WORDS
            tags = topics[:, None] * TOPIC_TAGS + generator.integers(0, TOPIC_TAGS, (count, TAGS))
            copies, quality = generator.random(count) < COPIES, generator.integers(1, 11, count)
            for row in range(count):
                asked, answered = (" ".join(words[word] for word in part) for part in np.split(chosen[row], [20]))
                if copies[row] and before:
                    asked, answered = before[int(chosen[row, 0]) % len(before)]
                    answered += f" {words[chosen[row, 1]]}"
                record = {
                    "id": first + row, "quality": int(quality[row]),
                    "tags": [
                        " ".join(words[n] for n in (t // TOPIC_TAGS, t % TOPIC_TAGS, t % 9973)) for t in tags[row]
                    ],
                    "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}],
                }  # fmt: skip
                stream.write(json.dumps(record) + "\n")
                if not copies[row] and row % 50 == 0:
                    before.append((asked, answered))
    partial.rename(path)


def step_settings(step: Step, tokenizer: str) -> dict[type, Any]:
    """What a step is run with: the defaults but for the tagger and the text that is written."""
    settings = {config: config() for config in step.settings.values()}
    if TaggerSettings in settings:
        settings[TaggerSettings] = TaggerSettings(kind="data")
    if EncodingSettings in settings:
        settings[EncodingSettings] = EncodingSettings(tokenizer, template="chatml", loss_on="responses")
    return settings


def settings_of() -> dict:
    """What decides the figures beside the machine, the commit and what each size tells itself: as JSON."""
    pool = {
        "topics": TOPICS, "tags_of_a_topic": TOPIC_TAGS, "tags": TAGS, "words": WORDS, "words_of_a_topic": TOPIC_WORDS,
        "length": LENGTH, "skew": SKEW, "copies": COPIES,
    }  # fmt: skip
    steps: dict[str, dict] = {step.name: {} for step in STEPS}
    for step in STEPS:
        for config, values in step_settings(step, TOKENIZER).items():
            steps[step.name][config.__name__] = asdict(values)
    return json.loads(json.dumps({"pool": pool, "steps": steps}, default=str))


def _apart(function: Callable, *arguments: Any) -> Any:
    """What a function returns in a process of its own, which is no daemon: a step starts workers of its own.

    The peak that a new process tells begins with that of the one which starts it. So what loads much, such as torch,
    runs here, and the process that starts the steps stays small.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
        return alone.submit(function, *arguments).result()


def run_step(work: Path, pool: Path, number: int, workers: int, engine: str) -> dict:
    """One step in this process: seconds, seconds of CPU, and GiB of this process and of its largest worker."""
    step = STEPS[number]
    settings = step_settings(step, str(pool.with_name(TOKENIZER)))
    printed: list[str] = []
    runner, start = Engine(engine, workers), time.monotonic()
    Pipeline(Context(work, runner, (pool,)), settings, printed.append).run([step])
    seconds = time.monotonic() - start
    runner.close()
    # The process whose forks the workers were: what it and they have used is this process's once it is waited for.
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    own, below = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "step": step.name, "seconds": round(seconds, 1),
        "cpu_seconds": round(sum(each.ru_utime + each.ru_stime for each in (own, below)), 1),
        "peak_gib": round(own.ru_maxrss / 2**20, 3), "worker_peak_gib": round(below.ru_maxrss / 2**20, 3),
        "told": printed[0],
    }  # fmt: skip


def measure(work: Path, instances: int, workers: int, engine: str, before: list[dict], commit: str) -> Iterator[dict]:
    """Every step once on one pool, each in a process of its own: what is known after each step.

    Args:
        before: the figures of steps that stand in the work folder.
        commit: of the code that runs.
    """
    work.mkdir(parents=True, exist_ok=True)
    pool = work / f"pool-{instances}.jsonl"
    _apart(write_pool, pool, instances)
    _apart(write_byte_level, work / TOKENIZER)
    folder, steps = work / f"work-{instances}", list(before)
    if not before:
        shutil.rmtree(folder, ignore_errors=True)
    for written in (folder / name for step in STEPS[len(before) :] for name in step.writes):
        # What stands would not be done again.
        shutil.rmtree(written, ignore_errors=True)
        written.unlink(missing_ok=True)
    for number in range(len(before), len(STEPS)):
        found = _apart(run_step, folder, pool, number, workers, engine)
        steps.append(found | {"load_average": round(os.getloadavg()[0], 1), "commit": commit})
        print(f"{instances:,} instances: {steps[-1]}", flush=True)
        total = {key: round(sum(step[key] for step in steps), 1) for key in ("seconds", "cpu_seconds")}
        peak = max(step[key] for step in steps for key in ("peak_gib", "worker_peak_gib"))
        yield {
            "instances": instances, "workers": workers, "engine": engine, "steps": steps, **total, "peak_gib": peak,
            "load_average": round(os.getloadavg()[1], 1),
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
        parser.add_argument(
            "--first", choices=[step.name for step in STEPS], default=STEPS[0].name,
            help="step to begin at; those before it stand in --work, and their figures in --out",
        )  # fmt: skip
        args = parser.parse_args()
        settings, sizes = settings_of(), {}
        if args.out.exists():
            there = json.loads(args.out.read_text(encoding="utf-8"))
            check_settings(args.out, there.get("settings"), settings)
            sizes = {row["instances"]: row for row in there["sizes"]}
        head = {"settings": settings, "machine": _apart(machine, None, PACKAGES)}
        first = [step.name for step in STEPS].index(args.first)
        for instances in args.instances:
            stands = sizes[instances]["steps"][:first] if first and instances in sizes else []
            if len(stands) < first:
                raise UsageError(f"--first {args.first}: {args.out} lacks the steps before it of {instances:,}")
            for found in measure(args.work, instances, args.workers, args.engine, stands, head["machine"]["commit"]):
                sizes[instances] = found
                cpus = len(os.sched_getaffinity(0))
                write_json(args.out, head | {"cpus": cpus, "sizes": [sizes[key] for key in sorted(sizes)]})


if __name__ == "__main__":
    main()
