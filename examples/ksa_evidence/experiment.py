"""Do summaries pay? Small models from scratch and from a dense one, equal tokens, three seeds (see README.md here).

Part `scratch` trains full attention, 3:1 hybrids of window or KSA layers with full ones, and pure window and KSA models
on the needle-rich language of token ids, and on real code where there is some. Part `dense` takes each seed's full
model further: trained on, with window layers, with KSA at once, and with KSA by the report's stages (distil, anneal),
then all of them at twice the length. Every model is scored on needles by distance, on perplexity by context length, and
on the share of attention that falls on summaries. Everything runs with the tools that users have; what is done is not
done again.
"""

import argparse
import functools
import json
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "examples"))
import installed  # noqa: F401
from report import write_beside

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.errors import UsageError, usage_errors_exit
from megatron_ksa.evaluation.corpora import write_corpus
from megatron_ksa.evaluation.runs import Runs, iterations_done
from megatron_ksa.files import writing
from megatron_ksa.results import Results

HEAD_DIM = 64
BASE = 10_000
FORMS = ("single_2", "single_3", "multikey_1", "multikey_2")
# Arm -> the layers of four; a model has them over and over.
SCRATCH = {"full": "f", "3:1 window": "wwwf", "3:1 KSA": "kkkf", "window": "w", "KSA": "k"}
DISTILLED = "3:1 KSA, distilled"
DENSE = {"full": "f", "3:1 window": "wwwf", "3:1 KSA": "kkkf", DISTILLED: "kkkf"}
PARTS = ("scratch", "dense")


def parse_arguments() -> argparse.Namespace:
    """The command line; the defaults are for one or two H100."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of results.json and results.md")
    parser.add_argument("--work", type=Path, help="folder of data and checkpoints; OUT/work without it")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to run")
    parser.add_argument("--arms", nargs="+", choices=list(SCRATCH), default=list(SCRATCH), metavar="ARM",
                        help="models from scratch to compare")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, help="models of each kind")
    parser.add_argument("--code", type=Path, help="prefix of code_corpus.py's datasets, a fifth of the data")
    parser.add_argument("--layers", type=int, default=4, help="a multiple of 4")
    parser.add_argument("--heads", type=int, default=8, help="attention heads, of 64 channels")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--chunk", type=int, default=8, help="C, text tokens in a chunk")
    parser.add_argument("--summaries", type=int, default=1, help="S, summaries of a chunk")
    parser.add_argument("--window", type=int, default=8, help="W, past chunks seen as text")
    parser.add_argument("--distances", default="16,32,128,256,512,896,1792", help="tokens between needle and question")
    parser.add_argument("--batch-tokens", type=int, default=32768, help="tokens of an iteration")
    parser.add_argument("--micro-batch-tokens", type=int, default=32768, help="tokens of a forward pass")
    parser.add_argument("--corpus-tokens", type=int, default=70_000_000, help="tokens of the synthetic corpus")
    parser.add_argument("--steps", type=int, default=2500, help="iterations from scratch")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate from scratch")
    parser.add_argument("--dense-steps", type=int, default=600, help="iterations from the dense model")
    parser.add_argument("--distil-steps", type=int, default=200, help="of these, iterations of distillation")
    parser.add_argument("--extend-steps", type=int, default=200, help="iterations at twice the length")
    parser.add_argument("--dense-lr", type=float, default=3e-4, help="peak learning rate from the dense model")
    parser.add_argument("--cases", type=int, default=16, help="needle cases of each form and distance")
    parser.add_argument("--jobs", type=int, default=4, help="trainings and measurements at a time on a GPU")
    parser.add_argument("--deadline", type=float, help="seconds from the start after which nothing new begins")
    parser.add_argument("--commit", help="commit of the code, where it is no git checkout")
    return parser.parse_args()


@dataclass(frozen=True)
class Stage:
    """One training run: where it starts from, what is special about it, how long it is.

    Attributes:
        part, arm, name: whose it is; the last stage of an arm's chain is `name`.
        layers: four letters (or one) of --ksa-layer-pattern.
        parent: the stage before it, or None from scratch.
        flags: more flags of the trainer.
        length: tokens of a sequence, as a multiple of --length.
    """

    part: str
    arm: str
    name: str
    layers: str
    steps: int
    lr: float
    parent: "Stage | None" = None
    flags: tuple[str, ...] = ()
    length: int = 1

    def folder(self, work: Path, seed: int) -> Path:
        """The folder of the stage's checkpoints."""
        words = f"{self.part}-{self.arm}-{self.name}".replace(" ", "-").replace(":", "").replace(",", "")
        return work / f"seed{seed}" / words


def scratch_stages(args: argparse.Namespace) -> list[Stage]:
    """A stage an arm."""
    return [Stage("scratch", arm, "trained", SCRATCH[arm], args.steps, args.lr) for arm in args.arms]


