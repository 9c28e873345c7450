"""Does it pay: a small model trained on 5 % of a pool, chosen in several ways, evaluated on a balanced held-out set.

    python -m megatron_ksa.data_tools.benchmarks.tags_pays --work DIR --out results.json [--readme data_tools/README.md]

The pool is synthetic: each topic is a Markov chain over words of its own and common ones, so that a model must see a
topic to predict it. Planted are near-copies (a word changed), junk (words of all topics in any order) and topics as
frequent as rank^-1.2. The quality score is what a judge of single texts could give: noisy, a little lower for junk,
blind to topic and copies. TAGS sees texts and scores only. The held-out set has every topic equally often, which
rewards coverage: that is what is asked here, and not a result. Every model is trained by `pretrain_gpt.py` for the
same number of steps. Every result is written when it is there, and a rerun goes on; a run of the committed size takes
about 15 minutes of one processor core; --instances, --seeds and --choices make a smaller one.
"""

import argparse
import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from megatron_ksa.data_tools.benchmarks.compared import by_choice, difference, mean_and_deviation, seed_number
from megatron_ksa.data_tools.benchmarks.tags_objective import defaults
from megatron_ksa.data_tools.tags.files import write_json, write_jsonl
from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.markdown import replace_section, table
from megatron_ksa.results import Results

ROOT = Path(__file__).resolve().parents[2]
TOPICS, TOPIC_WORDS, COMMON_WORDS, SUCCESSORS, LENGTH = 16, 120, 80, 5, 60
COPIES, JUNK, SKEW = 0.3, 0.15, 1.2
QUALITY, JUNK_QUALITY, NOISE = 6.5, 4.5, 1.8
HELD_OUT = 20
JUNK_TOPIC = -1
# Name: what it is called in the table, sampling method, whether near-duplicates are left out first, share of the pool.
CHOICES = {
    "tags": ("TAGS 5 %", "tags", True, 0.05),
    "mig": ("MIG 5 %", "label-graph", True, 0.05),
    "random": ("random 5 %", "random", False, 0.05),
    "top-quality": ("top quality 5 %", "top-quality", False, 0.05),
    "top-quality-distinct": ("top quality 5 %, near-duplicates left out", "top-quality", True, 0.05),
    "whole-pool": ("the whole pool", "random", False, 1.0),
}
REFERENCES = ("tags", "random")
SEQUENCE, BATCH, STEPS, VOCABULARY = 128, 16, 150, 3000
MODEL = (
    "--num-layers", 2, "--hidden-size", 64, "--ffn-hidden-size", 192, "--num-attention-heads", 4,
    "--normalization", "RMSNorm",
    "--swiglu", "--disable-bias-linear", "--hidden-dropout", 0, "--attention-dropout", 0,
    "--position-embedding-type", "rope",
    "--seq-length", SEQUENCE, "--max-position-embeddings", SEQUENCE, "--init-method-std", 0.02,
)  # fmt: skip


class Language:
    """Words, and for each topic which words may follow which."""

    def __init__(self, generator: np.random.Generator) -> None:
        self.generator = generator
        syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
        words = {"".join(generator.choice(syllables, 3)) for _ in range(4 * (TOPICS * TOPIC_WORDS + COMMON_WORDS))}
        self.words = np.array(sorted(words))[generator.permutation(len(words))][: TOPICS * TOPIC_WORDS + COMMON_WORDS]
        self.known = [
            np.concatenate([np.arange(COMMON_WORDS), COMMON_WORDS + topic * TOPIC_WORDS + np.arange(TOPIC_WORDS)])
            for topic in range(TOPICS)
        ]
        self.successors = [
            generator.choice(known, (len(self.words), SUCCESSORS), p=_mostly_own(len(known))) for known in self.known
        ]

    def text(self, topic: int) -> list[str]:
        """Words of one text about a topic."""
        word, found = int(self.generator.choice(self.known[topic])), []
        for choice in self.generator.integers(SUCCESSORS, size=LENGTH):
            found.append(str(self.words[word]))
            word = int(self.successors[topic][word, choice])
        return found

    def junk(self) -> list[str]:
        """Words of any topic in any order."""
        return [str(word) for word in self.generator.choice(self.words, LENGTH)]


def _mostly_own(known: int) -> np.ndarray:
    """Chance of each word of a topic to follow another: four of five words are the topic's own."""
    weight = np.full(known, 0.8 / TOPIC_WORDS)
    weight[:COMMON_WORDS] = 0.2 / COMMON_WORDS
    return weight / weight.sum()


