"""Commands of the one-stage recipe and its baselines, and the table of the experiment, without training."""

import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_ksa.huggingface.importer import import_checkpoint

EXAMPLE = Path(__file__).parents[2] / "examples" / "harpe_extend"


@pytest.fixture(scope="module")
def dense(megatron_flags, tmp_path_factory):
    """A dense checkpoint of 2 KV groups, trained at 64 tokens."""
    folder = tmp_path_factory.mktemp("dense")
    config = LlamaConfig(
        vocab_size=96, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "hf")
    (folder / "megatron").mkdir()
    import_checkpoint(folder / "hf", folder / "megatron")
    return folder / "megatron"


@pytest.fixture
def commands(dense, tmp_path, monkeypatch):
    """Run extend.py up to 256 tokens with more flags; returns the trainings that it starts."""

    def run(*flags):
        started = []
        monkeypatch.setattr(
            subprocess, "run", lambda command, **_: (started.append(command), SimpleNamespace(returncode=0))[1]
        )
        words = ["--load", dense, "--save", tmp_path / "run", "--data-path", "data", "--length", 256, "--steps", 11,
                 "--global-batch-size", 4]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["extend.py", *map(str, words), *flags])
        runpy.run_path(str(EXAMPLE / "extend.py"), run_name="__main__")
        return started

    return run


def value(command, flag):
    return command[command.index(flag) + 1]


def test_one_stage(commands):
    for flags, bases in (
        (["--method", "single-base", "--rotary-base", "777"], "777,777"),
        (["--harpe-bases", "1e4,5e4"], "1e4,5e4"),
    ):
        (command,) = commands(*flags, "--", "--bf16")
        assert value(command, "--harpe-bases") == bases and command[-1] == "--bf16"
        assert (value(command, "--seq-length"), value(command, "--train-iters")) == ("256", "11")
        assert value(command, "--lr") == "2e-05" and "--harpe-override-checkpoint-bases" in command
        assert value(command, "--num-query-groups") == "2" and value(command, "--hidden-size") == "16"


def test_stages_of_the_baseline_have_the_tokens_of_one(commands, tmp_path):
    started = commands("--method", "multi-stage")
    lengths, batches, steps = (
        [int(value(command, flag)) for command in started]
        for flag in ("--seq-length", "--global-batch-size", "--train-iters")
    )
    assert lengths == [128, 256] and sum(steps) == 11
    assert sum(map(lambda *part: part[0] * part[1] * part[2], lengths, batches, steps)) == 11 * 4 * 256
    assert value(started[1], "--load") == str(tmp_path / "run" / "128")


def test_a_file_of_bases_is_found_by_the_trainer(commands, tmp_path, monkeypatch):
    """It runs in another folder; a relative name was not found there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bases.json").write_text('{"bases": [1e4, 5e4]}')
    (command,) = commands("--harpe-bases", "bases.json")
    assert value(command, "--harpe-bases") == str(tmp_path / "bases.json")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--length", "64"], "--length 64: the checkpoint was trained at 64 already"),
        (["--steps", "0"], "--steps 0: at least 1"),
        (["--method", "multi-stage", "--stage-factor", "1"], "--stage-factor 1: at least 2"),
        (["--method", "multi-stage", "--steps", "1"], "--steps 1: at least one for each of 2 stages"),
        (["--load", "nowhere"], "nowhere is no checkpoint folder"),
    ],
)
def test_bad_input(flags, message, commands, capsys):
    with pytest.raises(SystemExit) as stopped:
        commands(*flags)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2 and len(errors) == 1 and message in errors[0]


def test_arms_are_compared_after_the_same_tokens(monkeypatch):
    """An arm that is a round ahead is shown as it was a round ago."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from report import tables

    def run(seed, arm, steps, found):
        return {
            "seed": seed, "arm": arm, "steps": steps, "perplexity": [{"length": 8, "loss": 0.0}],
            "needles": [{"form": "single_1", "length": 8, "values": found}],
        }  # fmt: skip

    runs = [run(seed, arm, 5, 0.5) for seed in (0, 1) for arm in ("single base", "uniform HARPE")]
    runs += [run(0, "before extension", 0, 0.25), run(0, "single base", 10, 1.0)]
    settings = {
        "layers": 1,
        "heads": 1,
        "pretrain_steps": 9,
        "pretrain_length": 4,
        "target_length": 8,
        "batch_tokens": 8,
    }
    text = tables({"runs": runs, "settings": settings, "machine": {"device": "abacus"}})
    assert "then 5 at 8" in text and "| single base (2 seeds) | 50.0 ± 0.0 | 50.0 ± 0.0 |" in text
    assert "| before extension (1 seed) | 25.0 ± 0.0 |" in text and "100.0" not in text