def dense_stages(args: argparse.Namespace) -> list[Stage]:
    """Chains from the full model: the same tokens in every arm after each stage that is scored."""
    dense = Stage("scratch", "full", "trained", "f", args.steps, args.lr)
    stages, steps, distil = [], args.dense_steps, args.distil_steps
    for arm, layers in DENSE.items():
        first, flags = dense, ()
        if arm == DISTILLED:
            flags = ("--ksa-distill", "--ksa-train", "summary")
            first = Stage("dense", arm, "distil", layers, distil, args.dense_lr, dense, flags)
            stages.append(first)
            rest = steps - distil
            # The coefficient is 0 for the last quarter: what is scored needs no summary projections.
            flags = ("--ksa-anneal-start", "0", "--ksa-anneal-end", str(rest * 3 // 4))
        else:
            rest = steps
        trained = Stage("dense", arm, "trained", layers, rest, args.dense_lr, first, flags)
        extended = Stage("dense", arm, "extended", layers, args.extend_steps, args.dense_lr, trained, length=2)
        stages += [trained, extended]
    return stages


@dataclass(frozen=True)
class Experiment:
    """One run of the experiment: its settings, folders and results."""

    args: argparse.Namespace
    work: Path
    runs: Runs
    results: Results

    def ksa(self, layers: str) -> KSAConfig:
        """Settings of a model's attention."""
        args = self.args
        pattern = layers if len(layers) == 1 else f"{layers}*{args.layers // len(layers)}"
        return KSAConfig(True, args.chunk, args.summaries, str(args.window), pattern)

    def prepare(self) -> None:
        """The synthetic corpora: training documents longer than a sequence, and documents held out."""
        args, data = self.args, self.work / "data"
        data.mkdir(parents=True, exist_ok=True)
        longest = 2 * args.length if "dense" in args.parts else args.length
        with ProcessPoolExecutor() as pool:
            write_corpus(data / "train", args.length // 2, 4 * longest, args.corpus_tokens, longest, 1, pool)
            for factor in (1, 2):
                held_out = factor * args.length
                prefix = data / f"validation{factor}"
                write_corpus(prefix, held_out + 512, held_out + 1024, 64 * held_out, held_out, 2, pool)
        self.runs.tell("data is ready")

    def model_flags(self, stage: Stage) -> list[object]:
        """Flags of the model and its data."""
        from megatron_ksa.evaluation.token_language import VOCABULARY

        args, hidden = self.args, self.args.heads * HEAD_DIM
        length, blend = args.length * stage.length, [self.work / "data/train"]
        vocabulary = VOCABULARY
        if args.code:
            vocabulary = json.loads(args.code.with_suffix(".json").read_text(encoding="utf-8"))["vocabulary"]
            blend = [0.8, self.work / "data/train", 0.2, args.code]
        return [
            "--num-layers", args.layers, "--hidden-size", hidden, "--ffn-hidden-size", hidden * 8 // 3 // 64 * 64,
            "--num-attention-heads", args.heads, "--kv-channels", HEAD_DIM, "--normalization", "RMSNorm",
            "--qk-layernorm", "--swiglu", "--disable-bias-linear", "--hidden-dropout", 0, "--attention-dropout", 0,
            # One base for all heads is RoPE; this way the full model's attention is this project's too.
            "--position-embedding-type", "harpe", "--harpe-bases", ",".join([str(BASE)] * args.heads),
            *(() if stage.layers == "f" else self.ksa_flags(stage)), "--seq-length", length,
            "--max-position-embeddings", 4 * args.length,
            "--micro-batch-size", max(args.micro_batch_tokens // length, 1),
            "--global-batch-size", max(args.batch_tokens // length, 1), "--tokenizer-type", "NullTokenizer",
            "--vocab-size", vocabulary - 1, "--data-path", *blend, "--split", "100,0,0", "--ckpt-format", "torch_dist",
        ]  # fmt: skip

    def ksa_flags(self, stage: Stage) -> list[object]:
        """Flags of a model whose layers are not all full ones."""
        ksa = self.ksa(stage.layers)
        return ["--ksa", "--ksa-layer-pattern", ksa.layer_pattern, "--ksa-window-chunks", ksa.window_chunks,
                "--ksa-chunk-size", ksa.chunk_size, "--ksa-summary-tokens", ksa.summary_tokens]  # fmt: skip

    def train(self, stage: Stage, seed: int) -> Path:
        """Train a stage, after the stages before it; its checkpoint folder."""
        import torch

        folder = stage.folder(self.work, seed)
        if iterations_done(folder) >= stage.steps:
            return folder
        start = ["--load", folder]
        if stage.parent is not None and not iterations_done(folder):
            start = ["--load", self.train(stage.parent, seed), "--finetune"]
        self.runs.call(
            folder.with_suffix(".log"), "pretrain_gpt.py", *self.model_flags(stage), *start, "--save", folder,
            "--train-iters", stage.steps, "--save-interval", stage.steps, "--lr", stage.lr, "--min-lr", stage.lr / 10,
            "--lr-decay-style", "cosine", "--lr-warmup-iters", min(100, stage.steps // 4), "--adam-beta2", 0.95,
            "--weight-decay", 0.1, "--clip-grad", 1.0, "--seed", 1234 + seed, "--eval-iters", 0, "--log-interval", 50,
            "--data-cache-path", folder.with_suffix(".cache"), *stage.flags,
            *(["--bf16"] if torch.cuda.is_available() else []),
        )  # fmt: skip
        return folder

    def measure(self, stage: Stage, seed: int) -> None:
        """Train and score a stage, and add it to the results."""
        args, deadline = self.args, self.args.deadline
        if deadline is not None and self.runs.seconds > deadline:
            self.runs.tell(f"seed {seed}, {stage.part} {stage.arm} {stage.name}: not begun, the deadline has passed")
            return
        folder, length = self.train(stage, seed), args.length * stage.length
        contexts = [context for context in (256, 512, 1024, 2048, 4096, 8192, 16384) if context <= length] or [length]
        perplexity = ["examples/evaluate/perplexity.py", "--stride", min(256, contexts[0]), "--windows", 64,
                      "--lengths", ",".join(map(str, contexts))]  # fmt: skip
        tools = {
            "needles": ["examples/evaluate/needle.py", "--lengths", length, "--distances", args.distances, "--forms",
                        *FORMS, "--cases", args.cases],
            "perplexity": [*perplexity, "--data-path", self.work / f"data/validation{stage.length}"],
        }  # fmt: skip
        if args.code:
            tools["code"] = [*perplexity, "--concatenate", "--data-path", f"{args.code}_validation"]
        found = {"part": stage.part, "arm": stage.arm, "stage": stage.name, "seed": seed, "length": length,
                 "kv_rows": self.ksa(stage.layers).kv_rows(args.layers, length)}  # fmt: skip
        for name, words in tools.items():
            output = folder.with_name(f"{folder.name}-{name}.json")
            if not output.exists():
                log = output.with_suffix(".log")
                self.runs.call(log, *words, "--checkpoint", folder, "--output", output)
            found[name] = json.loads(output.read_text(encoding="utf-8"))["results"]
        self.results.add(found)
        self.runs.tell(f"seed {seed}, {stage.part} {stage.arm} {stage.name}: measured")

    def run(self) -> None:
        """Everything in order; full models first, since the second part starts from them."""
        self.prepare()
        plan = {"scratch": scratch_stages, "dense": dense_stages}
        for part in self.args.parts:
            stages = [(stage, seed) for seed in range(self.args.seeds) for stage in plan[part](self.args)]
            if part == "dense":
                self._chains(stages)
            else:
                with ThreadPoolExecutor(self.runs.at_a_time) as pool:
                    list(pool.map(lambda task: self.measure(*task), stages))
            self.runs.tell(f"part {part} is complete")

    def _chains(self, stages: list[tuple[Stage, int]]) -> None:
        """Stages of one arm and seed one after the other, arms and seeds side by side."""
        chains: dict[tuple[str, int], list[Stage]] = {}
        for stage, seed in stages:
            chains.setdefault((stage.arm, seed), []).append(stage)
        with ThreadPoolExecutor(self.runs.at_a_time) as pool:
            list(pool.map(lambda key: [self.measure(stage, key[1]) for stage in chains[key]], chains))


def main() -> None:
    """Run; bad input costs one line and exit code 2."""
    with usage_errors_exit():
        args = parse_arguments()
        if args.layers % 4:
            raise UsageError(f"--layers {args.layers}: a multiple of 4, for 3:1 hybrids")
        steps = ("steps", "dense_steps", "distil_steps", "extend_steps")
        for name in ("seeds", "layers", "heads", *steps, "cases", "jobs"):
            if getattr(args, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1")
        if args.distil_steps >= args.dense_steps:
            raise UsageError(f"--distil-steps {args.distil_steps}: fewer than --dense-steps {args.dense_steps}")
        args.out = args.out.resolve()
        with writing(args.out):
            args.out.mkdir(parents=True, exist_ok=True)
        if args.code:
            args.code = args.code.resolve()
        work = (args.work or args.out / "work").resolve()
        hidden = ("out", "work", "jobs", "deadline", "parts", "code", "commit")
        settings = {key: value for key, value in vars(args).items() if key not in hidden} | {"code": bool(args.code)}
        report = functools.partial(write_beside, args.out / "results.json")
        results = Results(args.out / "results.json", settings, ("part", "arm", "stage", "seed"), args.commit, report)
        Experiment(args, work, Runs(ROOT, args.jobs), results).run()
        print(report())


if __name__ == "__main__":
    main()
