"""The base set is part of a checkpoint; other bases are an error unless a flag says that they are meant."""

import argparse
from pathlib import Path

import pytest
from huggingface.models import save_family

from megatron_ksa.checkpoint import identity, stored_args
from megatron_ksa.checkpoint.dense import check_checkpoint
from megatron_ksa.checkpoint.load import StoredCheckpoint
from megatron_ksa.checkpoint.model_sizes import check_adam, check_model, check_order
from megatron_ksa.checkpoint.stored_args import take_stored_args
from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.config.settings import RunSettings
from megatron_ksa.errors import UsageError
from megatron_ksa.huggingface.importer import import_checkpoint

WRITTEN, OTHER = (1e4, 123456.7), (1e4, 2e5)


@pytest.mark.parametrize("written", [None, WRITTEN])
def test_other_bases(written):
    stored = argparse.Namespace(harpe_resolved_bases=written)
    assert identity.check_bases(stored, RunSettings(KSAConfig(), written)) is None
    with pytest.raises(UsageError, match="the flags say 10000,200000: .*--harpe-override-checkpoint-bases"):
        identity.check_bases(stored, RunSettings(KSAConfig(), OTHER))
    line = identity.check_bases(stored, RunSettings(KSAConfig(), OTHER, override_bases=True))
    before = "no HARPE" if written is None else "10000,123457"
    assert f"was written with {before}, the flags say 10000,200000: training goes on" in line


def test_override_is_said_where_a_run_goes_on():
    stored = argparse.Namespace(harpe_resolved_bases=WRITTEN)
    line = identity.check_identity(stored, RunSettings(KSAConfig(), OTHER, override_bases=True))
    assert "--harpe-override-checkpoint-bases" in line


@pytest.mark.parametrize("way", ["--finetune --load", "--pretrained-checkpoint"])
def test_starting_from_weights_checks_too(megatron_flags, tmp_path, way):
    """Megatron compares nothing with --finetune: another base set went in without a word."""
    save_family("qwen3", tmp_path / "hf")
    (tmp_path / "megatron").mkdir()
    import_checkpoint(tmp_path / "hf", tmp_path / "megatron")
    folder, started = str(tmp_path / "megatron"), way == "--pretrained-checkpoint"
    flags = argparse.Namespace(
        finetune=not started, load=None if started else folder, pretrained_checkpoint=folder if started else None,
        ckpt_step=None, rank=0,
    )  # fmt: skip
    assert check_checkpoint(flags, RunSettings(KSAConfig(), None)) is None
    with pytest.raises(UsageError, match="written with no HARPE"):
        check_checkpoint(flags, RunSettings(KSAConfig(), OTHER))
    line = check_checkpoint(flags, RunSettings(KSAConfig(), OTHER, override_bases=True))
    assert "--harpe-override-checkpoint-bases" in line


@pytest.mark.parametrize("override", [False, True])
def test_stored_arguments(override):
    """Bases come from the checkpoint unless overridden; the annealing schedule is the run's."""
    stored = argparse.Namespace(
        ksa=True, ksa_chunk_size=4, ksa_anneal_start=3, qk_layernorm=True, harpe_resolved_bases=WRITTEN
    )
    args = argparse.Namespace(
        ksa=False, ksa_chunk_size=8, ksa_anneal_start=None, qk_layernorm=False, harpe_bases="1,2",
        harpe_override_checkpoint_bases=override,
    )  # fmt: skip
    take_stored_args(args, stored)
    assert (args.ksa, args.ksa_chunk_size, args.ksa_anneal_start, args.qk_layernorm) == (True, 4, None, True)
    assert args.harpe_bases == ("1,2" if override else "10000.0,123456.7")


def test_a_dense_checkpoint_leaves_ksa_to_the_flags():
    args = argparse.Namespace(ksa=True, ksa_chunk_size=4, harpe_bases=None, harpe_override_checkpoint_bases=False)
    take_stored_args(args, argparse.Namespace(ksa=False, ksa_chunk_size=8, harpe_resolved_bases=None))
    assert args.ksa and args.ksa_chunk_size == 4


