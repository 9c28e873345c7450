"""The library's examples: KSA in another training loop, and its kernel in a layer without Megatron."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "examples" / "library"
# Everything that setup.py's extras bring; the kernels need none of them.
EXTRAS = (
    "megatron transformers tokenizers sentencepiece safetensors tensorboard tqdm matplotlib scipy sklearn datasketch "
    "httpx threadpoolctl pyarrow pandas zstandard"
).split()
# Runs a script as `python script` does, with those packages out of reach.
WITHOUT = """
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
script, sys.argv = sys.argv[2], sys.argv[2:]
runpy.run_path(script, run_name="__main__")
"""


def losses(command: list, folder: Path) -> tuple[list[float], str]:
    """Losses that a script prints, and all of its output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [str(word) for word in command]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [float(loss) for loss in re.findall(r"loss ([\d.]+) nats", done.stdout)], done.stdout


@pytest.mark.slow
def test_a_plain_megatron_loop_trains_and_saves(tmp_path):
    found, said = losses([sys.executable, LIBRARY / "megatron_loop.py", "--steps", 8, "--save", "saved"], tmp_path)
    assert len(found) == 8 and found[0] > 4 and found[-1] < 3.6
    assert "saved and loaded saved" in said and (tmp_path / "saved" / ".metadata").is_file()


def test_the_loop_has_five_lines_of_ksa():
    """What a reader changes in a loop of their own: marked, and all of it."""
    marks = re.findall(r"# KSA (\d)", (LIBRARY / "megatron_loop.py").read_text(encoding="utf-8"))
    assert marks == ["1", "2", "3", "4", "5"]


@pytest.mark.slow
def test_the_kernel_trains_in_a_layer_without_megatron(tmp_path):
    """Loss of a uniform guess: ln 8 = 2.08; at this distance only summaries carry the answer."""
    command = [sys.executable, "-c", WITHOUT, ",".join(EXTRAS), LIBRARY / "plain_layer.py", "--steps", 60]
    found, _ = losses(command, tmp_path)
    assert found[0] > 2 and found[-1] < 1.6


def test_importing_the_package_imports_neither_torch_nor_megatron():
    program = "import sys, megatron_ksa; dir(megatron_ksa); sys.exit(not {'torch', 'megatron'}.isdisjoint(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == 0


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("extra", "script"), [("", "plain_layer.py"), ("[train]", "megatron_loop.py")])
def test_examples_run_in_a_fresh_environment(tmp_path, extra, script):
    """An environment of its own with what the example's first lines install (several GB), from a copy of the files."""
    assert f"pip install -e '.{extra}'" in (LIBRARY / script).read_text().replace("-e .\n", "-e '.'\n")
    source, environment = tmp_path / "source", tmp_path / "environment"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    source.mkdir()
    packed = subprocess.run(
        ["tar", "-c", "--null", "-T", "-"], cwd=ROOT, input=files, capture_output=True, check=True
    ).stdout
    subprocess.run(["tar", "-x"], cwd=source, input=packed, check=True)
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "-c", source / "constraints.txt", f"{source}{extra}"]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, source / "examples" / "library" / script, "--steps", "1"],
        cwd=tmp_path, env=clean, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "step    1/1 | loss" in done.stdout
