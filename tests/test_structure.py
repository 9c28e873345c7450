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


def circles(graph: dict[str, dict[str, str]]) -> list[str]:
    """For each node of a graph (node -> nodes that it points at, each with a reason), a way that leads back to it."""

    def path_back(start: str) -> list[str] | None:
        seen, stack = set(), [(start, [])]
        while stack:
            node, why = stack.pop()
            for target, reason in graph.get(node, {}).items():
                if target == start:
                    return [*why, reason]
                if target not in seen:
                    seen.add(target)
                    stack.append((target, [*why, reason]))
        return None

    return [f"{node}: {' -> '.join(path)}" for node in graph if (path := path_back(node))]


def test_no_folder_imports_one_that_imports_it():
    """Five pairs of folders imported each other: a reader could not tell which of two stands below."""
    found = circles(arrows())
    assert not found, "\n".join(found)


def test_no_module_imports_one_that_imports_it():
    """The readers' module imported Parquet's inside a function, which imported the readers' document types."""
    names = {path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", "."): path for path in modules()}
    graph = {
        name: {target: f"{name} imports {target}" for target in imported(path) if target in names and target != name}
        for name, path in names.items()
    }
    found = circles(graph)
    assert not found, "\n".join(found)


def test_the_folder_of_replacements_does_not_import_its_part_for_the_cpu():
    """upstream/ imported upstream/cpu/, whose modules import it: what puts both in place stands above them."""
    above = [
        f"{path.name} imports {name}"
        for path in (PACKAGE / "upstream").glob("*.py")
        for name in imported(path)
        if name.startswith("megatron_ksa.upstream.cpu")
    ]
    assert not above, above


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_name_files_that_exist(path):
    """417 imports named paths that only a hook of setuptools knew."""
    for name in imported(path):
        target = PACKAGE.joinpath(*name.split(".")[1:])
        exists = target.is_dir() or target.with_suffix(".py").is_file() or target.parent.with_suffix(".py").is_file()
        assert exists or (target.parent / "__init__.py").is_file(), name
