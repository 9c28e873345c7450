"""Stages from a dense model: what each takes over from its checkpoint, and starts that cannot be."""

import argparse
from pathlib import Path

import pytest
from test_arguments import parse
from trainer import launch, steps

from megatron_ksa.checkpoint.load import StoredCheckpoint
from megatron_ksa.config.distill import DistillConfig
from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.config.settings import RunSettings
from megatron_ksa.errors import UsageError
from megatron_ksa.training import stages
from megatron_ksa.training.arguments import settings_from_args

KSA = "--ksa --position-embedding-type rope"
ANNEALED = KSAConfig(enabled=True, anneal_start=10, anneal_end=20)
PLAIN = KSAConfig(enabled=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--ksa-distill", "--ksa-distill needs --ksa"),
        ("--ksa-train summary", "--ksa-train summary needs --ksa"),
        ("--ksa-log-attention-share", "--ksa-log-attention-share needs --ksa"),
        (f"{KSA} --ksa-distill --no-ksa-independent-projections", "--no-ksa-independent-projections shares them"),
        (f"{KSA} --ksa-distill --ksa-train all", "does not go with --ksa-train all"),
        (f"{KSA} --ksa-distill --ksa-anneal-start 1 --ksa-anneal-end 2", "does not go with --ksa-anneal-start"),
        (f"{KSA} --ksa-distill --ksa-layer-pattern ffff", "has nothing to train"),
        (f"{KSA} --ksa-distill --ksa-layer-pattern lllf", "has nothing to train: no layer of .* is of kind k"),
        (f"{KSA} --ksa-train summary --ksa-layer-pattern wwww", "--ksa-train summary has nothing to train"),
        (f"{KSA} --ksa-distill --ksa-window-chunks 7", "in 64 tokens every window .* use a --seq-length above 64"),
        (f"{KSA} --ksa-train summary", "--ksa-train summary has nothing to train: in 64 tokens .* above 1,032"),
        (f"{KSA} --ksa-distill-kl-weight 3", "--ksa-distill-kl-weight needs --ksa-distill"),
        (f"{KSA} --ksa-distill-normalize", "--ksa-distill-normalize needs --ksa-distill"),
        (f"{KSA} --ksa-distill --seq-length 60", "--seq-length 60 is not a multiple of 8.*use 56 or 64"),
        (f"{KSA} --ksa-distill --calculate-per-token-loss", "does not go with --calculate-per-token-loss"),
        (f"{KSA} --ksa-distill --num-experts 4", "does not go with --num-experts"),
        (f"{KSA} --ksa-distill --cuda-graph-impl local", "does not go with CUDA graphs"),
        (f"{KSA} --ksa-distill --ksa-distill-kl-weight -1", "--ksa-distill-kl-weight is -1: use 0 or more"),
        (f"{KSA} --ksa-distill --ksa-distill-ce-weight nan", "--ksa-distill-ce-weight is nan"),
        (f"{KSA} --ksa-distill --ksa-distill-clamp 0", "--ksa-distill-clamp is 0"),
        (f"{KSA} --ksa-distill-offload", "--ksa-distill-offload keeps .* this run compares none: drop it"),
        (f"{KSA} --ksa-distill --ksa-distill-offload --ksa-distill-attention-weight 0", "this run compares none"),
        (f"{KSA} --ksa-initial-coefficient 1.5", "--ksa-initial-coefficient is 1.5: it must lie in"),
        (
            f"{KSA} --ksa-distill --ksa-distill-ce-weight 0 --ksa-distill-kl-weight 0 --ksa-distill-attention-weight 0",
            "all four weights 0",
        ),
    ],
)
def test_flags_refused_in_one_line(monkeypatch, flags, message):
    """Where no text sees a summary, distillation ran with gradients of 0; its flags without it did nothing."""
    args = parse(monkeypatch, flags)
    with pytest.raises(UsageError, match=message) as error:
        settings_from_args(args)
    assert "\n" not in str(error.value)


def start(monkeypatch, tmp_path, settings: RunSettings, stored: KSAConfig | None, iteration=15, finetune=True, **saved):
    """`resolve_start` for a checkpoint of these settings, which lies in --load."""
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    args = argparse.Namespace(**saved)
    checkpoint = None if stored is None else StoredCheckpoint(tmp_path, iteration, args, RunSettings(stored, None))
    monkeypatch.setattr(stages, "checkpoint_to_load", lambda args: checkpoint)
    flags = argparse.Namespace(
        load=str(tmp_path), pretrained_checkpoint=None, finetune=finetune, rank=0, mock_data=False
    )  # fmt: skip
    return stages.resolve_start(flags, settings)


DISTILL = RunSettings(PLAIN, None, distill=DistillConfig(enabled=True))


