"""Does it pay on real text: a small model trained on 5 % of a pool of tasks, chosen in several ways.

    python -m megatron_ksa.data_tools.benchmarks.tags_pays_real --work DIR --out results.json [--readme FILE]

The pool is that of `tags_tasks`: generated tasks and questions about real texts, of about 130 labels as frequent as
rank^-1, with drawn scores, tagged by the offline tagger and by its true tags. Held out are tasks of every label alike
(balanced), and of 8 labels of the rarer half that the seed draws (target); the alignment sees other tasks of these
labels, 20 of each. A model of half a million parameters learns the answers, the same number of steps of each choice.
Measured are the loss on answers, the mean over tasks of nats a token, and how many answers are right to the last token
when each token is the likeliest one (greedy decoding). A seed draws the scores, the target, the random choice, and the
model.

Every result is written when it is there, and a rerun with the same settings goes on. Pool and tags take about 3 minutes
of one processor core, each of the 30 models about half a minute; --steps 300 is a smaller shape, half as long.
"""

import argparse
import hashlib
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ksa.data_tools.benchmarks.compared import by_choice, difference, mean_and_deviation, seed_number
from megatron_ksa.data_tools.benchmarks.tags_objective import SHARE, defaults, judge, prepare
from megatron_ksa.data_tools.benchmarks.tags_pools import draw_scores
from megatron_ksa.data_tools.benchmarks.tags_tasks import NAME, SETS, make_tasks
from megatron_ksa.data_tools.benchmarks.task_model import (
    ANSWER,
    BATCH,
    LAYERS,
    LENGTH,
    VOCABULARY,
    WIDTH,
    Tasks,
    encode,
    evaluate,
    learn_tokens,
    train,
)
from megatron_ksa.data_tools.tags.engine import Engine
from megatron_ksa.data_tools.tags.files import read_jsonl, write_jsonl
from megatron_ksa.data_tools.tags.pipeline import COMMANDS, TARGET, Pipeline
from megatron_ksa.data_tools.tags.pool import Pool, load_pool
from megatron_ksa.data_tools.tags.sample import SampleSettings, sample
from megatron_ksa.data_tools.tags.step import Context
from megatron_ksa.data_tools.tags.tag import TaggerSettings
from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.markdown import replace_section, table
from megatron_ksa.results import Results

STEPS, TARGET_LABELS = 600, 8


@dataclass(frozen=True)
class Choice:
    """How one selection is made.

    Args:
        changes: of the sampler's settings; None for all of the pool.
        aligned: to the target.
        tagger: the tags that it sees.
    """

    changes: dict[str, Any] | None = field(default_factory=dict)
    aligned: bool = False
    tagger: str = "keyphrase"


MIG = {"method": "label-graph"}
CHOICES = {
    "TAGS 5 %": Choice(),
    "TAGS 5 %, aligned": Choice(aligned=True),
    "TAGS 5 %, exponents 0.4 and 1, an older default": Choice(
        {"share_exponent": 0.4, "branch_exponent": 1.0, "power": 0.4, "branch_weight": 1.0}
    ),
    "MIG 5 %": Choice(MIG),
    "top quality 5 %": Choice({"method": "top-quality"}),
    "random 5 %": Choice({"method": "random"}),
    "the whole pool": Choice(None),
    "TAGS 5 %, true tags": Choice(tagger="data"),
    "TAGS 5 %, true tags, aligned": Choice(aligned=True, tagger="data"),
    "MIG 5 %, true tags": Choice(MIG, tagger="data"),
}
# What is measured: key of a run, heading, factor, digits.
MEASURED = (
    (("balanced", "loss"), "loss, balanced", 1.0, 3), (("balanced", "accuracy"), "right of 100, balanced", 100.0, 1),
    (("target", "loss"), "loss, target", 1.0, 3), (("target", "accuracy"), "right of 100, target", 100.0, 1),
)  # fmt: skip
REFERENCES = ("TAGS 5 %", "random 5 %")


