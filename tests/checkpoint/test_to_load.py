"""The checkpoint that a run is to load is looked at before anything is built."""

import argparse

import pytest

from megatron_ksa.checkpoint.to_load import checkpoint_to_load
from megatron_ksa.errors import UsageError


def loading(folder, **settings):
    given = {"load": str(folder), "pretrained_checkpoint": None, "ckpt_step": None, "ckpt_format": "torch_dist"}
    return argparse.Namespace(**given | settings)


def test_a_checkpoint_without_its_configuration_is_damaged(tmp_path):
    """Megatron took it for one of torch_dcp, and the resume ended in a RuntimeError about a key `args`."""
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    (tmp_path / "iter_0000002").mkdir()
    (tmp_path / "iter_0000002" / ".metadata").touch()
    with pytest.raises(UsageError, match="iter_0000002/metadata.json is missing; no other whole checkpoint is there"):
        checkpoint_to_load(loading(tmp_path))
    assert checkpoint_to_load(loading(tmp_path, ckpt_format="torch_dcp")) is None


@pytest.mark.parametrize("step", [0, -1])
def test_steps_begin_at_one(step, tmp_path):
    """`--ckpt-step 0` was passed over, and the newest iteration loaded."""
    with pytest.raises(UsageError, match=f"--ckpt-step {step}: iterations are numbered from 1"):
        checkpoint_to_load(loading(tmp_path, ckpt_step=step))


@pytest.mark.parametrize("content", [b"", b"\x80\x04\xff", b"{}", b"[]"])
def test_a_damaged_configuration_is_named(content, tmp_path):
    """It ended in the traceback of whatever Megatron's reader met."""
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    (tmp_path / "iter_0000002").mkdir()
    (tmp_path / "iter_0000002" / "metadata.json").write_bytes(content)
    with pytest.raises(UsageError, match="/metadata.json is damaged .*; no other whole checkpoint is there"):
        checkpoint_to_load(loading(tmp_path))