def make_pool(seed: int, instances: int, folder: Path) -> None:
    """Write `pool.jsonl` and `held_out.jsonl`; what is planted is in `planted.json` and nowhere else."""
    generator = np.random.default_rng(seed)
    language = Language(generator)
    frequency = (1.0 + generator.permutation(TOPICS)) ** -SKEW
    kinds = generator.choice(["copy", "junk", "own"], instances, p=[COPIES, JUNK, 1 - COPIES - JUNK])
    texts: list[list[str]] = []
    good: list[int] = []
    originals, topics = list(range(instances)), [JUNK_TOPIC] * instances
    for number, kind in enumerate(kinds):
        if kind == "copy" and good:
            original = int(generator.choice(good))
            words, originals[number], topics[number] = list(texts[original]), original, topics[original]
            words[int(generator.integers(LENGTH))] = str(generator.choice(language.words))
        elif kind == "junk":
            words = language.junk()
        else:
            topics[number] = int(generator.choice(TOPICS, p=frequency / frequency.sum()))
            words = language.text(topics[number])
            good.append(number)
        texts.append(words)
    mean = np.where(kinds == "junk", JUNK_QUALITY, QUALITY)
    scores = np.clip(np.round(generator.normal(mean, NOISE)), 1, 10)
    rows = (
        {"id": n, "text": " ".join(words), "quality": float(score)}
        for n, (words, score) in enumerate(zip(texts, scores, strict=True))
    )
    write_jsonl(folder / "pool.jsonl", rows)
    held_out = (language.text(topic) for topic in range(TOPICS) for _ in range(HELD_OUT))
    write_jsonl(folder / "held_out.jsonl", ({"text": " ".join(words)} for words in held_out))
    write_json(folder / "planted.json", {"original": originals, "topic": topics})


def call(*words: object) -> str:
    """Run a command line of the repository; returns what it printed."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"{' '.join(command[1:4])} ended with exit code {done.returncode}: {done.stderr[-500:]}")
    return done.stdout


def choose(folder: Path, work: Path, seed: int, method: str, deduplicate: bool, budget: int) -> dict:
    """Select and write; returns how many are chosen and what is planted in them, as `planted` counts it."""
    call(
        "tools/preprocess_tags.py", "--work", work, "--input", folder / "pool.jsonl", "--method", method,
        "--budget", budget, "--seed", seed, "--tokenizer-model", folder / "tokenizer.model",
        "--duplicate-similarity", 0.7 if deduplicate else 0,
    )  # fmt: skip
    lines = (work / "selection.jsonl").read_text(encoding="utf-8").splitlines()
    rows = np.array([int(json.loads(line)["id"].rpartition("/")[2]) for line in lines])
    truth = json.loads((folder / "planted.json").read_text(encoding="utf-8"))
    return planted(np.array(truth["original"])[rows], np.array(truth["topic"])[rows])


def planted(originals: np.ndarray, topics: np.ndarray) -> dict:
    """What is planted in chosen instances: shares of copies and of junk, and the topics.

    A copy is an instance whose original, or another copy of it, is chosen too. A copy alone is as good as its original.

    Args:
        originals: int64 [chosen], of each instance the text that it is a copy of, or itself.
        topics: int64 [chosen], `JUNK_TOPIC` for junk.
    """
    share = np.bincount(topics[topics != JUNK_TOPIC]) / max((topics != JUNK_TOPIC).sum(), 1)
    share = share[share > 0]
    return {
        "instances": len(topics), "copy": 1 - len(np.unique(originals)) / len(originals),
        "junk": float((topics == JUNK_TOPIC).mean()), "topics": float(np.exp(-(share * np.log(share)).sum())),
    }  # fmt: skip


def train(folder: Path, work: Path, seed: int) -> float:
    """Loss on the held-out set after training, nats a token."""
    # Megatron knows a cached index by the path of its dataset, where another choice may have been.
    shutil.rmtree(work / "cache", ignore_errors=True)
    blend = (work / "blend" / "blend.txt").read_text().split()
    printed = call(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1, "pretrain_gpt.py", *MODEL,
        "--micro-batch-size", BATCH, "--global-batch-size", BATCH, "--train-iters", STEPS, "--lr", 5e-3,
        "--min-lr", 5e-4, "--lr-decay-style", "cosine", "--lr-warmup-iters", 10, "--clip-grad", 1.0,
        "--weight-decay", 0.1,
        "--seed", 1234 + seed,
        "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", folder / "tokenizer.model",
        "--train-data-path", *blend, "--valid-data-path", folder / "held_out", "--data-cache-path", work / "cache",
        "--eval-interval", STEPS, "--eval-iters", 16, "--log-interval", STEPS,
    )  # fmt: skip
    found = re.findall(r"validation loss at iteration.*?lm loss value: ([\d.E+-]+)", printed)
    if not found:
        raise UsageError(f"pretrain_gpt.py printed no validation loss: {printed[-500:]}")
    return float(found[-1])


def prepare(folder: Path, seed: int, instances: int) -> None:
    """The pool of a seed, its tokenizer and its held-out set; what is there stays."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "planted.json").exists():
        make_pool(seed, instances, folder)
    tokenizer = folder / "tokenizer.model"
    if not tokenizer.exists():
        call(
            "tools/train_tokenizer.py", "--input", folder / "pool.jsonl", "--vocab-size", VOCABULARY,
            "--output", tokenizer,
        )  # fmt: skip
    if not (folder / "held_out.idx").exists():
        call(
            "tools/preprocess_data.py", "--input", folder / "held_out.jsonl", "--output-prefix", folder / "held_out",
            "--tokenizer-model", tokenizer,
        )  # fmt: skip