@pytest.mark.parametrize(
    ("given", "override", "taken"),
    [("learned_absolute", False, "rope"), ("harpe", False, "harpe"), ("harpe", True, "harpe"), ("rope", True, "rope")],
)
def test_harpe_is_not_dropped_quietly(given, override, taken, monkeypatch):
    """Megatron takes the position type from the checkpoint, whatever the flags say; check_bases then decides."""

    def from_checkpoint(args, load_arg):
        args.position_embedding_type = "rope"
        return args, argparse.Namespace()

    monkeypatch.setattr(stored_args.checkpointing, "load_args_from_checkpoint", from_checkpoint)
    args = argparse.Namespace(position_embedding_type=given, harpe_override_checkpoint_bases=override)
    stored_args.load_stored_args(args, {})
    assert args.position_embedding_type == taken


@pytest.mark.parametrize(
    ("name", "by_hand", "stored", "kept"),
    [
        ("rotary_base", 5_000_000, 10000, True),
        ("ksa_independent_projections", False, True, True),
        ("attention_dropout", 0.0, 0.1, True),
        ("swiglu", True, False, False),
        ("num_query_groups", 4, 2, False),
        ("num_query_groups", 2, 2, True),
    ],
)
def test_a_flag_given_by_hand_is_kept_or_refused(name, by_hand, stored, kept, monkeypatch):
    """`--no-ksa-independent-projections` and `--rotary-base` beside --use-checkpoint-args did nothing, silently."""

    def from_checkpoint(args, load_arg):
        setattr(args, name, stored)
        return args, argparse.Namespace()

    monkeypatch.setattr(stored_args.checkpointing, "load_args_from_checkpoint", from_checkpoint)
    args = argparse.Namespace(
        **{name: by_hand}, position_embedding_type="rope", harpe_override_checkpoint_bases=False
    )  # fmt: skip
    if kept:
        stored_args.load_stored_args(args, {name: "--flag"})
        assert getattr(args, name) == by_hand
    else:
        with pytest.raises(UsageError, match=f"--flag {by_hand}: the checkpoint of .* says {stored}, .*drop --flag"):
            stored_args.load_stored_args(args, {name: "--flag"})


@pytest.mark.parametrize("change", [{"bf16": True}, {"optimizer": "sgd"}, {"use_distributed_optimizer": True}])
def test_an_optimizer_is_compared_where_its_state_is_loaded(change):
    """A resume with another optimizer or precision blamed the checkpoint's files; a release has weights alone."""
    plain = {"bf16": False, "fp16": False, "optimizer": "adam", "use_distributed_optimizer": False, "hidden_size": 32,
             "rank": 0}  # fmt: skip
    saved = argparse.Namespace(**plain)
    for name, kept in (("release", True), ("iter_0000001", False)):
        stored = StoredCheckpoint(Path("saved", name), 1, saved, None)
        for skips in ({"no_load_optim": False}, {"no_load_optim": True}):
            args = argparse.Namespace(**plain | change | skips)
            check_model(stored, args, only_weights=True)
            if kept or skips["no_load_optim"]:
                check_model(stored, args, only_weights=False)
                continue
            with pytest.raises(UsageError, match="the checkpoint was written with .*, or --no-load-optim"):
                check_model(stored, args, only_weights=False)
        with pytest.raises(UsageError, match="--hidden-size: the checkpoint was written with 32, the flags say 64"):
            check_model(stored, argparse.Namespace(**plain | {"hidden_size": 64, "no_load_optim": True}), True)


@pytest.mark.parametrize(
    "saved, given, refused",
    [({}, {}, True), ({"dist_ckpt_optim_fully_reshardable": True}, {}, False), ({}, {"no_load_optim": True}, False),
     ({"use_distributed_optimizer": False}, {"use_distributed_optimizer": False}, False),
     ({}, {"transformer_impl": "local"}, False)],
)  # fmt: skip
def test_an_optimizers_state_in_the_order_of_other_layers_is_refused(saved, given, refused):
    """Float32 parameters and moments went to other parameters, silently: the buckets of both kinds have one size."""
    plain = {"use_distributed_optimizer": True, "rank": 0}
    stored = argparse.Namespace(**plain | {"transformer_impl": "local"} | saved)
    stored = StoredCheckpoint(Path("saved", "iter_0000001"), 1, stored, None)
    args = argparse.Namespace(**plain | {"transformer_impl": "transformer_engine", "no_load_optim": False} | given)
    check_order(stored, args, only_weights=True)
    if refused:
        with pytest.raises(UsageError, match="--transformer-impl: the checkpoint was written with local, .*order"):
            check_order(stored, args, only_weights=False)
    else:
        check_order(stored, args, only_weights=False)


