"""The stages of a chain from a dense model: which there are, where they start, and their flags."""

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.errors import UsageError
from megatron_ksa.evaluation.runs import iterations_done

DISTIL, ANNEAL, EXTEND = "distil", "anneal", "extend"


@dataclass(frozen=True)
class Stage:
    """One training stage.

    Attributes:
        kind: distil, anneal or extend.
        length: n, text tokens in a sequence.
        start: folder of the checkpoint whose weights it takes.
        flags: of the model, for pretrain_gpt.py.
        restarts: summary projections start again as copies, although an earlier stage annealed them.
    """

    kind: str
    length: int
    steps: int
    batch: int
    lr: float
    folder: Path
    start: Path
    flags: tuple[str, ...]
    vocab_size: int
    restarts: bool

    @property
    def name(self) -> str:
        """Unique in a chain."""
        return self.folder.name

    @property
    def exported(self) -> Path:
        """Hugging Face folder of the stage's model."""
        return self.folder.with_name(f"{self.name}-hf")

    @property
    def evaluation(self) -> Path:
        """Results of the stage's evaluation."""
        return self.folder.with_name(f"{self.name}-perplexity.json")

    def done(self) -> int:
        """Iterations that are saved."""
        return iterations_done(self.folder)

    def settings(self) -> dict[str, object]:
        """What must not change while the chain runs."""
        return {
            "length": self.length,
            "steps": self.steps,
            "batch": self.batch,
            "lr": self.lr,
            "start": self.start.name,
        }


def _per_length(values: list[int], lengths: list[int], flag: str) -> list[int]:
    if len(values) not in (1, len(lengths)):
        raise UsageError(f"{flag} has {len(values)} values for {len(lengths)} lengths: give one, or one a length")
    if min(values) < 0:
        raise UsageError(f"{flag} is {min(values)}: 0 or more")
    return values * len(lengths) if len(values) == 1 else values


def plan(args: argparse.Namespace) -> list[Stage]:
    """All training stages, in order.

    Raises:
        UsageError: a model that is not dense, lengths that do not fit, or nothing to do.
    """
    from megatron_ksa.huggingface.config_json import read_config
    from megatron_ksa.huggingface.training_flags import training_flags

    arch = read_config(args.input)
    if arch.ksa.enabled:
        raise UsageError(f"--input {args.input} is a KSA model: a dense one is needed")
    pattern = args.layer_pattern
    if pattern.isalpha() and arch.num_layers % len(pattern) == 0:
        pattern *= arch.num_layers // len(pattern)
    ksa = KSAConfig(
        enabled=True, chunk_size=args.chunk_size, summary_tokens=args.summary_tokens, window_chunks=args.window_chunks,
        layer_pattern=pattern,
    )  # fmt: skip
    for flag in ("micro_batch", "save_interval", "nproc_per_node"):
        if getattr(args, flag) < 1:
            raise UsageError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: at least 1")
    if args.lengths != sorted(args.lengths) or args.lengths[0] < 1:
        raise UsageError(f"--lengths {' '.join(map(str, args.lengths))}: positive, the shortest first")
    stages: list[Stage] = []
    kinds = (DISTIL, ANNEAL, EXTEND)
    steps, batches = (
        {kind: _per_length(getattr(args, f"{kind}_{what}"), args.lengths, f"--{kind}-{what}") for kind in kinds}
        for what in ("steps", "batch")
    )
    if any(steps[DISTIL] + steps[ANNEAL]) and not ksa.num_summarised(arch.num_layers):
        raise UsageError(
            f"--layer-pattern {args.layer_pattern} has no layer with summaries: give --distil-steps 0 and "
            f"--anneal-steps 0, or a pattern with k or l"
        )
    for number, length in enumerate(args.lengths):
        ksa.layers(arch.num_layers, length)
        ksa.check_sequence(length)
        trained = dataclasses.replace(arch, ksa=ksa, seq_length=length, max_positions=max(length, arch.max_positions))
        for kind in kinds if number == 0 or args.distil_at == "every" else (EXTEND,):
            if not steps[kind][number]:
                continue
            if kind == DISTIL:
                ksa.check_summaries_seen(arch.num_layers, length, f"--distil-steps at the length {length}")
            start = stages[-1].folder if stages else args.work / "dense"
            annealed = next((stage.kind == ANNEAL for stage in reversed(stages) if stage.kind != EXTEND), False)
            stages.append(
                Stage(
                    kind, length, steps[kind][number], batches[kind][number], getattr(args, f"{kind}_lr"),
                    args.work / f"{len(stages) + 1:02}-{length}-{kind}", start, tuple(training_flags(trained)),
                    arch.vocab_size, restarts=kind != EXTEND and annealed,
                )
            )  # fmt: skip
    if not stages:
        raise UsageError("every stage has 0 steps: nothing to do")
    return stages


def train_flags(args: argparse.Namespace, stage: Stage) -> list[object]:
    """Flags of pretrain_gpt.py for a stage, but for where it starts."""
    short = max(stage.steps // 4, 1)
    flags: list[object] = [
        *stage.flags, "--micro-batch-size", args.micro_batch, "--global-batch-size", stage.batch,
        "--train-iters", stage.steps, "--lr", stage.lr, "--min-lr", min(args.min_lr, stage.lr),
        "--lr-decay-style", "WSD", "--lr-wsd-decay-style", "linear", "--lr-wsd-decay-iters", min(args.decay, short),
        "--lr-warmup-iters", min(args.warmup, short, stage.steps - 1), "--adam-beta1", 0.9, "--adam-beta2", 0.95,
        "--adam-eps", 1e-8, "--weight-decay", 0.01, "--clip-grad", 1.0, "--seed", args.seed,
        "--data-path", *args.data_path, "--split", "100,0,0", "--data-cache-path", args.work / "cache",
        "--tokenizer-type", "NullTokenizer", "--vocab-size", stage.vocab_size - 1, "--eval-iters", 0,
        "--log-interval", max(min(10, short), 1), "--ckpt-format", "torch_dist", "--exit-signal-handler",
        "--save", stage.folder, "--save-interval", min(args.save_interval, stage.steps),
        "--tensorboard-dir", args.work / "tensorboard" / stage.name,
    ]  # fmt: skip
    if args.dtype == "bf16":
        flags.append("--bf16")
    if stage.kind == DISTIL:
        flags.append("--ksa-distill")
    if stage.restarts:
        flags += ["--ksa-initial-coefficient", 1]
    if stage.kind == ANNEAL:
        flags += ["--ksa-anneal-start", 0, "--ksa-anneal-end", stage.steps]
    return flags


def progress(stages: list[Stage]) -> str:
    """Iterations done and to do, of all stages."""
    return f"{sum(min(stage.done(), stage.steps) for stage in stages)} {sum(stage.steps for stage in stages)}"
