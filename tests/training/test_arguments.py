"""Flags that cannot work: one line that names the value, the rule and the way out."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.training import arguments as megatron_arguments
from warm import run_script

from megatron_ksa.data_tools.indexed import IndexedDatasetWriter, check_indexed_dataset
from megatron_ksa.errors import UsageError
from megatron_ksa.platform import trainer_defaults
from megatron_ksa.training.arguments import adapt_trainer, install_arguments, settings_from_args
from megatron_ksa.training.blend import dataset_prefixes
from megatron_ksa.training.flag_rules import _check_machine, check_flags
from megatron_ksa.training.given import forget_given, given_flags

ROOT = Path(__file__).parents[2]
MODEL = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --group-query-attention --num-query-groups 2 "
    "--seq-length 64 --max-position-embeddings 128 --micro-batch-size 1"
).split()
FP8 = "--ksa --position-embedding-type rope --bf16 --transformer-impl transformer_engine --fp8-format hybrid"


def parse(monkeypatch, flags, processes=12):
    """Parse a command line as the entry point does."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *MODEL, *flags.split()])
    with install_arguments(trainer_defaults()):
        return megatron_arguments.parse_args()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--ksa --position-embedding-type rope --seq-length 60", "--seq-length 60 is not a multiple of 8.*56 or 64"),
        ("--ksa --position-embedding-type rope --context-parallel-size 2 --seq-length 72", "--seq-length 72.*64 or 96"),
        ("--ksa --position-embedding-type rope --ksa-window-chunks __import__('os')", "--ksa-window-chunks .*grammar"),
        ("--ksa --position-embedding-type rope --ksa-layer-pattern kkf", "describes 3 layers, the model has 4"),
        ("--ksa", "--position-embedding-type is learned_absolute: use rope, harpe or none"),
        ("--ksa --position-embedding-type rope --multi-latent-attention", "does not go with --multi-latent-attention"),
        ("--ksa --position-embedding-type rope --attention-dropout 0.1", "--attention-dropout 0.1"),
        ("--ksa --position-embedding-type rope --reset-position-ids", "--reset-attention-mask is missing"),
        ("--ksa --position-embedding-type rope --ksa-anneal-start 5", "--ksa-anneal-end"),
        ("--position-embedding-type harpe --harpe-bases 1e4,1e5,1e6", "has 3 bases, the model has 2 KV groups"),
        ("--position-embedding-type harpe --harpe-bases 1e4,-1", "-1: a base is a positive number"),
        ("--position-embedding-type harpe --harpe-bases 1e4,nan", "nan: a base is a positive number"),
        ("--position-embedding-type harpe --flash-decode", "does not go with --flash-decode"),
        ("--ksa --position-embedding-type rope --context-parallel-size 2 --cp-comm-type all_gather", "use p2p.*or a2a"),
        (
            "--ksa --position-embedding-type rope --context-parallel-size 3 --seq-length 96 --cp-comm-type a2a",
            "4 attention heads .*--context-parallel-size 3 ranks: use 2, or p2p",
        ),
        ("--position-embedding-type harpe --context-parallel-size 2 --seq-length 66", "--seq-length 66.*use 64 or 68"),
        ("--ksa --position-embedding-type rope --async-save --ckpt-format torch", "use --ckpt-format torch_dist"),
        (
            "--ksa --position-embedding-type rope --bf16 --fp8-format hybrid --transformer-impl local",
            "--fp8-format without --transformer-impl transformer_engine: use --transformer-impl transformer_engine",
        ),
        (
            f"{FP8} --seq-length 128 --ksa-distill",
            "distillation does not go with --fp8-recipe delayed: .*use --fp8-recipe tensorwise",
        ),
        (
            "--position-embedding-type harpe --cuda-graph-impl local --context-parallel-size 2",
            "--cuda-graph-impl local and --context-parallel-size 2: its exchange was not captured",
        ),
        (f"{FP8} --fp8-recipe mxfp8", "--fp8-recipe mxfp8: use delayed, tensorwise or blockwise"),
        (FP8, "takes multiples of 16 text rows and 16 summary rows .*--seq-length 64 has others: use 128, or 16 bits"),
        (f"{FP8} --seq-length 128 --ckpt-format torch", "--fp8-recipe delayed does not go with --ckpt-format torch"),
        ("--ksa --position-embedding-type rope --tp-comm-overlap", "--tp-comm-overlap: its buffers have the text's"),
        ("--ksa --position-embedding-type rope --fp4-format e2m1", "does not go with --fp4-format: .*use --bf16"),
        ("--position-embedding-type harpe --cuda-graph-impl full_iteration", "add --no-check-for-nan-in-loss-and-grad"),
        ("--position-embedding-type harpe --external-cuda-graph", "CUDA graphs of Transformer Engine: it captures"),
        ("--ksa --position-embedding-type rope --loss-chunk-rows -3", "--loss-chunk-rows is -3"),
        ("--loss-chunk-rows 64 --defer-embedding-wgrad-compute", "does not go with --defer-embedding-wgrad-compute"),
        ("--position-embedding-type harpe --use-rope-scaling", "does not go with --use-rope-scaling"),
        ("--ksa --position-embedding-type rope --softmax-type learnable", "does not go with --softmax-type learnable"),
        ("--ksa --position-embedding-type rope --window-size 8,0", "does not go with --window-size: KSA's windows are"),
        ("--position-embedding-type harpe --qk-clip", "does not go with --qk-clip"),
        (
            "--ksa --position-embedding-type rope --heterogeneous-layers-config-path x.json",
            "does not go with --heterogeneous-layers-config-path: the layer specs are this project's own",
        ),
    ],
)
def test_refused_in_one_line(monkeypatch, flags, message):
    args = parse(monkeypatch, flags)
    with pytest.raises(UsageError, match=message) as error:
        settings_from_args(args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("processes", "flags", "message"),
    [
        (3, "--tensor-model-parallel-size 3", "--tensor-model-parallel-size 3 .*--num-attention-heads 4: use 2 or 4"),
        (2, "--tensor-model-parallel-size 4", "2 processes do not divide .* = 4: start 4 of them"),
        (9, "--tensor-model-parallel-size 2 --context-parallel-size 2", "9 processes .* = 4: start 8 or 12 of them"),
        (3, "--pipeline-model-parallel-size 3", "--pipeline-model-parallel-size 3 .*--num-layers 4: use 2 or 4"),
        (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 3", "2 layers of a .*: use 2$"),
        (1, "--num-query-groups 3", "--num-query-groups 3 does not divide --num-attention-heads 4: use 2 or 4"),
        (
            12,
            "--num-attention-heads 12 --hidden-size 48 --num-query-groups 3 --tensor-model-parallel-size 2",
            "2 is neither a divisor nor a multiple of --num-query-groups 3: use 1 or 3",
        ),
        (1, "--hidden-size 30", "--num-attention-heads 4 does not divide --hidden-size 30: use 3 or 5"),
        (2, "--num-experts 3 --expert-model-parallel-size 2", "--num-experts 3: use 1 or 3"),
        (2, "--num-experts 4 --expert-model-parallel-size 2 --tensor-model-parallel-size 2", "= 4: start 4 of them"),
        (3, "--global-batch-size 4", "--global-batch-size 4 .* data-parallel size 3 = 3: use 3 or 6"),
        (1, "--max-position-embeddings 32", "--max-position-embeddings 32 is below --seq-length 64: use 64 or more"),
        (1, "--tensor-model-parallel-size 0", "--tensor-model-parallel-size is 0: it must be at least 1"),
        (1, "--seq-length 0", "--seq-length is 0: it must be at least 1"),
        (1, "--seq-length=-64", "--seq-length is -64: it must be at least 1"),
        (1, "--micro-batch-size 0", "--micro-batch-size is 0: it must be at least 1"),
        (1, "--global-batch-size 0", "--global-batch-size is 0: it must be at least 1"),
        (1, "--num-attention-heads 0", "--num-attention-heads is 0: it must be at least 1"),
        (1, "--num-query-groups 0", "--num-query-groups is 0: it must be at least 1"),
    ],
)
def test_layouts_that_cannot_work_are_refused_with_the_nearest_that_does(monkeypatch, processes, flags, message):
    args = parse(monkeypatch, f"--ksa --position-embedding-type rope {flags}", processes)
    with pytest.raises(UsageError, match=message) as error:
        settings_from_args(args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data-path {folder}/absent", "absent.idx does not exist"),
        ("--data-path 1 {folder}/whole 2 {folder}/cut", "cut.bin has 10 bytes where its index tells 20"),
        ("--train-data-path {folder}/whole --valid-data-path {folder}/absent", "absent.idx does not exist"),
        ("--data-args-path {folder}/absent.txt", "No such file"),
    ],
)
def test_missing_or_truncated_data_is_refused(monkeypatch, tmp_path, flags, message):
    for name in ("whole", "cut"):
        with IndexedDatasetWriter(str(tmp_path / name), 100) as writer:
            writer.add_document(np.arange(10))
    os.truncate(tmp_path / "cut.bin", 10)
    args = parse(monkeypatch, flags.format(folder=tmp_path))
    with pytest.raises(UsageError, match=message):
        for prefix in dataset_prefixes(args):
            check_indexed_dataset(prefix)


