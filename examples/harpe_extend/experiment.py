"""HARPE against a single base on small models: pretrained at 1k on needle-rich synthetic text, extended to 8k in one stage.

For every seed a dense model is pretrained and then extended with the same tokens by three arms: a single base, uniform
HARPE, searched HARPE. Each is scored on RULER's eight needle forms and on sliding-window perplexity. Everything runs
with the tools that users have. What is done is not done again; results.json grows arm by arm.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
try:
    from megatron_ksa.errors import UsageError, usage_errors_exit
except ModuleNotFoundError:
    print("error: megatron_ksa is not installed here: run `pip install -e .` in the repository", file=sys.stderr)
    sys.exit(2)
from report import write_report

BASE_MIN, BASE_MAX, STRIDE = 100_000, 500_000, 3000
HEAD_DIM = 64
ARMS = ("single base", "uniform HARPE", "searched HARPE")


def parse_arguments() -> argparse.Namespace:
    """The command line; the defaults are for one H100."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder of results.json and results.md")
    parser.add_argument("--work", type=Path, help="folder of data and checkpoints; OUT/work without it")
    parser.add_argument("--seeds", type=int, default=2, help="models pretrained and extended")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model")
    parser.add_argument("--heads", type=int, default=8, help="attention heads, of 64 channels")
    parser.add_argument("--pretrain-length", type=int, default=1024, help="tokens")
    parser.add_argument("--target-length", type=int, default=8192, help="tokens")
    parser.add_argument("--batch-tokens", type=int, default=65536, help="tokens of an iteration")
    parser.add_argument("--micro-batch-tokens", type=int, default=32768, help="tokens of a forward pass")
    parser.add_argument("--corpus-tokens", type=int, default=40_000_000, help="tokens of each of the two corpora")
    parser.add_argument("--pretrain-steps", type=int, default=1500, help="iterations")
    parser.add_argument("--extend-steps", type=int, default=200, help="iterations of each arm")
    parser.add_argument("--pretrain-lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--extend-lr", type=float, default=3e-4, help="learning rate; small models want more than 2e-5")
    parser.add_argument("--cases", type=int, default=8, help="needle cases of each form, length and depth")
    parser.add_argument("--jobs", type=int, default=6, help="trainings at a time on the device")
    parser.add_argument("--workers", type=int, default=8, help="processes that write the corpora")
    return parser.parse_args()


def _documents(task: tuple[int, int, int, int]) -> list[np.ndarray]:
    seed, shortest, longest, tokens = task
    from megatron_ksa.evaluation.token_language import TokenLanguage

    random, language, documents = np.random.default_rng(seed), TokenLanguage(), []
    while tokens > 0:
        documents.append(language.document(int(np.exp(random.uniform(np.log(shortest), np.log(longest + 1)))), random))
        tokens -= len(documents[-1])
    return documents


