"""Which compute-sanitizer is taken, and what is said where there is none."""

import sys

import pytest

from megatron_ksa.errors import UsageError
from megatron_ksa.kernels.benchmarks import sanitize


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder on Python's path with NVIDIA's namespace package, and an empty PATH."""
    folder = tmp_path / "site-packages"
    (folder / "nvidia").mkdir(parents=True)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "path", [str(folder)])
    for name in [name for name in sys.modules if name.partition(".")[0] == "nvidia"]:
        monkeypatch.delitem(sys.modules, name)
    return folder


def program(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o755)
    return path


def test_the_program_given_comes_before_path_and_path_before_the_wheel(tmp_path, wheels):
    wheel = program(wheels / "nvidia" / "cu13" / "compute-sanitizer" / "compute-sanitizer")
    assert sanitize.find_sanitizer(None) == wheel
    on_path = program(tmp_path / "bin" / "compute-sanitizer")
    assert sanitize.find_sanitizer(None) == on_path
    assert sanitize.find_sanitizer(wheel) == wheel


def test_absent_program_says_how_to_get_it(tmp_path, wheels):
    with pytest.raises(UsageError, match="pip install nvidia-cuda-sanitizer-api"):
        sanitize.find_sanitizer(None)
    with pytest.raises(UsageError, match="no such file"):
        sanitize.find_sanitizer(tmp_path / "absent")
