"""HARPE against a single base on small models: pretrained at 1k on needle-rich synthetic text, extended to 8k in one stage.

For every seed a dense model is pretrained and then extended with the same tokens by three arms: a single base, uniform
HARPE, searched HARPE. Each is scored on RULER's eight needle forms and on sliding-window perplexity. Everything runs
with the tools that users have. Extension goes in rounds of --extend-steps iterations, after each of which all arms are
scored: results.json and results.md grow measurement by measurement, and compare what all seeds and arms have reached.
What is done is not done again.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
try:
    from megatron_ksa.errors import UsageError, usage_errors_exit
except ModuleNotFoundError:
    print("error: megatron_ksa is not installed here: run `pip install -e '.[train]'` in the repository", file=sys.stderr)
    sys.exit(2)
from report import write_report

BASE_MIN, BASE_MAX, STRIDE = 100_000, 500_000, 3000
HEAD_DIM = 64
BEFORE = "before extension"
ARMS = ("single base", "uniform HARPE", "searched HARPE")


def parse_arguments() -> argparse.Namespace:
    """The command line; the defaults are for one H100."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of results.json and results.md")
    parser.add_argument("--work", type=Path, help="folder of data and checkpoints; OUT/work without it")
    parser.add_argument("--seeds", type=int, default=2, help="models pretrained and extended")
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=ARMS, metavar="ARM", help="ways to extend to compare"
    )
    parser.add_argument("--layers", type=int, default=4, help="layers of the model")
    parser.add_argument("--heads", type=int, default=8, help="attention heads, of 64 channels")
    parser.add_argument("--pretrain-length", type=int, default=1024, help="tokens")
    parser.add_argument("--target-length", type=int, default=8192, help="tokens")
    parser.add_argument("--batch-tokens", type=int, default=32768, help="tokens of an iteration")
    parser.add_argument("--micro-batch-tokens", type=int, default=32768, help="tokens of a forward pass")
    parser.add_argument("--corpus-tokens", type=int, default=24_000_000, help="tokens of each of the two corpora")
    parser.add_argument("--pretrain-steps", type=int, default=2000, help="iterations")
    parser.add_argument("--extend-steps", type=int, default=300, help="iterations of each arm in a round")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of extension, at most")
    parser.add_argument(
        "--deadline", type=float, help="seconds from the start; no round begins that would not end before"
    )
    parser.add_argument("--pretrain-lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--extend-lr", type=float, default=3e-4, help="learning rate; small models want more than 2e-5")
    parser.add_argument("--cases", type=int, default=8, help="needle cases of each form, length and depth")
    parser.add_argument("--jobs", type=int, default=8, help="trainings and measurements at a time on the device")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that write the corpora")
    return parser.parse_args()


def _documents(task: tuple[int, int, int, int, int]) -> list[np.ndarray]:
    seed, shortest, longest, tokens, reach = task
    from megatron_ksa.evaluation.token_language import TokenLanguage

    random, language, documents = np.random.default_rng(seed), TokenLanguage(), []
    while tokens > 0:
        size = int(np.exp(random.uniform(np.log(shortest), np.log(longest + 1))))
        documents.append(language.document(size, random, reach))
        tokens -= len(documents[-1])
    return documents