def write_corpus(prefix: Path, shortest: int, longest: int, tokens: int, seed: int, workers: int) -> None:
    """Documents of log-uniform lengths, unless they are there."""
    from megatron_ksa.data_tools.indexed import IndexedDatasetWriter
    from megatron_ksa.evaluation.token_language import VOCABULARY

    if prefix.with_suffix(".idx").exists():
        return
    tasks = [(1000 * seed + part, shortest, longest, tokens // 32) for part in range(32)]
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

    def call(self, log: Path, *words: object) -> None:
        """Run a command of the repository with its output in a file.

        Raises:
            UsageError: it failed; the message names the log and its last line.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as out:
            command = [sys.executable, *map(str, words)]
            code = subprocess.run(command, cwd=ROOT, stdout=out, stderr=out, check=False).returncode
        if code:
            raise UsageError(f"{words[0]} ended with exit code {code}: {log}: {log.read_text()[-600:]}")

    def prepare(self) -> None:
        """Corpora, length-upsampled data, validation documents and searched bases."""
        args, data = self.args, self.work / "data"
        data.mkdir(parents=True, exist_ok=True)
        short, long = args.pretrain_length, args.target_length
        write_corpus(data / "pretrain", short // 4, short, args.corpus_tokens, 1, args.workers)
        write_corpus(data / "mixed", short // 2, long, args.corpus_tokens, 2, args.workers)
        write_corpus(data / "validation", long + 512, long + 1024, 64 * long, 3, args.workers)
        if not (data / "extend.idx").exists():
            self.call(data / "upsample.log", "tools/upsample_lengths.py", "--data-path", data / "mixed", "--output-prefix",
                      data / "extend", "--threshold", long // 2, "--share", 0.8)  # fmt: skip
        if not (data / "bases.json").exists():
            self.call(data / "bases.log", "tools/search_harpe_bases.py", "--groups", args.heads, "--head-dim", HEAD_DIM,
                      "--base-min", BASE_MIN, "--base-max", BASE_MAX, "--stride", STRIDE, "--length", long,
                      "--output", data / "bases.json")  # fmt: skip

    def pretrain(self, seed: int) -> None:
        """The dense model that the seed's arms start from."""
        args, folder = self.args, self.work / f"seed{seed}"
        tracker = folder / "dense" / "latest_checkpointed_iteration.txt"
        done = int(tracker.read_text()) if tracker.exists() else 0
        if done >= args.pretrain_steps:
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

    def extend(self, seed: int, arm: str) -> Path:
        """The seed's model at the target length; its checkpoint folder."""
        args, folder = self.args, self.work / f"seed{seed}"
        save = folder / arm.replace(" ", "-")
        method = {
            "single base": ["--method", "single-base", "--rotary-base", BASE_MAX],
            "uniform HARPE": ["--harpe-base-min", BASE_MIN, "--harpe-base-max", BASE_MAX],
            "searched HARPE": ["--harpe-bases", self.work / "data/bases.json"],
        }[arm]
        length = args.target_length
        self.call(
            save.with_suffix(".log"), "examples/harpe_extend/extend.py", "--load", folder / "dense", "--save", save,
            "--data-path", self.work / "data/extend", *method, "--length", length, "--steps", args.extend_steps,
            "--global-batch-size", max(args.batch_tokens // length, 1),
            "--micro-batch-size", max(args.micro_batch_tokens // length, 1), "--lr", args.extend_lr,
            "--warmup", min(20, args.extend_steps // 4), "--seed", 1234 + seed,
            *(["--", *self.precision()] if self.precision() else []),
        )  # fmt: skip
        return save / str(length)

    def measure(self, seed: int, arm: str, checkpoint: Path) -> None:
        """Score a checkpoint and add it to the results, unless it is among them."""
        args, folder = self.args, self.work / f"seed{seed}"
        name = arm.replace(" ", "-")
        lengths = [args.pretrain_length]
        while lengths[-1] < args.target_length:
            lengths.append(min(2 * lengths[-1], args.target_length))
        joined = ",".join(map(str, lengths))
        needles, perplexity = folder / f"{name}-needles.json", folder / f"{name}-perplexity.json"
        if not needles.exists():
            self.call(folder / f"{name}.log", "examples/evaluate/needle.py", "--checkpoint", checkpoint, "--lengths", joined,
                      "--cases", args.cases, "--output", needles)  # fmt: skip
        if not perplexity.exists():
            self.call(folder / f"{name}.log", "examples/evaluate/perplexity.py", "--checkpoint", checkpoint, "--lengths", joined,
                      "--data-path", self.work / "data/validation", "--stride", min(256, args.pretrain_length),
                      "--windows", 64, "--output", perplexity)  # fmt: skip
        found = {"seed": seed, "arm": arm, "needles": json.loads(needles.read_text())["results"],
                 "perplexity": json.loads(perplexity.read_text())["results"]}  # fmt: skip
        with self.lock:
            path = args.out / "results.json"
            results = json.loads(path.read_text()) if path.exists() else {"runs": []}
            results["settings"] = {k: v for k, v in vars(args).items() if k not in ("out", "work", "jobs", "workers")}
            results["device"] = device_name()
            results["runs"] = [run for run in results["runs"] if (run["seed"], run["arm"]) != (seed, arm)] + [found]
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(results) + "\n", encoding="utf-8")
            partial.replace(path)
        print(f"seed {seed}, {arm}: measured", flush=True)


def device_name() -> str:
    """The machine that a result was measured on."""
    import os

    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"


def main() -> None:
    """Run; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        args = parse_arguments()
        if args.target_length % args.pretrain_length or args.target_length == args.pretrain_length:
            raise UsageError(f"--target-length {args.target_length}: a multiple of --pretrain-length {args.pretrain_length}")
        if args.heads < 2 or args.seeds < 1 or args.extend_steps < 1 or args.pretrain_steps < 1:
            raise UsageError("--heads: at least 2; --seeds, --pretrain-steps, --extend-steps: at least 1")
        args.out = args.out.resolve()
        args.out.mkdir(parents=True, exist_ok=True)
        experiment = Experiment(args, (args.work or args.out / "work").resolve(), Lock())
        experiment.prepare()
        print("data is ready", flush=True)
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(experiment.pretrain, range(args.seeds)))
            print("models are pretrained", flush=True)

            def run(task: tuple[int, str | None]) -> None:
                seed, arm = task
                if arm is None:
                    experiment.measure(seed, "before extension", experiment.work / f"seed{seed}" / "dense")
                else:
                    experiment.measure(seed, arm, experiment.extend(seed, arm))

            list(pool.map(run, [(seed, arm) for seed in range(args.seeds) for arm in (*ARMS, None)]))
        print(write_report(args.out / "results.json", args.out / "results.md"))


if __name__ == "__main__":
    main()