def test_plain_flags_leave_megatrons_model(monkeypatch):
    args = parse(monkeypatch, "--position-embedding-type rope")
    assert settings_from_args(args).is_megatron and args.attention_dropout == 0.1


@pytest.mark.parametrize(
    ("flags", "dropout"),
    [
        ("--position-embedding-type=harpe", 0.0),
        ("--position-embedding-type harpe", 0.0),
        ("--ksa --position-embedding-type=rope", 0.0),
        ("--position-embedding-type rope --wandb-exp-name harpe", 0.1),
        ("--position-embedding-type rope --wandb-exp-name harpe --attention-dropout=0.2", 0.2),
    ],
)
def test_attention_dropout_follows_what_the_flags_mean(monkeypatch, flags, dropout):
    """`harpe` was looked for among the words: `--position-embedding-type=harpe` was refused over an
    `--attention-dropout 0.1` that nobody gave, and any flag's value `harpe` set a plain model's dropout to 0.
    """
    args = parse(monkeypatch, flags)
    settings_from_args(args)
    assert args.attention_dropout == dropout


@pytest.mark.parametrize(
    ("flags", "worker", "strategy"),
    [
        ("--async-save", True, "mcore"),
        ("--async-save --async-strategy=nvrx", True, "nvrx"),
        ("--wandb-exp-name=--async-save", False, "nvrx"),
    ],
)
def test_async_save_has_defaults_of_its_own(monkeypatch, flags, worker, strategy):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    args = parse(monkeypatch, f"--position-embedding-type rope {flags}")
    settings_from_args(args)
    assert (args.use_persistent_ckpt_worker, args.async_strategy) == (worker, strategy)


