"""Modules of an example's folder, which other examples have under the same names."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


def example_modules(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *names: str, others: tuple[str, ...] = ()
) -> Iterator[tuple[ModuleType, ...]]:
    """For a fixture: the modules, imported anew and forgotten afterwards.

    Args:
        others: modules of the folder that those import.
    """
    for name in (*names, *others):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(folder))
    yield tuple(importlib.import_module(name) for name in names)
    for name in (*names, *others):
        sys.modules.pop(name, None)
