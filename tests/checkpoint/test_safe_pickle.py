"""A checkpoint is data: what its pickles name is looked up only where checkpoints are made of it."""

import argparse
import io
import os
import pickle
import signal
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core.transformer.enums import AttnBackend
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata

from megatron_ksa.errors import UsageError
from megatron_ksa.upstream import checkpoint_pickle, safe_pickle
from megatron_ksa.upstream.patches import apply


class Payload:
    """Runs a call when it is unpickled."""

    def __init__(self, call, *arguments) -> None:
        self.reduced = (call, arguments)

    def __reduce__(self):
        return self.reduced


ATTACKS = {
    "os.system": Payload(os.system, "touch owned"),
    "subprocess": Payload(subprocess.call, ["touch", "owned"]),
    "eval": Payload(eval, "open('owned', 'w')"),
    "getattr": Payload(getattr, 5, "real"),
    "importer": Payload(__import__, "os"),
    "torch.load": Payload(torch.load, "owned"),
    "numpy's loader": Payload(np.load, "owned"),
    "a decoder": Payload(pickle.loads, b"cos\nsystem\n(S'touch owned'\ntR."),
}


@pytest.mark.parametrize("payload", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("protocol", [2, 5])
def test_nothing_runs(payload, protocol, tmp_path, monkeypatch):
    """12 of 12 loads ran what an object's __reduce__ named."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(safe_pickle.UnsafePickle, match="an object of "):
        safe_pickle.load(io.BytesIO(pickle.dumps({"args": [payload]}, protocol)))
    stream = io.BytesIO()
    torch.save([payload], stream)
    stream.seek(0)
    with pytest.raises(safe_pickle.UnsafePickle, match="an object of "):
        safe_pickle.torch_load(stream)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["os.system", "posix.system", "__main__.Payload", "megatron.training.training.train"])
def test_dotted_and_foreign_names_are_refused(name):
    module, _, attribute = name.rpartition(".")
    for text in (f"c{module}\n{attribute}\n.", "cargparse\nos.system\n.", "ctorch\nhub.load\n."):
        with pytest.raises(safe_pickle.UnsafePickle):
            safe_pickle.load(io.BytesIO(text.encode()))


def test_what_checkpoints_hold_is_read():
    args = argparse.Namespace(dtype=torch.bfloat16, backend=AttnBackend.auto, exit_signal=signal.SIGTERM)
    args.shape = torch.Size([2])
    held = {
        "args": args,
        "rng": np.random.default_rng(0).integers(0, 9, 5),
        "scalar": np.float64(2.5),
        "tensor": torch.arange(6).reshape(2, 3),
        "bytes": b"\xff\x00",
        "set": {1, 2},
    }
    stream = io.BytesIO()
    torch.save(held, stream)
    stream.seek(0)
    read = safe_pickle.torch_load(stream)
    assert read["args"] == held["args"] and read["bytes"] == held["bytes"] and read["set"] == held["set"]
    assert np.array_equal(read["rng"], held["rng"]) and read["scalar"] == 2.5
    assert torch.equal(read["tensor"], held["tensor"])


def extra_state(value: object) -> torch.Tensor:
    """As Transformer Engine keeps it."""
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


@pytest.mark.parametrize("payload", ATTACKS.values(), ids=ATTACKS)
def test_extra_state_is_a_pickle_within_a_tensor(payload, tmp_path, monkeypatch):
    """Transformer Engine's layers unpickle it with pickle.loads, whatever it names.

    Megatron stores a list of one state, whose state was not looked at.
    """
    monkeypatch.chdir(tmp_path)
    saved = io.BytesIO()
    torch.save([payload], saved)
    within = Payload(torch.storage._load_from_bytes, saved.getvalue())
    states = [extra_state(payload), extra_state({"scale": within}), saved]
    for state in (*states, *([None, state] for state in states)):
        with pytest.raises(safe_pickle.UnsafePickle, match="an object of "):
            safe_pickle.check_extra_state(state)
    assert not (tmp_path / "owned").exists()


def test_extra_state_of_fp8_is_read():
    state = {"scale_fwd": torch.ones(3), "amax_history_fwd": torch.zeros(2, 3), "extra_fp8_variables": {"a": 1}}
    safe_pickle.check_extra_state(extra_state(state))
    for empty in (torch.empty(0, dtype=torch.uint8), None, b"", [None], [torch.empty(0, dtype=torch.uint8)]):
        safe_pickle.check_extra_state(empty)


def test_a_checkpoint_with_such_a_state_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, held = "layer._extra_state", io.BytesIO()
    torch.save([extra_state(ATTACKS["os.system"])], held)
    held.seek(0)
    item = SimpleNamespace(dest_index=SimpleNamespace(fqn=name), storage_index=None)
    planner = DefaultLoadPlanner()
    planner.metadata = Metadata({}, storage_data={})
    with apply(checkpoint_pickle.PATCHES), pytest.raises(UsageError, match="_extra_state holds an object of posix"):
        planner.load_bytes(item, held)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("where", ["metadata", "object"])
def test_a_distributed_checkpoint_names_the_file_and_the_class(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoint"
    dcp.save({"object": ATTACKS["os.system"] if where == "object" else 1}, checkpoint_id=folder, no_dist=True)
    if where == "metadata":
        metadata = Metadata({}, planner_data=ATTACKS["os.system"])
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with apply(checkpoint_pickle.PATCHES), pytest.raises(BaseException) as raised:
        dcp.load({"object": 0}, checkpoint_id=folder, no_dist=True)
    said = str(raised.value)
    assert "posix.system" in said and ".metadata" if where == "metadata" else "__0_0.distcp" in said
    assert "--trust-checkpoint" in said
    assert not (tmp_path / "owned").exists()