@pytest.mark.parametrize(
    ("flags", "mode"),
    [
        ("", "validate_results"),
        ("--no-check-for-nan-in-loss-and-grad", "disabled"),
        ("--no-check-for-nan-in-loss-and-grad --check-for-spiky-loss", "validate_results"),
        ("--no-check-for-nan-in-loss-and-grad --rerun-mode validate_results", "validate_results"),
    ],
)
def test_nothing_asks_for_a_second_run_where_nothing_is_checked(monkeypatch, flags, mode):
    """Megatron waits for the device once an iteration to hear whether a check asked for one."""
    args = parse(monkeypatch, f"--position-embedding-type rope {flags}")
    settings_from_args(args)
    assert args.rerun_mode == mode


def test_flags_given_by_hand_are_known_however_they_are_written(monkeypatch):
    args = parse(monkeypatch, "--position-embedding-type=rope --swiglu --no-ksa --persistent-save-interval 3")
    given = given_flags(args)
    assert {name: given[name] for name in ("swiglu", "ksa", "save_interval", "position_embedding_type")} == {
        "swiglu": "--swiglu", "ksa": "--no-ksa", "save_interval": "--persistent-save-interval",
        "position_embedding_type": "--position-embedding-type",
    }  # fmt: skip
    assert "attention_dropout" not in given
    forget_given(args)
    assert given_flags(args) == {}


def test_an_alias_is_refused_as_its_flag_is(monkeypatch):
    args = parse(monkeypatch, "--ksa --position-embedding-type rope --disable-dsa-indexer-scoring-relu")
    with pytest.raises(UsageError, match="--ksa does not go with --disable-dsa-indexer-scoring-relu: "):
        check_flags(args, with_ksa=True)
    check_flags(args, with_ksa=False)


def test_pipeline_stages_exchange_text_and_summary_rows(monkeypatch):
    args = parse(monkeypatch, "--ksa --position-embedding-type harpe --pipeline-model-parallel-size 2")
    settings = settings_from_args(args)
    args.virtual_pipeline_model_parallel_size = None  # as Megatron's own validation leaves it
    adapt_trainer(args, settings)
    assert args.decoder_seq_length == 72
    assert settings.bases == (1e6, 5e6) and args.attention_dropout == 0.0


def test_missing_sizes_are_named(monkeypatch):
    args = parse(monkeypatch, "--ksa --position-embedding-type harpe")
    args.hidden_size = None
    with pytest.raises(UsageError, match="--ksa needs --hidden-size"):
        settings_from_args(args)


def test_exit_code_is_2_and_help_lists_the_flags():
    """One line on stderr, no traceback; --help has a group each for KSA and HARPE."""
    bad = run_script("pretrain_gpt.py", *MODEL, "--ksa")
    assert bad.returncode == 2
    assert [line for line in bad.stderr.splitlines() if "error" in line.lower()] == [bad.stderr.splitlines()[-1]]
    assert "Traceback" not in bad.stderr
    shown = run_script("pretrain_gpt.py", "--help")
    assert shown.returncode == 0
    for text in ("\nKSA:", "\nHARPE:", "--ksa-window-chunks", "--harpe-bases", "harpe}"):
        assert text in shown.stdout


@pytest.mark.parametrize("flags", ["--exit-signal SIGFOO", "--attention-backend quick"])
def test_names_that_a_flag_does_not_have_are_refused(monkeypatch, capsys, flags):
    """They ended in a KeyError of Megatron's enumeration."""
    with pytest.raises(SystemExit):
        parse(monkeypatch, flags)
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"error: argument {flags.split()[0]}: '{flags.split()[1]}' is none of " in said


@pytest.mark.parametrize(
    ("recipe", "capability", "needed"),
    [("delayed", (8, 0), "8.9"), ("blockwise", (8, 9), "9.0"), ("delayed", (8, 9), None)],
)
def test_fp8_on_a_gpu_that_has_none_is_refused(recipe, capability, needed, monkeypatch):
    """Transformer Engine refused it in the first step, in a traceback."""
    args = parse(monkeypatch, f"{FP8} --fp8-recipe {recipe} --transformer-impl local")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    if needed is None:
        _check_machine(args)
        return
    with pytest.raises(
        UsageError, match=f"capability {needed}, this one has {capability[0]}.{capability[1]}: drop --fp8"
    ):
        _check_machine(args)