@pytest.mark.parametrize(("saved", "given", "refused"), [(2, 1, True), (1, 2, True), (2, 4, False), (1, 1, False)])
def test_experts_with_and_without_an_optimizer_of_their_own(saved, given, refused):
    """The run ended in a KeyError where Megatron loads, or was told to give the checkpoint's learning rate."""
    stored = argparse.Namespace(num_experts=4, expert_model_parallel_size=saved)
    stored = StoredCheckpoint(Path("saved", "iter_0000001"), 1, stored, None)
    args = argparse.Namespace(num_experts=4, expert_model_parallel_size=given, no_load_optim=False, rank=0)
    check_model(stored, args, only_weights=True)
    if refused:
        with pytest.raises(UsageError, match=f"^--expert-model-parallel-size: .* with {saved}, .*--no-load-optim"):
            check_model(stored, args, only_weights=False)
    else:
        check_model(stored, args, only_weights=False)


@pytest.mark.parametrize("size", ["tensor_model_parallel_size", "pipeline_model_parallel_size"])
def test_an_optimizers_state_of_other_ranks_is_refused(size):
    """The run ended in a RuntimeError after the model was built, which named a flag that does not help."""
    saved = argparse.Namespace(use_distributed_optimizer=True, **{size: 2})
    args = argparse.Namespace(no_load_optim=False, **{size: 1})
    flag = f"--{size.replace('_', '-')}"
    with pytest.raises(UsageError, match=f"^{flag}: the checkpoint was written with 2, .*fully-reshardable"):
        check_order(StoredCheckpoint(Path("saved", "iter_0000001"), 1, saved, None), args, only_weights=False)
    saved.dist_ckpt_optim_fully_reshardable = True
    check_order(StoredCheckpoint(Path("saved", "iter_0000001"), 1, saved, None), args, only_weights=False)


@pytest.mark.parametrize(
    ("saved", "here", "refused"),
    [("torch", "transformer_engine", True), ("apex", "torch", True), ("apex", "transformer_engine", False),
     ("torch", "torch", False), (None, "torch", False)],
)  # fmt: skip
def test_another_librarys_adam(saved, here, refused):
    """Megatron would step an Adam whose state counts steps as the other one does."""
    stored = argparse.Namespace(**({} if saved is None else {"adam_library": saved}))
    stored = StoredCheckpoint(Path("saved", "iter_0000001"), 1, stored, None)
    args = argparse.Namespace(adam_library=here, optimizer="adam", no_load_optim=False)
    check_adam(stored, args, only_weights=True)
    if refused:
        with pytest.raises(UsageError, match=f"is the Adam of {saved}, this machine's that of {here}.*--no-load-optim"):
            check_adam(stored, args, only_weights=False)
    else:
        check_adam(stored, args, only_weights=False)


def test_biases_are_compared_as_validation_leaves_them(capsys):
    """No model with biases resumed: --add-qkv-bias was True in its checkpoint, and not yet among the flags."""
    saved = argparse.Namespace(add_bias_linear=True, add_qkv_bias=True, norm_epsilon=1e-5)
    stored = StoredCheckpoint(Path("saved", "release"), 1, saved, None)
    flags = {"no_load_optim": False, "rank": 0, "add_qkv_bias": False, "norm_epsilon": 1e-5}
    check_model(stored, argparse.Namespace(**flags, add_bias_linear=True), only_weights=False)
    assert not capsys.readouterr().out
    with pytest.raises(UsageError, match=r"biases of linear layers \(--disable-bias-linear\): the checkpoint was"):
        check_model(stored, argparse.Namespace(**flags, add_bias_linear=False), only_weights=False)
    flags |= {"norm_epsilon": 1e-3}
    check_model(stored, argparse.Namespace(**flags, add_bias_linear=True), only_weights=False)
    assert "note: --norm-epsilon is 0.001, the checkpoint was trained with 1e-05" in capsys.readouterr().out
