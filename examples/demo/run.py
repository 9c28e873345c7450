"""Select from Python's standard library with TAGS and pretrain a tiny 3:1 hybrid KSA + HARPE model on it: `make demo`.

Each step leaves its result under a name of its own when it is whole, so that a second run goes on where the first
one stopped. Everything is done with the command lines that a user types; each is printed.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "examples"))
import installed  # noqa: F401
from corpus import write_corpus
from report import VALIDATION, kv_table, plot_losses, read_losses, unigram_loss

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.files import writing

LAYERS, SEQUENCE, VOCABULARY = 8, 512, 2048
KSA = KSAConfig(enabled=True, window_chunks="8", layer_pattern="kkkf*2")
MODEL = [
    "--ksa", "--ksa-window-chunks", KSA.window_chunks, "--ksa-layer-pattern", KSA.layer_pattern,
    "--position-embedding-type", "harpe", "--harpe-base-min", "1e4", "--harpe-base-max", "1e5",
    "--num-layers", LAYERS, "--hidden-size", 128, "--ffn-hidden-size", 352, "--num-attention-heads", 4,
    "--group-query-attention", "--num-query-groups", 2, "--normalization", "RMSNorm", "--qk-layernorm", "--swiglu",
    "--disable-bias-linear", "--hidden-dropout", 0, "--attention-dropout", 0,
    "--seq-length", SEQUENCE, "--max-position-embeddings", SEQUENCE,
]  # fmt: skip
# Share of the files that TAGS selects.
BUDGET = "60%"
# With this many files a tokenizer still learns VOCABULARY pieces, and TAGS finds branches.
FEWEST_FILES = 8


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", default="runs/demo", help="folder of everything that the run makes")
    parser.add_argument(
        "--steps", type=int, default=300, help="training iterations; more than before goes on from there"
    )
    parser.add_argument("--fresh", action="store_true", help="remove the folder first instead of resuming")
    parser.add_argument("--global-batch-size", type=int, default=8, help="sequences an iteration")
    parser.add_argument("--one-file-in", type=int, default=1, help="of the text, when it is made: one file in so many")
    parser.add_argument("--evaluation-sequences", type=int, default=64, help="validation sequences an evaluation")
    return parser.parse_args()


def call(*words: object) -> None:
    """Run a command of the repository, shown first; the demo ends with its exit code where it fails."""
    command = [sys.executable, *map(str, words)]
    print(f"\n$ {shlex.join(['python', *command[1:]])}", flush=True)
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code:
        print(f"error: the command above ended with exit code {code}; `make demo` goes on from there", file=sys.stderr)
        raise SystemExit(code if code > 0 else 1)


def prepare_data(folder: Path, one_file_in: int) -> None:
    """Text, tokenizer, the blend that TAGS selects to train on and the validation set, each unless it is there."""
    if not (folder / "train.jsonl").exists():
        write_corpus(folder, one_file_in)
    tokenizer = folder / "tokenizer.model"
    if not tokenizer.exists():
        call(
            "tools/train_tokenizer.py", "--input", folder / "train.jsonl", "--vocab-size", VOCABULARY,
            "--sample-megabytes", 4, "--output", tokenizer,
        )  # fmt: skip
    # The report is what the last step writes.
    if not (folder / "tags" / "report" / "summary.json").exists():
        call(
            "tools/preprocess_tags.py", "--work", folder / "tags", "--input", folder / "train.jsonl",
            "--budget", BUDGET,
            "--top-branches", 8, "--min-instances", 10, "--tokenizer-model", tokenizer,
        )  # fmt: skip
    if not (folder / "validation.idx").exists():
        call(
            "tools/preprocess_data.py", "--input", folder / "validation.jsonl",
            "--output-prefix", folder / "validation",
            "--tokenizer-model", tokenizer, "--workers", min(4, os.cpu_count() or 1),
        )  # fmt: skip


def read_blend(folder: Path) -> list[str]:
    """Weight and prefix of each dataset that TAGS wrote, in turn, as `--train-data-path` takes them."""
    return (folder / "tags" / "blend" / "blend.txt").read_text(encoding="utf-8").split()


def trained_steps(checkpoints: Path) -> int:
    """Iteration of the newest checkpoint, 0 without one."""
    tracker = checkpoints / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else 0


def train(folder: Path, steps: int, global_batch_size: int, evaluation_sequences: int) -> None:
    """Train up to `steps` iterations with checkpoints and an evaluation at the end, on the GPU where there is one."""
    import torch

    data, gpu = folder / "data", torch.cuda.is_available()
    processes = 1 if gpu else min(2, os.cpu_count() or 1)
    interval = max(steps // 6, 1)
    call(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, "pretrain_gpt.py", *MODEL,
        *(["--bf16"] if gpu else []),
        "--micro-batch-size", global_batch_size // processes, "--global-batch-size", global_batch_size,
        "--train-iters", steps, "--lr", 3e-3, "--min-lr", 3e-4, "--lr-decay-style", "cosine",
        "--lr-warmup-iters", min(20, steps // 10),
        "--override-opt-param-scheduler", "--weight-decay", 0.1, "--clip-grad", 1.0, "--adam-beta2", 0.95,
        "--init-method-std", 0.02, "--use-distributed-optimizer",
        "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", data / "tokenizer.model",
        "--train-data-path", *read_blend(data), "--valid-data-path", data / "validation",
        "--data-cache-path", data / "cache",
        "--save", folder / "checkpoints", "--load", folder / "checkpoints", "--save-interval", interval,
        "--eval-interval", interval, "--eval-iters", max(evaluation_sequences // global_batch_size, 1),
        "--log-interval", min(steps, 10), "--tensorboard-dir", folder / "tensorboard", "--log-throughput",
        "--tensorboard-log-interval", min(steps, 10),
    )  # fmt: skip


def report(folder: Path) -> None:
    """Say what came out and where it is."""
    data, losses = folder / "data", read_losses(folder / "tensorboard")
    unigram = unigram_loss(read_blend(data)[1::2], str(data / "validation"), VOCABULARY)
    plot_losses(losses, unigram, folder / "loss.png")
    steps, values = losses[VALIDATION]
    print(
        f"\nvalidation loss {values[-1]:.3f} nats a token after {steps[-1]} iterations; a unigram model of the same "
        "text: "
        f"{unigram:.3f}\n\n{kv_table(KSA, LAYERS, (SEQUENCE, 8192, 131072))}\n\n"
        f"selection    {data / 'tags' / 'report' / 'index.html'}\nloss curve   {folder / 'loss.png'}\nTensorBoard  "
        f"{folder / 'tensorboard'}\ncheckpoints  {folder / 'checkpoints'}"
    )


def main() -> None:
    """Run; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        args = parse_arguments()
        if args.steps < 1 or args.global_batch_size < 2 or args.global_batch_size % 2:
            raise UsageError("--steps must be at least 1 and --global-batch-size an even number")
        if not 1 <= args.one_file_in <= FEWEST_FILES:
            raise UsageError(f"--one-file-in {args.one_file_in}: must be 1 to {FEWEST_FILES}")
        folder = Path(args.output).resolve()
        if args.fresh and folder.exists():
            if not (folder / "data").is_dir():
                raise UsageError(f"--fresh: {folder} is not a folder of this demo; remove it yourself")
            shutil.rmtree(folder)
        with writing(folder):
            prepare_data(folder / "data", args.one_file_in)
            done = trained_steps(folder / "checkpoints")
            if done < args.steps:
                train(folder, args.steps, args.global_batch_size, args.evaluation_sequences)
            else:
                print(
                    f"\nalready trained for {done} iterations: --steps (make demo STEPS=) goes on, --fresh (FRESH=1) "
                    "starts over"
                )
            report(folder)


if __name__ == "__main__":
    main()
