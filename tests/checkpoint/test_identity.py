"""The base set is part of a checkpoint; other bases are an error unless a flag says that they are meant."""

import argparse

import pytest
from huggingface.models import save_family

from megatron_ksa.checkpoint import identity, stored_args
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


def test_override_is_logged_where_megatron_compares(monkeypatch, capsys):
    compared = []
    monkeypatch.setattr(identity.checkpointing, "check_checkpoint_args", lambda args, skip=None: compared.append(args))
    identity.install_identity_check(RunSettings(KSAConfig(), OTHER, override_bases=True))
    stored = argparse.Namespace(harpe_resolved_bases=WRITTEN)
    identity.checkpointing.check_checkpoint_args(stored)
    assert compared == [stored] and "--harpe-override-checkpoint-bases" in capsys.readouterr().out


def test_finetuning_checks_too(megatron_flags, tmp_path, capsys):
    """Megatron compares nothing with --finetune: another base set went in without a word."""
    save_family("qwen3", tmp_path / "hf")
    (tmp_path / "megatron").mkdir()
    import_checkpoint(tmp_path / "hf", tmp_path / "megatron")
    flags = argparse.Namespace(
        finetune=True, load=str(tmp_path / "megatron"), ckpt_format="torch_dist", ckpt_step=None, rank=0
    )
    identity.check_finetune(flags, RunSettings(KSAConfig(), None))
    with pytest.raises(UsageError, match="written with no HARPE"):
        identity.check_finetune(flags, RunSettings(KSAConfig(), OTHER))
    identity.check_finetune(flags, RunSettings(KSAConfig(), OTHER, override_bases=True))
    assert "--harpe-override-checkpoint-bases" in capsys.readouterr().out


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

    def from_checkpoint(args, load_arg, context):
        args.position_embedding_type = "rope"
        return args, argparse.Namespace()

    monkeypatch.setattr(stored_args.checkpointing, "load_args_from_checkpoint", from_checkpoint)
    stored_args.install_checkpoint_args()
    args = argparse.Namespace(position_embedding_type=given, harpe_override_checkpoint_bases=override)
    stored_args.checkpointing.load_args_from_checkpoint(args)
    assert args.position_embedding_type == taken