def measure(folder: Path, seed: int, instances: int, name: str) -> dict:
    """One choice on the pool of a seed: what was chosen, the loss after training, and processor seconds."""
    _, method, deduplicate, share = CHOICES[name]
    # Choices from the same instances share what comes before sampling.
    work = folder / ("distinct" if deduplicate else "all")
    start = _seconds()
    chosen = choose(folder, work, seed, method, deduplicate, round(share * instances))
    loss = train(folder, work, seed)
    return {"seed": seed, "choice": name, **chosen, "loss": loss, "cpu_seconds": round(_seconds() - start, 1)}


def _seconds() -> float:
    """Processor seconds of the commands that have ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def section(runs: list[dict], seeds: list[int], instances: int) -> str:
    """The table as Markdown, the best choice first, and which choices differ."""
    found = by_choice(runs, CHOICES, seeds)
    losses = {name: [run["loss"] for run in found[name]] for name in found}
    references = [name for name in REFERENCES if name in found]
    rows = []
    for name in sorted(found, key=lambda name: np.mean(losses[name])):
        share = {key: np.mean([run[key] for run in found[name]]) for key in ("instances", "copy", "junk", "topics")}
        by_seed = losses[name]
        rows.append([
            CHOICES[name][0], f"{share['instances']:,.0f}", f"{100 * share['copy']:.0f} %",
            f"{100 * share['junk']:.0f} %", f"{share['topics']:.1f}",
            mean_and_deviation(by_seed), " ".join(f"{loss:.3f}" for loss in by_seed),
            *("" if name == other else difference(by_seed, losses[other]) for other in references),
        ])  # fmt: skip
    columns = ["trained on", "instances", "copies among them", "junk", "topics", "loss, nats a token", "by seed"]
    columns += [f"less that of {CHOICES[name][0]}" for name in references]
    note = (
        f"{instances:,} instances, {TOPICS} topics, {STEPS} steps of {BATCH} x {SEQUENCE} tokens each, "
        f"{len(seeds)} seeds (pool, selection and training); mean ± standard deviation of the seeds. "
        "Topics: the exponential of their entropy. Bold: a difference, seed by seed, whose 95 % interval (Student's t) "
        "leaves out zero."
    )
    return f"{table(columns, rows)}\n\n{note}"


def main() -> None:
    """Run; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument(
            "--work", type=Path, required=True, help="folder of everything that is written; a rerun goes on"
        )
        parser.add_argument("--out", type=Path, required=True, help="JSON file of the results; what it has stays")
        parser.add_argument("--instances", type=int, default=8000, help="of each pool (default: 8000)")
        parser.add_argument(
            "--seeds", type=seed_number, nargs="+", default=[0, 1, 2], help="of pool, selection and training"
        )
        parser.add_argument(
            "--choices", nargs="+", choices=CHOICES, default=list(CHOICES), help="what to compare (default: all)"
        )
        parser.add_argument("--readme", type=Path, help="file with a section tags_pays that takes the table")
        args = parser.parse_args()
        work = args.work.resolve()
        settings = {
            "instances": args.instances, "steps": STEPS, "batch": BATCH, "sequence": SEQUENCE, "model": list(MODEL),
            "sampler": defaults(),
        }  # fmt: skip
        packages = ("megatron-core", "numpy", "scipy", "scikit-learn", "sentencepiece")
        results = Results(args.out, settings, ("seed", "choice"), packages=packages)
        known = {(run["seed"], run["choice"]) for run in results.stored()}
        for seed in args.seeds:
            folder = work / f"seed-{seed}-of-{args.instances}"
            for name in args.choices:
                if (seed, name) not in known:
                    prepare(folder, seed, args.instances)
                    run = measure(folder, seed, args.instances, name) | {"commit": results.commit}
                    results.add(run)
                    print(run, flush=True)
        text = section(results.stored(), args.seeds, args.instances)
        print(text)
        if args.readme:
            replace_section(args.readme, "tags_pays", text)


if __name__ == "__main__":
    main()