@dataclass(frozen=True)
class Experiment:
    """What all seeds share.

    Args:
        folder: of the pool.
        labels: str [tasks of the pool].
        pools: tagger -> the pool on its tree.
        rows: tagger -> int64 [instances], the task of each instance.
        held_out: tasks that are held out, with `set` and `label`.
        encoded: tokens of the pool's tasks.
        encoded_held_out: tokens of those held out.
        steps: of training.
    """

    folder: Path
    labels: np.ndarray
    pools: dict[str, Pool]
    rows: dict[str, np.ndarray]
    held_out: list[dict]
    encoded: Tasks
    encoded_held_out: Tasks
    steps: int

    def target_labels(self, seed: int) -> list[str]:
        """Labels that the target of a seed has: some of the rarer half of the pool's."""
        order = [label for label, _ in Counter(self.labels.tolist()).most_common()]
        rarer = sorted(order[len(order) // 2 :])
        return sorted(np.random.default_rng([seed, TARGET_LABELS]).choice(rarer, TARGET_LABELS, replace=False).tolist())

    def held_out_rows(self, name: str, labels: list[str] | None = None, source: str | None = None) -> np.ndarray:
        """int64, tasks of a set, of some labels or one source."""
        return np.array([
            n for n, row in enumerate(self.held_out)
            if row["set"] == name and (labels is None or row["label"] in labels)
            and (source is None or (row["kind_of"] == "reasoning") == (source == "reasoning"))
        ])  # fmt: skip

    def measure(self, seed: int, name: str) -> dict:
        """One choice of one seed: what is chosen, and the model trained on it."""
        start, choice = time.process_time(), CHOICES[name]
        target_labels, rows = self.target_labels(seed), self.rows[choice.tagger]
        codes = np.unique(self.labels, return_inverse=True)[1]
        scores = draw_scores(codes, np.random.default_rng(seed))
        pool = replace(self.pools[choice.tagger], quality=scores[rows])
        chosen = self.choose(pool, choice, seed, target_labels)
        tasks = rows[chosen]
        found: dict[str, Any] = {"seed": seed, "choice": name, "instances": len(tasks)}
        found |= judge(pool, codes[rows], chosen)
        found["of_target_labels"] = int(np.isin(self.labels[tasks], target_labels).sum())
        found["target_labels"] = target_labels
        model = train(self.encoded.take(tasks), seed, self.steps)
        evaluated = np.concatenate([self.held_out_rows("balanced"), self.held_out_rows("target", target_labels)])
        losses, right = evaluate(model, self.encoded_held_out.take(evaluated))
        for key, where in (
            ("balanced", self.held_out_rows("balanced")), ("target", self.held_out_rows("target", target_labels)),
            ("balanced_reasoning", self.held_out_rows("balanced", source="reasoning")),
            ("balanced_texts", self.held_out_rows("balanced", source="texts")),
        ):  # fmt: skip
            of_set = np.isin(evaluated, where)
            found[key] = {"tasks": int(of_set.sum()), "loss": float(losses[of_set].mean())}
            found[key]["accuracy"] = float(right[of_set].mean())
        found["parameters"] = sum(each.numel() for each in model.parameters())
        return found | {"cpu_seconds": round(time.process_time() - start, 1)}

    def choose(self, pool: Pool, choice: Choice, seed: int, target_labels: list[str]) -> np.ndarray:
        """int64 [chosen], instances of the pool."""
        if choice.changes is None:
            return np.arange(pool.instances)
        settings = replace(SampleSettings(str(round(SHARE * pool.instances)), seed=seed), **choice.changes)
        target = self.ground_target(choice.tagger, seed, target_labels) if choice.aligned else None
        return sample(pool, settings, target).chosen

    def ground_target(self, tagger: str, seed: int, labels: list[str]) -> np.ndarray:
        """Leaf shares of the target that the alignment sees, float64 [nodes]."""
        tasks = [self.held_out[row] for row in self.held_out_rows("aligned", labels)]
        work, path = self.folder / tagger, self.folder / f"target-{seed}.jsonl"
        write_jsonl(path, ({key: task[key] for key in ("id", "messages", "tags")} for task in tasks))
        steps = [*COMMANDS["tag"].target_steps, *COMMANDS["tree"].target_steps]
        settings = {config: config() for step in steps for config in step.settings.values()}
        settings |= {TaggerSettings: TaggerSettings(kind=tagger)}
        Pipeline(Context(work / TARGET, Engine(), (path,), pool=work), settings, lambda line: None).run(steps)
        return load_pool(work / TARGET, tree=work).shares.sum(axis=0)


def open_experiment(work: Path, steps: int) -> Experiment:
    """The pool with its tags and trees, and the tokens of all tasks; what is there stays."""
    folder = make_tasks(work)
    tasks, held_out = (list(read_jsonl(folder / name)) for name in ("pool.jsonl", "held_out.jsonl"))
    pools, rows = {}, {}
    for tagger in sorted({choice.tagger for choice in CHOICES.values()}):
        pools[tagger] = prepare(work, NAME, tagger)[0]
        ids = [record["id"] for record in read_jsonl(folder / tagger / "records.jsonl")]
        rows[tagger] = np.array([int(ids[line].rpartition("/")[2]) for line in np.asarray(pools[tagger].record)])
    tokenizer = learn_tokens(message["content"] for task in tasks for message in task["messages"])
    return Experiment(
        folder, np.array([task["label"] for task in tasks]), pools, rows, held_out, encode(tasks, tokenizer),
        encode(held_out, tokenizer), steps,
    )  # fmt: skip


def settings_of(experiment: Experiment) -> dict:
    """What results depend on; a rerun with other settings needs another file."""
    digest = hashlib.sha256((experiment.folder / "pool.jsonl").read_bytes()).hexdigest()[:16]
    return {
        "steps": experiment.steps, "batch": BATCH, "layers": LAYERS, "width": WIDTH, "vocabulary": VOCABULARY,
        "length": LENGTH, "answer": ANSWER, "pool_sha256": digest, "pool_tasks": len(experiment.labels),
        "labels": len(set(experiment.labels.tolist())), "held_out_of_each_label": SETS, "target_labels": TARGET_LABELS,
        "sampler": defaults(),
    }  # fmt: skip


def section(runs: list[dict], seeds: list[int]) -> str:
    """The tables as Markdown: means of the seeds, and differences from the references."""
    found, rows = by_choice(runs, CHOICES, seeds), []
    values = {name: [[run[a][b] for run in found[name]] for (a, b), *_ in MEASURED] for name in found}
    for name in found:
        means = [np.mean([run[key] for run in found[name]]) for key in ("instances", "labels", "effective", "quality")]
        row = [name, *(f"{mean:,.{digits}f}" for mean, digits in zip(means, (0, 1, 1, 2), strict=True))]
        row.append(f"{np.mean([run['of_target_labels'] for run in found[name]]):.0f}")
        cells = zip(values[name], MEASURED, strict=True)
        rows.append([*row, *(mean_and_deviation(each, factor, digits) for each, (_, _, factor, digits) in cells)])
    heads = [heading for _, heading, _, _ in MEASURED]
    counts = ["instances", "labels", "effective labels", "mean score", "of the target's labels"]
    parts = [table(["trained on", *counts, *heads], rows)]
    for reference in (name for name in REFERENCES if name in found):
        rows = [
            [name, *(difference(here, there, factor, digits) for here, there, (_, _, factor, digits)
                     in zip(values[name], values[reference], MEASURED, strict=True))]
            for name in found if name != reference
        ]  # fmt: skip
        parts.append(table([f"less {reference}", *heads], rows))
    return "\n\n".join(parts)


def main() -> None:
    """Run and write the numbers; bad input costs one line and exit code 2. What is in the JSON file stays."""
    with usage_errors_exit():
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--work", type=Path, required=True, help="folder of the pool and its tags")
        parser.add_argument("--out", type=Path, required=True, help="JSON file to write; a rerun goes on")
        parser.add_argument("--seeds", type=seed_number, nargs="+", default=[0, 1, 2])
        parser.add_argument("--steps", type=int, default=STEPS, help=f"of training (default: {STEPS})")
        parser.add_argument(
            "--choices", nargs="+", choices=CHOICES, default=list(CHOICES), help="what to compare (default: all)"
        )
        parser.add_argument("--readme", type=Path, help="file with a section tags_pays_real that takes the tables")
        args = parser.parse_args()
        if args.steps < 1:
            raise UsageError(f"--steps {args.steps}: at least 1")
        experiment = open_experiment(args.work, args.steps)
        packages = ("numpy", "scipy", "scikit-learn", "tokenizers", "reasoning-gym")
        results = Results(args.out, settings_of(experiment), ("seed", "choice"), packages=packages)
        known = {(run["seed"], run["choice"]) for run in results.stored()}
        for seed in args.seeds:
            for name in args.choices:
                if (seed, name) not in known:
                    run = experiment.measure(seed, name) | {"commit": results.commit}
                    results.add(run)
                    print(run, flush=True)
        text = section(results.stored(), args.seeds)
        print(text)
        if args.readme:
            replace_section(args.readme, "tags_pays_real", text)


if __name__ == "__main__":
    main()