@pytest.mark.parametrize(
    ("settings", "stored", "options", "message"),
    [
        (DISTILL, None, {}, "--ksa-distill needs a model to learn from.*--finetune"),
        (DISTILL, ANNEALED, {"iteration": 20}, "have a weight of 0 in .*add --ksa-initial-coefficient 1"),
        (DISTILL, PLAIN, {"finetune": False}, "written with --ksa-train all, the flags say summary"),
        (RunSettings(PLAIN, None), PLAIN, {"finetune": False, "ksa_train": "summary"}, "written with --ksa-train summ"),
        (RunSettings(ANNEALED, None), PLAIN, {"finetune": False}, "a weight of 1, and --ksa-anneal-start 10 .*would "
         "make it 0.5: the window lies in the past; start it at 15 or later"),
        (RunSettings(PLAIN, None), ANNEALED, {"finetune": False}, "a weight of 0.5, and no annealing would make it 1"),
        (RunSettings(ANNEALED, None), ANNEALED, {"iteration": 20}, "is annealed to 0 already"),
        (RunSettings(KSAConfig(enabled=True, initial_coefficient=0.5), None), PLAIN, {"finetune": False},
         "started with --ksa-initial-coefficient 1 and goes on: 0.5 needs --finetune"),
    ],
)  # fmt: skip
def test_starts_refused_in_one_line(monkeypatch, tmp_path, settings, stored, options, message):
    with pytest.raises(UsageError, match=message) as error:
        start(monkeypatch, tmp_path, settings, stored, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "stored", "iteration", "finetune", "coefficients"),
    [
        (PLAIN, None, 0, True, {0: 1.0, 50: 1.0}),
        (PLAIN, KSAConfig(), 30, True, {0: 1.0}),
        (PLAIN, ANNEALED, 20, True, {0: 0.0, 50: 0.0}),
        (PLAIN, ANNEALED, 15, True, {0: 0.5, 50: 0.5}),
        (ANNEALED, ANNEALED, 15, False, {15: 0.5, 20: 0.0}),
        (ANNEALED, ANNEALED, 15, True, {0: 0.5, 15: 0.25, 20: 0.0}),
        (KSAConfig(enabled=True, initial_coefficient=1.0), ANNEALED, 20, True, {0: 1.0}),
        (PLAIN, KSAConfig(enabled=True, initial_coefficient=0.0), 8, True, {0: 0.0}),
        (PLAIN, KSAConfig(enabled=True, initial_coefficient=0.0), 8, False, {8: 0.0}),
    ],
)
def test_the_coefficient_belongs_to_the_checkpoint(
    monkeypatch, tmp_path, flags, stored, iteration, finetune, coefficients
):
    settings = start(monkeypatch, tmp_path, RunSettings(flags, None), stored, iteration, finetune)
    assert {step: settings.ksa.summary_coefficient(step) for step in coefficients} == coefficients


ANNEAL = "--ksa-anneal-start 1 --ksa-anneal-end 3"
LONGER = "--seq-length 128 --max-position-embeddings 128"


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Records of a chain of stages, each from the weights of one before."""
    folder = tmp_path_factory.mktemp("chain")
    runs = {
        "dense": "--no-ksa --train-iters 2 --save {}/dense --save-interval 2",
        "distilled": "--train-iters 2 --load {}/dense --finetune --ksa-distill --save {}/distilled --save-interval 2",
        "annealed": f"--train-iters 4 --load {{}}/distilled --finetune {ANNEAL} --save {{}}/annealed --save-interval 2",
        "extended": f"--train-iters 2 --load {{}}/annealed --finetune {LONGER} --save {{}}/extended --save-interval 1",
        "resumed": f"--train-iters 2 --load {{}}/extended --ckpt-step 1 {LONGER}",
        "asked": f"--train-iters 1 --load {{}}/annealed --finetune {LONGER} --ksa-initial-coefficient 0",
        "without": f"--train-iters 2 --load {{}}/annealed --finetune {LONGER} --no-ksa-independent-projections "
        "--save {}/without --save-interval 2",
        "again": f"--train-iters 1 --load {{}}/annealed --finetune {LONGER} --ksa-initial-coefficient 1",
        "back": f"--train-iters 1 --load {{}}/without --finetune {LONGER} --ksa-initial-coefficient 1",
        "back at 0": f"--train-iters 1 --load {{}}/without --finetune {LONGER}",
        "mid": f"--train-iters 1 --load {{}}/annealed --ckpt-step 2 --finetune {LONGER}",
    }  # fmt: skip
    described = [(folder / f"{name}.json", flags.replace("{}", str(folder))) for name, flags in runs.items()]
    done = launch(described, processes=1)
    return folder, done


def record(chain, name) -> dict[int, dict[str, float]]:
    folder, done = chain
    path: Path = folder / f"{name}.json"
    assert path.exists(), done.stderr[-4000:]
    return steps(path)


@pytest.mark.slow
def test_an_annealed_model_stays_annealed(chain):
    """A stage after annealing, at twice the length, started at the loss of a = 1."""
    annealed, extended = record(chain, "annealed"), record(chain, "extended")
    assert [annealed[step]["summary coefficient"] for step in (1, 2, 3, 4)] == [1.0, 1.0, 0.5, 0.0]
    assert [extended[step]["summary coefficient"] for step in (1, 2)] == [0.0, 0.0]
    for name in ("loss", "grad_norm"):
        assert extended[1][name] == pytest.approx(record(chain, "asked")[1][name], rel=1e-7)
        assert record(chain, "resumed")[2][name] == pytest.approx(extended[2][name], rel=1e-7)
    assert "start with it here (--ksa-initial-coefficient 1 would start them again)" in chain[1].stdout


@pytest.mark.slow
def test_the_model_starts_where_annealing_left_it(chain):
    """Dropped, or used again as copies, summary projections change nothing at a = 0."""
    extended = record(chain, "extended")
    for name in ("without", "again"):
        assert record(chain, name)[1]["loss"] == pytest.approx(extended[1]["loss"], rel=1e-6), name
    assert record(chain, "back")[1]["loss"] == pytest.approx(record(chain, "back at 0")[1]["loss"], rel=1e-6)
    assert record(chain, "mid")[1]["summary coefficient"] == 0.5
