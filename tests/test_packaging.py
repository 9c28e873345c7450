"""What a wheel holds, and what the entry points and `make` say where something is missing."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENTRY_POINTS = ["pretrain_gpt.py", "tools/preprocess_data.py", "tools/train_tokenizer.py"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The tracked files, alone."""
    folder = tmp_path_factory.mktemp("repository")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_symlink() or (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def build(call: str, folder: Path, out: Path) -> Path:
    """What setuptools builds of a folder: `build_sdist`, `build_wheel` or `build_editable`."""
    code = f"import sys; from setuptools import build_meta; build_meta.{call}(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module", params=["repository", "sdist"])
def wheel_names(request, copy, tmp_path_factory):
    """Paths inside the wheel that is built from the repository, or from its sdist, where links are folders."""
    source = copy
    if request.param == "sdist":
        packed = build("build_sdist", copy, tmp_path_factory.mktemp("sdist"))
        unpacked = tmp_path_factory.mktemp("source")
        shutil.unpack_archive(packed, unpacked, filter="data")
        (source,) = unpacked.iterdir()
    with zipfile.ZipFile(build("build_wheel", source, tmp_path_factory.mktemp("wheel"))) as archive:
        return archive.namelist()


def test_editable_install_puts_one_package_at_the_top(copy, tmp_path):
    """A path file of the repository would make `kernels`, `tools` and `tests` importable everywhere."""
    with zipfile.ZipFile(build("build_editable", copy, tmp_path)) as archive:
        finder = next(name for name in archive.namelist() if name.endswith("finder.py"))
        code = archive.read(finder).decode()
        paths = [archive.read(name).decode() for name in archive.namelist() if name.endswith(".pth")]
    names: dict = {}
    exec(code[code.index("MAPPING") :].splitlines()[0], names)
    assert set(names["MAPPING"]) == {"megatron_ksa"} and not any(str(copy) in text for text in paths)


def test_wheel_has_one_package_at_its_top(wheel_names):
    """`kernels` and `data_tools` at the top would meet other projects' packages of these names."""
    top = {name.partition("/")[0] for name in wheel_names}
    (information,) = (name for name in top if name.endswith(".dist-info"))
    assert top == {"megatron_ksa", information}
    assert information.startswith("megatron_ksa-")


@pytest.mark.parametrize("folder", ["megatron_ksa", "kernels", "data_tools"])
def test_wheel_has_every_module(wheel_names, copy, folder):
    inside = "megatron_ksa" if folder == "megatron_ksa" else f"megatron_ksa/{folder}"
    modules = {f"{inside}/{path.relative_to(copy / folder)}" for path in (copy / folder).rglob("*.py")}
    assert f"{inside}/__init__.py" in modules
    assert modules <= set(wheel_names)


@pytest.mark.parametrize("where", ["alone", "in the repository"])
@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_entry_point_that_is_not_installed_says_how(name, where, copy, tmp_path):
    """Without site-packages: beside the repository's own folders the package is found, and torch is what is missing."""
    script = copy / name
    if where == "alone":
        script = Path(shutil.copy(script, tmp_path))
    done = subprocess.run([sys.executable, "-E", "-S", script], cwd=script.parent, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert "is not installed here: run `pip install -e '.[train]'`" in done.stderr


def test_every_example_imports_the_guard_first(copy):
    """`examples/installed.py` is no use behind an import of the package."""
    commands = [path for path in copy.glob("examples/*/*.py") if "import installed" in path.read_text()]
    assert len(commands) > 10
    done = subprocess.run([sys.executable, "-E", "-S", commands[0]], capture_output=True, text=True, cwd=copy)
    assert done.returncode == 2 and done.stderr.startswith("error: megatron_ksa is not installed here: run `pip")
    for command in commands:
        text = command.read_text()
        package = text.find("\nfrom megatron_ksa")
        assert package < 0 or text.index("import installed") < package, command


def fake_python(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def version(major, minor):
    """An interpreter of this version, as far as `-c` can tell; anything else is noted in `calls`."""
    check = f"import sys; sys.version_info = ({major}, {minor}, 4); exec(sys.argv[1])"
    return f'if [ "$1" = -c ]; then exec {sys.executable} -E -S -c "{check}" "$2"; fi; echo "$0 $@" >> "$CALLS"; exit 7'


@pytest.fixture
def make(copy, tmp_path):
    """Runs `make setup` with the interpreters in tmp_path/bin and nothing else on PATH."""
    program = shutil.which("make")
    if program is None:
        pytest.skip("make is not installed")

    def run(*arguments):
        environment = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path), "CALLS": str(tmp_path / "calls")}
        command = [program, "setup", f"VENV={tmp_path / 'venv'}", *arguments]
        return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("broken", [True, False], ids=["with a pyenv shim that does not run", "without others"])
def test_make_with_an_old_python_says_what_it_needs(make, tmp_path, broken):
    fake_python(tmp_path / "bin/python3", version(3, 11))
    if broken:
        fake_python(tmp_path / "bin/python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")
    done = make()
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if " *** " not in line]
    assert len(said) == 1 and said[0].startswith("error: no Python 3.12 or later among: python3.12 ")
    assert "make PYTHON=/path/to/python" in said[0]
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "calls").exists() and not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("place", "arguments"),
    [("bin/python3.13", []), (".pyenv/versions/3.12.1/bin/python", []), ("own/python", ["PYTHON={}"])],
)
def test_make_finds_a_new_enough_python(make, tmp_path, place, arguments):
    fake_python(tmp_path / "bin/python3", version(3, 11))
    fake_python(tmp_path / "bin/python3.12", "exit 127")
    fake_python(tmp_path / place, version(3, 12))
    done = make(*(argument.format(tmp_path / place) for argument in arguments))
    assert (tmp_path / "calls").read_text().strip().endswith(f"{place} -m venv {tmp_path / 'venv'}")
    assert f"setting up {tmp_path / 'venv'} with " in done.stdout
    assert done.returncode == 2, "the interpreter failed to make an environment"
