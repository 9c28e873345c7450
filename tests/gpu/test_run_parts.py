"""The parts that a GPU is asked for: their limits, what a failing one leaves, and what a second call goes on with."""

import importlib.util
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType

import pytest
import run_parts
from gpu_parts import ONE_GPU, THROUGHPUT, TRAINING, Part, several_gpus, tiny
from megatron.training import arguments as megatron_arguments

from megatron_ksa.kernels.benchmarks import __main__ as benchmarks
from megatron_ksa.kernels.benchmarks.runner import OPS
from megatron_ksa.model import prepare
from megatron_ksa.platform import trainer_defaults
from megatron_ksa.training.arguments import install_arguments, settings_from_args

ROOT = Path(__file__).parents[2]
# The scripts of the parts, which import their neighbours.
sys.path += [str(ROOT / THROUGHPUT), str(ROOT / TRAINING)]
import gpu_check  # noqa: E402

EVERY = {f"{part.name}, {gpus}": part for gpus in (2, 4, 8) for part in several_gpus(gpus)}
EVERY |= {part.name: part for part in ONE_GPU}


def part(name, code, **changes) -> Part:
    return Part(name, name, 1, changes.pop("limit", 60), ("-c", code), **changes)


@pytest.fixture
def runner(tmp_path):
    return run_parts.Runner(
        tmp_path, time.monotonic() + 100, None, {"COMMIT": "0"}, tmp_path / "../pack.tar.gz", gpus=2
    )


def test_a_part_that_fails_and_one_that_hangs_leave_the_others(runner, capsys):
    hung = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(300)'])"
    began = time.monotonic()
    runner.run([part("good", "print('well')"), part("bad", "import sys; sys.exit('error: no GPU')")])
    runner.run([part("hung", hung, limit=1)])
    assert time.monotonic() - began < 30
    states = {name: (done["state"], done["why"]) for name, done in runner.record.items()}
    assert states == {"good": ("ok", ""), "bad": ("failed", "exit code 1"), "hung": ("cut", "after 1 s")}
    assert "error: no GPU" in capsys.readouterr().out
    assert json.loads((runner.out / run_parts.RECORD).read_text()) == runner.record
    with tarfile.open(runner.pack) as stream:
        assert {"./good.log", "./parts.json"} <= set(stream.getnames())


def test_what_a_part_has_started_ends_with_it(runner, tmp_path):
    """A script that was killed alone left its training on the GPU, beside the next part."""
    pid = tmp_path / "pid"
    code = (
        f"import os, subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; "
        f"time.sleep(300)']); open({str(pid)!r}, 'w').write(str(child.pid)); time.sleep(300)"
    )
    runner.run([part("parent", code, limit=3)])
    # A process that nobody waits for stays as a zombie, which runs nothing.
    stat = Path(f"/proc/{pid.read_text()}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_nothing_is_started_when_the_time_is_over(tmp_path):
    runner = run_parts.Runner(tmp_path, time.monotonic() + 1, None, {}, None)
    runner.run([part("late", "raise SystemExit('started')")])
    assert runner.record["late"]["state"] == "not run"


def test_transformer_engine_is_on_the_path_of_its_parts_alone(tmp_path):
    (tmp_path / "te" / "transformer_engine").mkdir(parents=True)
    runner = run_parts.Runner(tmp_path, time.monotonic() + 100, tmp_path / "te", {}, None)
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('transformer_engine') is {} None)"
    runner.run([part("with", code.format(""), te=True), part("without", code.format("not"))])
    without = run_parts.Runner(tmp_path, time.monotonic() + 100, None, {}, None)
    without.run([part("missing", "", te=True)])
    states = {name: done["state"] for name, done in without.record.items()}
    assert states == {"with": "ok", "without": "ok", "missing": "skipped"}


def test_neighbours_that_measure_no_times_run_together():
    names = [[part.name for part in together] for together in run_parts.sets([*ONE_GPU])]
    assert names[0] == ["kernels", "checks", "fp8_curve"] and ["te_8k"] in names


def test_parts_of_one_gpu_have_one_of_several(runner):
    """The third of them waits until one of two GPUs is free."""
    code = "import os, time; time.sleep({}); print('GPU', os.environ['CUDA_VISIBLE_DEVICES'])"
    seconds = {"first": 4, "second": 0, "third": 0}
    parts = [part(name, code.format(sleep), own_gpu=True) for name, sleep in seconds.items()]
    (together,) = run_parts.sets(parts)
    runner.run(together)
    said = {one.name: (runner.out / f"{one.name}.log").read_text().split()[-1] for one in parts}
    assert said == {"first": "0", "second": "1", "third": "1"}