def write_corpus(prefix: Path, shortest: int, longest: int, tokens: int, reach: int, seed: int, workers: int) -> None:
    """Documents of log-uniform lengths, unless they are there."""
    from megatron_ksa.data_tools.indexed import IndexedDatasetWriter
    from megatron_ksa.evaluation.token_language import VOCABULARY

    if prefix.with_suffix(".idx").exists():
        return
    tasks = [(1000 * seed + part, shortest, longest, tokens // 32, reach) for part in range(32)]
    with ProcessPoolExecutor(workers) as pool, IndexedDatasetWriter(str(prefix), VOCABULARY, overwrite=True) as writer:
        for documents in pool.map(_documents, tasks):
            for document in documents:
                writer.add_document(document)


@dataclass(frozen=True)
class Experiment:
    """One run of the experiment: its settings and folders."""

    args: argparse.Namespace
    work: Path
    lock: Lock
    start: float

    def call(self, log: Path, *words: object) -> None:
        """Run a command of the repository with its output in a file.

        Raises:
            UsageError: it failed; the message names the log and its last line.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as out:
            command = [sys.executable, *map(str, words)]
            # Trainings run side by side: the cores are shared among them.
            threads = max((os.cpu_count() or 1) // self.args.jobs, 1)
            environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
            code = subprocess.run(command, cwd=ROOT, stdout=out, stderr=out, env=environment, check=False).returncode
        if code:
            raise UsageError(f"{words[0]} ended with exit code {code}: {log}: {log.read_text()[-600:]}")

    def prepare(self) -> None:
        """Corpora, length-upsampled data, validation documents and searched bases."""
        args, data = self.args, self.work / "data"
        data.mkdir(parents=True, exist_ok=True)
        short, long = args.pretrain_length, args.target_length
        # Documents are longer than the window that is cut from them: one cut at random still holds needles as far from
        # their questions as it is long.
        write_corpus(data / "pretrain", short // 2, 4 * short, args.corpus_tokens, short, 1, args.workers)
        write_corpus(data / "mixed", short // 2, 4 * long, args.corpus_tokens, long, 2, args.workers)
        write_corpus(data / "validation", long + 512, long + 1024, 64 * long, long, 3, args.workers)
        if not (data / "extend.idx").exists():
            self.call(data / "upsample.log", "tools/upsample_lengths.py", "--data-path", data / "mixed", "--output-prefix",
                      data / "extend", "--threshold", long, "--share", 0.8)  # fmt: skip
        if not (data / "bases.json").exists():
            self.call(data / "bases.log", "tools/search_harpe_bases.py", "--groups", args.heads, "--head-dim", HEAD_DIM,
                      "--base-min", BASE_MIN, "--base-max", BASE_MAX, "--stride", STRIDE, "--length", long,
                      "--output", data / "bases.json")  # fmt: skip

    def pretrain(self, seed: int) -> None:
        """The dense model that the seed's arms start from."""
        args, folder = self.args, self.work / f"seed{seed}"
        if iterations_done(folder / "dense") >= args.pretrain_steps:
            return
        from megatron_ksa.evaluation.token_language import VOCABULARY

        hidden, length = args.heads * HEAD_DIM, args.pretrain_length
        self.call(
            folder / "dense.log", "pretrain_gpt.py", "--num-layers", args.layers, "--hidden-size", hidden,
            "--ffn-hidden-size", hidden * 8 // 3 // 64 * 64, "--num-attention-heads", args.heads, "--kv-channels", HEAD_DIM,
            # One base for all heads is RoPE; this way the attention is the one that the arms run.
            "--position-embedding-type", "harpe", "--harpe-bases", ",".join(["10000"] * args.heads),
            "--normalization", "RMSNorm", "--qk-layernorm", "--swiglu", "--disable-bias-linear", "--hidden-dropout", 0,
            "--attention-dropout", 0, "--seq-length", length, "--max-position-embeddings", length,
            "--micro-batch-size", max(args.micro_batch_tokens // length, 1),
            "--global-batch-size", max(args.batch_tokens // length, 1), "--train-iters", args.pretrain_steps,
            "--lr", args.pretrain_lr, "--min-lr", args.pretrain_lr / 10, "--lr-decay-style", "cosine",
            "--lr-warmup-iters", min(100, args.pretrain_steps // 4), "--adam-beta2", 0.95, "--weight-decay", 0.1,
            "--clip-grad", 1.0, "--seed", 1234 + seed, "--tokenizer-type", "NullTokenizer", "--vocab-size", VOCABULARY - 1,
            "--data-path", self.work / "data/pretrain", "--split", "100,0,0", "--data-cache-path", folder / "cache",
            "--eval-iters", 0, "--log-interval", 50, "--ckpt-format", "torch_dist", "--save", folder / "dense",
            "--load", folder / "dense", "--save-interval", args.pretrain_steps, *self.precision(),
        )  # fmt: skip

    def precision(self) -> list[str]:
        """bf16 where there is a GPU."""
        import torch

        return ["--bf16"] if torch.cuda.is_available() else []

    def extend(self, seed: int, arm: str, rounds: int) -> Path:
        """The seed's model at the target length after so many rounds; its checkpoint folder."""
        args, folder = self.args, self.work / f"seed{seed}"
        save = folder / arm.replace(" ", "-")
        method = {
            "single base": ["--method", "single-base", "--rotary-base", BASE_MAX],
            "uniform HARPE": ["--harpe-base-min", BASE_MIN, "--harpe-base-max", BASE_MAX],
            "searched HARPE": ["--harpe-bases", self.work / "data/bases.json"],
        }[arm]
        length = args.target_length
        if iterations_done(save / str(length)) >= args.extend_steps * rounds:
            return save / str(length)
        self.call(
            save.with_suffix(".log"), "examples/harpe_extend/extend.py", "--load", folder / "dense", "--save", save,
            "--data-path", self.work / "data/extend", *method, "--length", length, "--steps", args.extend_steps * args.rounds,
            "--global-batch-size", max(args.batch_tokens // length, 1),
            "--micro-batch-size", max(args.micro_batch_tokens // length, 1), "--lr", args.extend_lr,
            "--warmup", min(20, args.extend_steps // 4), "--seed", 1234 + seed,
            # One run of all rounds, which stops after each: schedule and data are those of a run without stops.
            "--", "--exit-interval", args.extend_steps, *self.precision(),
        )  # fmt: skip
        return save / str(length)

    def measure(self, seed: int, arm: str, steps: int, checkpoint: Path) -> None:
        """Score a checkpoint of so many iterations of extension and add it to the results, unless it is among them."""
        args, folder = self.args, self.work / f"seed{seed}"
        name = f"{arm.replace(' ', '-')}-{steps}"
        lengths = [args.pretrain_length]
        while lengths[-1] < args.target_length:
            lengths.append(min(2 * lengths[-1], args.target_length))
        needles, perplexity = folder / f"{name}-needles.json", folder / f"{name}-perplexity.json"
        flags = {
            needles: ["--cases", args.cases],
            perplexity: ["--data-path", self.work / "data/validation", "--stride", min(256, args.pretrain_length), "--windows", 64],
        }  # fmt: skip

        def score(output: Path) -> None:
            if not output.exists():
                tool = f"examples/evaluate/{output.stem.rsplit('-', 1)[1].replace('needles', 'needle')}.py"
                self.call(output.with_suffix(".log"), tool, "--checkpoint", checkpoint, "--lengths", ",".join(map(str, lengths)),
                          "--output", output, *flags[output])  # fmt: skip

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(score, flags))
        found = {"seed": seed, "arm": arm, "steps": steps, "needles": json.loads(needles.read_text())["results"],
                 "perplexity": json.loads(perplexity.read_text())["results"]}  # fmt: skip
        with self.lock:
            path = args.out / "results.json"
            results = json.loads(path.read_text()) if path.exists() else {"runs": []}
            hidden = ("out", "work", "arms", "jobs", "workers", "rounds", "deadline")
            results["settings"] = {key: value for key, value in vars(args).items() if key not in hidden}
            results["device"] = device_name()
            same = (seed, arm, steps)
            results["runs"] = [run for run in results["runs"] if (run["seed"], run["arm"], run["steps"]) != same] + [
                found
            ]
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(results) + "\n", encoding="utf-8")
            partial.replace(path)
            write_report(path, args.out / "results.md")
        self.tell(f"seed {seed}, {arm}, {steps} iterations: measured")

    def tell(self, what: str) -> None:
        """A line of progress with the seconds since the start."""
        print(f"{time.monotonic() - self.start:6.0f} s  {what}", flush=True)

    def arm(self, seed: int, arm: str, rounds: int) -> None:
        """Extend by an arm up to a round, and measure; before extension there is nothing to extend."""
        if arm == BEFORE:
            self.measure(seed, arm, 0, self.work / f"seed{seed}" / "dense")
        else:
            self.measure(seed, arm, self.args.extend_steps * rounds, self.extend(seed, arm, rounds))

    def run(self) -> None:
        """Everything in order: data, models, round after round of all arms."""
        args, seeds = self.args, range(self.args.seeds)
        self.prepare()
        self.tell("data is ready")
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(self.pretrain, seeds))
            self.tell("models are pretrained")
            for rounds in range(1, args.rounds + 1):
                begin = time.monotonic()
                arms = args.arms if rounds > 1 else (*args.arms, BEFORE)
                list(pool.map(lambda task: self.arm(*task), [(seed, arm, rounds) for arm in arms for seed in seeds]))
                now = time.monotonic()
                self.tell(f"round {rounds} is complete")
                if args.deadline is not None and now - self.start + 1.1 * (now - begin) > args.deadline:
                    break


def iterations_done(checkpoint: Path) -> int:
    """Iterations of the newest checkpoint in a folder, 0 without one."""
    tracker = checkpoint / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else 0


def device_name() -> str:
    """The machine that a result was measured on."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"


def main() -> None:
    """Run; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        args = parse_arguments()
        if args.target_length % args.pretrain_length or args.target_length == args.pretrain_length:
            raise UsageError(
                f"--target-length {args.target_length}: a multiple of --pretrain-length {args.pretrain_length}"
            )
        at_least = {"heads": 2} | dict.fromkeys(
            ("seeds", "extend_steps", "pretrain_steps", "rounds", "jobs", "workers", "cases"), 1
        )
        for name, least in at_least.items():
            if getattr(args, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least {least}")
        args.out = args.out.resolve()
        args.out.mkdir(parents=True, exist_ok=True)
        work = (args.work or args.out / "work").resolve()
        Experiment(args, work, Lock(), time.monotonic()).run()
        print(write_report(args.out / "results.json", args.out / "results.md"))


if __name__ == "__main__":
    main()
