"""Extra states of Transformer Engine's layers, where a checkpoint has them and where it has not."""

import os

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from megatron_ksa.checkpoint.extra_state import ALLOWED, read_by_transformer_engine, without_missing


def state_of(key):
    return ShardedObject(key, torch.empty(0), (1,), (0,))


def test_states_that_a_checkpoint_lacks_are_not_asked_for():
    """A checkpoint of local layers has none of heads' norms; a missing key ended the load."""
    weight = ShardedTensor.from_rank_offsets("norm.weight", torch.ones(2))
    state = {"norm.weight": weight, "norm._extra_state": state_of("norm._extra_state"),
             "qkv._extra_state": state_of("qkv._extra_state"), "rng": state_of("rng")}  # fmt: skip
    stored = {"norm.weight", state["qkv._extra_state"].unique_key}
    # What is no extra state is asked for in any case: its lack is an error.
    assert set(without_missing(state, stored)) == {"norm.weight", "qkv._extra_state", "rng"}


@pytest.mark.parametrize("before", [None, "0", "1"])
def test_transformer_engine_reads_them_during_a_load_alone(before, monkeypatch):
    """It refuses delayed scaling's scales without being told: a resumed run ended in its advice."""
    monkeypatch.delenv(ALLOWED, raising=False)
    if before is not None:
        monkeypatch.setenv(ALLOWED, before)
    with pytest.raises(KeyError), read_by_transformer_engine():
        assert os.environ[ALLOWED] == "1"
        raise KeyError
    assert os.environ.get(ALLOWED) == before
