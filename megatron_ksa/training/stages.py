"""Stages on the way from a dense model: which flags go together, and what a stage takes over from its checkpoint."""

import argparse
import dataclasses

from megatron_ksa.checkpoint.load import StoredCheckpoint
from megatron_ksa.checkpoint.to_load import checkpoint_to_load, only_weights
from megatron_ksa.config.distill import DistillConfig
from megatron_ksa.config.settings import RunSettings
from megatron_ksa.errors import UsageError

# Two values of the coefficient that are the same but for rounding.
EQUAL = 1e-6


def check_stage(args: argparse.Namespace, settings: RunSettings) -> None:
    """Refuse flags of a stage that contradict each other or the rest of the command line.

    Raises:
        UsageError: naming the flags and the way out.
    """
    distill, stage = settings.distill.enabled, settings.stage
    if not settings.ksa.enabled:
        needs_ksa = {
            "--ksa-distill": distill,
            "--ksa-train summary": stage.train == "summary",
            "--ksa-log-attention-share": stage.log_attention_share,
            "--ksa-initial-coefficient": settings.ksa.initial_coefficient is not None,
        }
        for flag in (flag for flag, given in needs_ksa.items() if given):
            raise UsageError(f"{flag} needs --ksa: add it, or drop {flag}")
    if not distill:
        for field in dataclasses.fields(DistillConfig):
            if getattr(settings.distill, field.name) != field.default:
                flag = f"--ksa-distill-{field.name.replace('_', '-')}"
                raise UsageError(f"{flag} needs --ksa-distill: add it, or drop {flag}")
        return
    if not settings.ksa.independent_projections:
        raise UsageError(
            "--ksa-distill trains the summary parameters alone, and --no-ksa-independent-projections shares them with "
            "the text, whose are frozen: drop one of the two"
        )
    refused = [
        (stage.train == "all", "--ksa-train all", "the teacher has the same weights and must stay as it is; drop it"),
        (settings.ksa.anneal_start is not None, "--ksa-anneal-start", "annealing is the stage after it; drop one"),
        (args.calculate_per_token_loss, "--calculate-per-token-loss", "its terms are means of a micro-batch; drop it"),
        (args.logits_load_dir or args.logits_save_dir, "--logits-load-dir and --logits-save-dir",
         "its teacher is the model itself; drop one"),
        (args.num_experts, "--num-experts", "distillation is not checked with experts; drop one"),
        (args.overlap_moe_expert_parallel_comm, "--overlap-moe-expert-parallel-comm", "it runs layers apart; drop it"),
    ]  # fmt: skip
    for active, flag, way_out in refused:
        if active:
            raise UsageError(f"--ksa-distill does not go with {flag}: {way_out}")


def check_trained(args: argparse.Namespace, settings: RunSettings) -> None:
    """Refuse to train summary parameters that nothing depends on; for flags that passed all other checks.

    Raises:
        UsageError: as `KSAConfig.check_summaries_seen`.
    """
    if settings.train == "summary" and args.num_layers and args.seq_length:
        flag = "--ksa-distill" if settings.distill.enabled else "--ksa-train summary"
        settings.ksa.check_summaries_seen(args.num_layers, args.seq_length, flag)


def resolve_start(args: argparse.Namespace, settings: RunSettings) -> RunSettings:
    """The settings with the coefficient that the run starts from: a checkpoint's, unless the flags ask otherwise.

    Args:
        args: Megatron's arguments as parsed.

    Raises:
        UsageError: a start that the stage cannot have.
    """
    if not settings.ksa.enabled:
        return settings
    stored = checkpoint_to_load(args)
    if stored is None or not stored.settings.ksa.enabled:
        # Generated tokens teach nothing: they measure speed, and random weights do for that.
        if settings.distill.enabled and stored is None and not args.mock_data:
            raise UsageError(
                "--ksa-distill needs a model to learn from, and there is no checkpoint: give a dense one with --load "
                "FOLDER --finetune"
            )
        return _starting_at(settings, _or(settings.ksa.initial_coefficient, 1.0))
    return (_next_stage if only_weights(args) else _resumed)(args, settings, stored)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _starting_at(settings: RunSettings, coefficient: float) -> RunSettings:
    return dataclasses.replace(settings, ksa=dataclasses.replace(settings.ksa, initial_coefficient=coefficient))


def _coefficient(stored: StoredCheckpoint) -> float:
    return stored.settings.ksa.summary_coefficient(stored.iteration)


def _resumed(args: argparse.Namespace, settings: RunSettings, stored: StoredCheckpoint) -> RunSettings:
    """The run goes on: same stage, and a coefficient that does not jump."""
    where = f"--load {args.load}"
    for name, ours in (("ksa_train", settings.train), ("ksa_distill", settings.distill.enabled)):
        theirs = getattr(stored.args, name, None) or ("all" if name == "ksa_train" else False)
        if theirs != ours:
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"{where}: the checkpoint was written with {flag} {theirs}, the flags say {ours}: give the same, or "
                f"add --finetune for a new stage with its weights"
            )
    initial = _or(stored.settings.ksa.initial_coefficient, 1.0)
    asked = settings.ksa.initial_coefficient
    if asked is not None and abs(asked - initial) > EQUAL:
        raise UsageError(
            f"{where}: the run started with --ksa-initial-coefficient {initial:g} and goes on: {asked:g} needs "
            f"--finetune"
        )
    settings = _starting_at(settings, initial)
    before, now = _coefficient(stored), settings.ksa.summary_coefficient(stored.iteration)
    if abs(before - now) > EQUAL:
        window = "no annealing" if settings.ksa.anneal_start is None else (
            f"--ksa-anneal-start {settings.ksa.anneal_start} --ksa-anneal-end {settings.ksa.anneal_end}"
        )  # fmt: skip
        raise UsageError(
            f"{where}: at iteration {stored.iteration} the summary projections have a weight of {before:g}, and "
            f"{window} would make it {now:g}: the window lies in the past; start it at {stored.iteration} or later, or "
            f"give the checkpoint's"
        )
    return settings


def _next_stage(args: argparse.Namespace, settings: RunSettings, stored: StoredCheckpoint) -> RunSettings:
    """Weights of another stage: its last coefficient holds."""
    before, asked = _coefficient(stored), settings.ksa.initial_coefficient
    if asked is None and before < 1 and args.rank == 0:
        print(
            f"{stored.folder}: summary projections have a weight of {before:g} there and start with it here "
            f"(--ksa-initial-coefficient 1 would start them again)", flush=True,
        )  # fmt: skip
    settings = _starting_at(settings, _or(asked, before))
    if settings.ksa.initial_coefficient == 0 and settings.ksa.anneal_start is not None:
        raise UsageError(
            f"--ksa-anneal-start {settings.ksa.anneal_start}: the checkpoint {stored.folder} is annealed to 0 already: "
            f"drop it, or add --ksa-initial-coefficient 1 to start from copies of the text projections again"
        )
    if settings.distill.enabled and settings.ksa.initial_coefficient != 1:
        raise UsageError(
            f"--ksa-distill trains summary projections, which have a weight of {settings.ksa.initial_coefficient:g} in "
            f"{stored.folder}: add --ksa-initial-coefficient 1"
        )
    return settings
