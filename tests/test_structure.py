"""The package's folders import each other in one direction."""

import ast
import os
from collections import defaultdict
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_ksa"


def modules() -> list[Path]:
    """Every module of the package, through the links to kernels/ and data_tools/."""
    return [
        Path(folder) / name
        for folder, _, names in os.walk(PACKAGE, followlinks=True)
        for name in names
        if name.endswith(".py")
    ]


def imported(path: Path) -> set[str]:
    """Dotted names under megatron_ksa that a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "megatron_ksa":
            names |= {f"megatron_ksa.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.startswith("megatron_ksa.")}


def arrows() -> dict[str, dict[str, str]]:
    """Folder (or top-level module) -> folders that it imports, each with a module that does."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for path in modules():
        relative = path.relative_to(PACKAGE)
        source = relative.parts[0].removesuffix(".py")
        for name in imported(path):
            target = name.split(".")[1]
            # The package's own __init__ hands out names of the folders; no folder imports it back.
            if target != source and source != "__init__":
                found[source][target] = f"{relative} imports {name}"
    return found


def test_no_folder_imports_one_that_imports_it():
    """Five pairs of folders imported each other: a reader could not tell which of two stands below."""
    graph = arrows()

    def path_back(start: str) -> list[str] | None:
        """Imports that lead from `start` back to it."""
        seen, stack = set(), [(start, [])]
        while stack:
            folder, why = stack.pop()
            for target, reason in graph.get(folder, {}).items():
                if target == start:
                    return [*why, reason]
                if target not in seen:
                    seen.add(target)
                    stack.append((target, [*why, reason]))
        return None

    circles = {folder: path for folder in graph if (path := path_back(folder))}
    assert not circles, "\n".join(f"{folder}: {' -> '.join(path)}" for folder, path in circles.items())


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_name_files_that_exist(path):
    """417 imports named paths that only a hook of setuptools knew."""
    for name in imported(path):
        target = PACKAGE.joinpath(*name.split(".")[1:])
        exists = target.is_dir() or target.with_suffix(".py").is_file() or target.parent.with_suffix(".py").is_file()
        assert exists or (target.parent / "__init__.py").is_file(), name
