"""Which compute-sanitizer is taken, and what is said where there is none."""

import pytest

from megatron_ksa.errors import UsageError
from megatron_ksa.kernels.benchmarks import sanitize


def test_program_of_the_wheel_is_found(tmp_path, monkeypatch):
    program = tmp_path / "nvidia" / "cu13" / "compute-sanitizer" / "compute-sanitizer"
    program.parent.mkdir(parents=True)
    program.touch()
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: None)
    folder = type("Spec", (), {"submodule_search_locations": [str(tmp_path / "nvidia")]})
    monkeypatch.setattr(sanitize.importlib.util, "find_spec", lambda name: folder)
    assert sanitize.find_sanitizer(None) == program
    assert sanitize.find_sanitizer(program) == program


def test_absent_program_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: None)
    monkeypatch.setattr(sanitize.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install nvidia-cuda-sanitizer-api"):
        sanitize.find_sanitizer(None)
    with pytest.raises(UsageError, match="no such file"):
        sanitize.find_sanitizer(tmp_path / "absent")