def test_a_second_call_goes_on(monkeypatch, tmp_path):
    """Also on another machine, from the archive; a part that is named runs again."""

    def chosen(*words):
        monkeypatch.setattr(sys, "argv", ["run_parts.py", "one_gpu", str(tmp_path), *words])
        options = run_parts.parse_arguments()
        record = {"kernels": {"state": "ok"}, "checks": {"state": "cut"}}
        return [part.name for part in run_parts.chosen(ONE_GPU, options, record)]

    assert chosen("--seconds", "5")[:2] == ["checks", "fp8_curve"]
    assert chosen("--seconds", "5", "kernels") == ["kernels"]
    with pytest.raises(SystemExit, match="part speed: use some of kernels"):
        chosen("speed")


def loaded(script: str) -> ModuleType:
    """A script as a module; several folders of examples have one of this name."""
    spec = importlib.util.spec_from_file_location(f"part_{Path(script).stem}", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def filled(one: Part) -> list[str]:
    words = {"OUT": "/tmp/out", "LEFT": "100", "COMMIT": "0123456789", "GPUS": "4"}
    return [run_parts._filled(word, words) for word in one.command]


@pytest.mark.parametrize("name", EVERY)
def test_parts_can_start(name, monkeypatch):
    """Scripts, tests and kinds are there, and options have no misspelling that a GPU would find."""
    one = EVERY[name]
    assert one.takes < one.limit <= 480
    script, *words = filled(one)
    small = tiny(one)
    assert small is None or small.command[0] == script
    if script == "-m":
        assert all((ROOT / word.split("::")[0]).exists() for word in words if word.startswith("tests/"))
        if words[0] != "pytest":
            assert set(benchmarks.parser().parse_args(words[1:]).op) <= set(OPS)
        return
    assert (ROOT / script).is_file()
    if script.startswith(THROUGHPUT):
        monkeypatch.setattr(sys, "argv", [script, *words])
        options = loaded(script).parse_arguments()
        kinds = getattr(options, "kinds", ["local"])
        assert one.te or not {kind for kind in kinds if not kind.startswith("local")}
    elif script.endswith("gpu_check.py"):
        assert set(words[words.index("--only") + 1 :] if "--only" in words else ()) <= set(gpu_check.KINDS)


@pytest.mark.parametrize("name", [name for name in EVERY if EVERY[name].command[0].endswith("throughput_1b9/run.py")])
def test_the_trainer_takes_the_flags_of_every_run(name, monkeypatch):
    """A GPU would find a kind of layers or a layout that the flags' checks refuse."""
    script, *words = filled(EVERY[name])
    monkeypatch.setattr(sys, "argv", [script, *words])
    throughput = loaded(script)
    options = throughput.parse_arguments()
    monkeypatch.setattr(prepare, "REFUSES_UNCHECKED", False)
    for one in throughput.wanted(options, []):
        monkeypatch.setenv("WORLD_SIZE", str(one.layout.gpus if one.layout else 1))
        flags = throughput.training_flags(one.model, one.length, one.kind, options, one.layout)
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *flags])
        with install_arguments(trainer_defaults()):
            args = megatron_arguments.parse_args()
        settings = settings_from_args(args)
        assert settings.kernels.unchecked


@pytest.mark.parametrize("gpus", [2, 4])
def test_full_attention_on_several_gpus_comes_last(gpus, monkeypatch):
    """The part's time was over before one GPU had run, which all other layouts are compared with."""
    script, *words = filled(EVERY[f"speed, {gpus}"])
    monkeypatch.setattr(sys, "argv", [script, *words])
    throughput = loaded(script)
    found = [(run.model, run.layout.name) for run in throughput.wanted(throughput.parse_arguments(), [])]
    fewer = [("ksa", "cp2")] * (gpus > 2)
    assert found == [("ksa", f"cp{gpus}"), *fewer, ("ksa", "one"), ("full", f"cp{gpus}")]


def test_list_says_the_parts():
    done = subprocess.run(
        [sys.executable, ROOT / "tests/gpu/run_parts.py", "several_gpus", "out", "--gpus", "8", "--list"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert [line.split()[0] for line in done.stdout.splitlines()] == [part.name for part in several_gpus(8)]
