"""HARPE against single bases on small models: pretrained short on needle-rich synthetic text, extended in one stage.

For every seed a dense model is pretrained and then extended with the same tokens by several arms: each single base of
--single-bases, uniform HARPE, searched HARPE. Each is scored on RULER's eight needle forms and on sliding-window
perplexity. Everything runs with the tools that users have. Extension goes in rounds of --extend-steps iterations, after
each of which all arms are scored: results.json and results.md grow measurement by measurement, and compare what all
seeds and arms have reached. What is done is not done again.
"""

import argparse
import functools
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "examples"))
import installed  # noqa: F401
from report import write_beside

from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.evaluation.corpora import write_corpus
from megatron_ksa.evaluation.runs import Runs, iterations_done
from megatron_ksa.files import check_writable, writing
from megatron_ksa.results import Results

HEAD_DIM = 64
BEFORE, UNIFORM, SEARCHED = "before extension", "uniform HARPE", "searched HARPE"


def parse_arguments() -> argparse.Namespace:
    """The command line; the defaults are for one H100."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of results.json and results.md")
    parser.add_argument("--work", type=Path, help="folder of data and checkpoints; OUT/work without it")
    parser.add_argument("--seeds", type=int, default=2, help="models pretrained and extended")
    parser.add_argument(
        "--single-bases", type=int, nargs="*", default=[500_000], help="bases of the baselines, an arm each"
    )
    parser.add_argument("--base-min", type=int, default=100_000, help="smallest base of HARPE")
    parser.add_argument("--base-max", type=int, default=500_000, help="largest base of HARPE")
    parser.add_argument("--stride", type=int, default=3000, help="between candidates of the search")
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
    parser.add_argument("--jobs", type=int, default=8, help="trainings and measurements at a time on a GPU")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that write the corpora")
    parser.add_argument("--commit", help="commit of the code, where it is no git checkout")
    return parser.parse_args()


@dataclass(frozen=True)
class Experiment:
    """One run of the experiment: its settings and folders."""

    args: argparse.Namespace
    work: Path
    runs: Runs
    results: Results

    @property
    def arms(self) -> list[str]:
        """Ways to extend to compare."""
        return [*(f"single base {base:,}" for base in self.args.single_bases), UNIFORM, SEARCHED]

    def prepare(self) -> None:
        """Corpora, length-upsampled data, validation documents and searched bases."""
        args, data = self.args, self.work / "data"
        data.mkdir(parents=True, exist_ok=True)
        short, long = args.pretrain_length, args.target_length
        # Documents are longer than the window that is cut from them: one cut at random still holds needles as far from
        # their questions as it is long.
        with ProcessPoolExecutor(args.workers) as pool:
            write_corpus(data / "pretrain", short // 2, 4 * short, args.corpus_tokens, short, 1, pool)
            write_corpus(data / "mixed", short // 2, 4 * long, args.corpus_tokens, long, 2, pool)
            write_corpus(data / "validation", long + 512, long + 1024, 64 * long, long, 3, pool)
        if not (data / "extend.idx").exists():
            self.runs.call(data / "upsample.log", "tools/upsample_lengths.py", "--data-path", data / "mixed",
                           "--output-prefix", data / "extend", "--threshold", long, "--share", 0.8)  # fmt: skip
        if not (data / "bases.json").exists():
            self.runs.call(data / "bases.log", "tools/search_harpe_bases.py", "--groups", args.heads,
                           "--head-dim", HEAD_DIM, "--base-min", args.base_min, "--base-max", args.base_max,
                           "--stride", args.stride, "--length", long, "--output", data / "bases.json")  # fmt: skip

    def pretrain(self, seed: int) -> None:
        """The dense model that the seed's arms start from."""
        args, folder = self.args, self.work / f"seed{seed}"
        if iterations_done(folder / "dense") >= args.pretrain_steps:
            return
        from megatron_ksa.evaluation.token_language import VOCABULARY

        hidden, length = args.heads * HEAD_DIM, args.pretrain_length
        self.runs.call(
            folder / "dense.log", "pretrain_gpt.py", "--num-layers", args.layers, "--hidden-size", hidden,
            "--ffn-hidden-size", hidden * 8 // 3 // 64 * 64, "--num-attention-heads", args.heads,
            "--kv-channels", HEAD_DIM,
            # One base for all heads is RoPE; this way the attention is the one that the arms run.
            "--position-embedding-type", "harpe", "--harpe-bases", ",".join(["10000"] * args.heads),
            "--normalization", "RMSNorm", "--qk-layernorm", "--swiglu", "--disable-bias-linear", "--hidden-dropout", 0,
            "--attention-dropout", 0, "--seq-length", length, "--max-position-embeddings", length,
            "--micro-batch-size", max(args.micro_batch_tokens // length, 1),
            "--global-batch-size", max(args.batch_tokens // length, 1), "--train-iters", args.pretrain_steps,
            "--lr", args.pretrain_lr, "--min-lr", args.pretrain_lr / 10, "--lr-decay-style", "cosine",
            "--lr-warmup-iters", min(100, args.pretrain_steps // 4), "--adam-beta2", 0.95, "--weight-decay", 0.1,
            "--clip-grad", 1.0, "--seed", 1234 + seed, "--tokenizer-type", "NullTokenizer",
            "--vocab-size", VOCABULARY - 1,
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
        save = folder / arm.replace(" ", "-").replace(",", "")
        singles = dict(zip(self.arms, args.single_bases, strict=False))
        method = {
            **{name: ["--method", "single-base", "--rotary-base", base] for name, base in singles.items()},
            UNIFORM: ["--harpe-base-min", args.base_min, "--harpe-base-max", args.base_max],
            SEARCHED: ["--harpe-bases", self.work / "data/bases.json"],
        }[arm]
        length = args.target_length
        if iterations_done(save / str(length)) >= args.extend_steps * rounds:
            return save / str(length)
        self.runs.call(
            save.with_suffix(".log"), "examples/harpe_extend/extend.py", "--load", folder / "dense", "--save", save,
            "--data-path", self.work / "data/extend", *method, "--length", length,
            "--steps", args.extend_steps * args.rounds,
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
        name = f"{arm.replace(' ', '-').replace(',', '')}-{steps}"
        lengths = [args.pretrain_length]
        while lengths[-1] < args.target_length:
            lengths.append(min(2 * lengths[-1], args.target_length))
        needles, perplexity = folder / f"{name}-needles.json", folder / f"{name}-perplexity.json"
        flags = {
            needles: ["--cases", args.cases],
            perplexity: ["--data-path", self.work / "data/validation", "--stride", min(256, args.pretrain_length),
                         "--windows", 64],
        }  # fmt: skip

        def score(output: Path) -> None:
            if not output.exists():
                tool = f"examples/evaluate/{output.stem.rsplit('-', 1)[1].replace('needles', 'needle')}.py"
                self.runs.call(output.with_suffix(".log"), tool, "--checkpoint", checkpoint,
                               "--lengths", ",".join(map(str, lengths)),
                          "--output", output, *flags[output])  # fmt: skip

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(score, flags))
        found = {"seed": seed, "arm": arm, "steps": steps, "needles": json.loads(needles.read_text())["results"],
                 "perplexity": json.loads(perplexity.read_text())["results"]}  # fmt: skip
        self.results.add(found)
        self.runs.tell(f"seed {seed}, {arm}, {steps} iterations: measured")

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
        self.runs.tell("data is ready")
        with ThreadPoolExecutor(self.runs.at_a_time) as pool:
            list(pool.map(self.pretrain, seeds))
            self.runs.tell("models are pretrained")
            for rounds in range(1, args.rounds + 1):
                begin = time.monotonic()
                arms = self.arms if rounds > 1 else (*self.arms, BEFORE)
                list(pool.map(lambda task: self.arm(*task), [(seed, arm, rounds) for arm in arms for seed in seeds]))
                now = time.monotonic()
                self.runs.tell(f"round {rounds} is complete")
                if args.deadline is not None and self.runs.seconds + 1.1 * (now - begin) > args.deadline:
                    break


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
        check_writable(args.out)
        work = (args.work or args.out / "work").resolve()
        hidden = ("out", "work", "jobs", "workers", "rounds", "deadline", "commit")
        settings = {key: value for key, value in vars(args).items() if key not in hidden}
        report = functools.partial(write_beside, args.out / "results.json")
        results = Results(args.out / "results.json", settings, ("seed", "arm", "steps"), args.commit, report)
        with writing(args.out), writing(work):
            Experiment(args, work, Runs(ROOT, args.jobs), results).run()
            print(report())


if __name__ == "__main__":
    main()
