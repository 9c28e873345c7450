"""Defaults by what is installed, and what the process needs before Megatron is imported."""

import os
import subprocess
import sys

import pytest
import torch
from megatron.core.datasets import utils

from megatron_ksa.platform import defaults
from megatron_ksa.upstream import dataset_helpers
from megatron_ksa.upstream.cpu import cpu
from megatron_ksa.upstream.cpu.cpu import activate_cpu_platform
from megatron_ksa.upstream.patches import apply

KERNELS = {
    "transformer_engine.pytorch": {"transformer_impl": "local", "apply_rope_fusion": False},
    "scaled_masked_softmax_cuda": {"masked_softmax_fusion": False},
    "fused_weight_gradient_mlp_cuda": {"gradient_accumulation_fusion": False},
    "apex.contrib.layer_norm.layer_norm": {"no_persist_layer_norm": True},
}
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """os.environ without a launcher's variables, restored afterwards."""
    for name in (*LAUNCHER, "CUDA_DEVICE_MAX_CONNECTIONS"):
        # Set first, so that the value is put back even where the variable was not set.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return os.environ


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_defaults_on_a_cpu():
    found = defaults.trainer_defaults()
    assert found["distributed_backend"] == "gloo" and found["transformer_impl"] == "local"
    assert found["use_cpu_initialization"] is True and found["num_workers"] == 0
    fusions = {name: on for name, on in found.items() if name.endswith("_fusion")}
    assert len(fusions) == 4 and not any(fusions.values()), "weight gradients have a stand-in for apex's kernel"


@pytest.mark.parametrize("missing", KERNELS)
def test_a_missing_package_turns_off_what_it_has(missing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(defaults, "importable", lambda module: module != missing)
    assert defaults.trainer_defaults() == {"eval_interval": defaults.EVAL_INTERVAL} | KERNELS[missing]


def test_all_installed_keeps_megatrons_defaults(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(defaults, "importable", lambda module: True)
    assert defaults.trainer_defaults() == {"eval_interval": defaults.EVAL_INTERVAL}


@pytest.mark.parametrize("body", ["raise ImportError('no such symbol')", "raise OSError('libcudart.so not found')"])
def test_a_package_that_does_not_load_is_not_installed(body, tmp_path, monkeypatch):
    (tmp_path / "broken_kernels.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    assert not defaults.importable("broken_kernels")
    assert not defaults.importable("no_such_package")
    assert defaults.importable("json")


def test_a_process_without_launcher_is_a_world_of_one(environment):
    defaults._join_alone()
    assert {name: environment[name] for name in LAUNCHER[:4]} == {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
    }  # fmt: skip
    assert 1024 <= int(environment["MASTER_PORT"]) < 65536


def test_a_launchers_world_is_left_alone(environment):
    environment["RANK"] = "3"
    defaults._join_alone()
    assert environment["RANK"] == "3" and "WORLD_SIZE" not in environment


@pytest.mark.parametrize(
    ("argv", "connections"),
    [
        ("--seed 1", None),
        ("--tensor-model-parallel-size 2", "1"),
        ("--seed 1 --context-parallel-size=4", "1"),
        ("--tensor-model-parallel-size 1 --context-parallel-size 1", None),
        ("--tensor-model-parallel-size 2 --use-torch-fsdp2", None),
        ("--context-parallel-size 2 --use-megatron-fsdp", None),
        ("--tensor-model-parallel-size", None),
    ],
)
def test_connections_of_a_parallel_layout(environment, argv, connections):
    defaults._order_communication(defaults._layout(argv.split()))
    assert environment.get("CUDA_DEVICE_MAX_CONNECTIONS") == connections


def test_connections_set_by_hand_win(environment):
    environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "8"
    defaults._order_communication(defaults._layout(["--tensor-model-parallel-size", "2"]))
    assert environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"


def test_compiled_helpers_are_not_built_again(monkeypatch):
    monkeypatch.setattr(utils, "compile_helpers", lambda: pytest.fail("make was run"))
    with apply(dataset_helpers.PATCHES):
        utils.compile_helpers()


def test_missing_helpers_are_built_as_before(monkeypatch):
    def build():
        pass

    monkeypatch.setattr(utils, "compile_helpers", build)
    monkeypatch.setitem(sys.modules, "megatron.core.datasets.helpers_cpp", None)
    with apply(dataset_helpers.PATCHES):
        assert utils.compile_helpers is build


def test_a_gpu_keeps_cuda(monkeypatch):
    monkeypatch.setitem(cpu._state, "active", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpu, "apply_for_good", lambda patches: pytest.fail("torch.cuda was changed"))
    assert not activate_cpu_platform()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_fresh_process_is_prepared_once():
    """The line about the CPU comes once, and a second call changes nothing."""
    script = (
        "import torch; from megatron_ksa.platform import prepare_platform\n"
        "from megatron_ksa.upstream.cpu.cpu import activate_cpu_platform\n"
        "found = prepare_platform([]); assert found['distributed_backend'] == 'gloo'\n"
        "stream = torch.cuda.Stream; assert activate_cpu_platform() and torch.cuda.Stream is stream\n"
        "assert torch.zeros(1, device='cuda').device.type == 'cpu'\n"
    )
    environment = {**os.environ, "RANK": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # On stderr: it came before the text that tools/generate.py writes to stdout.
    assert done.stderr.count("training on the CPU with gloo, 1 thread(s)") == 1 and not done.stdout
