"""Replacements of Megatron's and torch's parts: what they are checked against, and how they are undone."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ksa.errors import UsageError
from megatron_ksa.platform.process import declared
from megatron_ksa.upstream.patches import ABSENT, Patch, apply, apply_for_good, signature

PACKAGE = Path(__file__).parents[2] / "megatron_ksa"
PATCHES = declared()


class Target:
    """Something to replace."""

    plain = 3

    def method(self, a, b=2, *, c=None):
        return a

    @staticmethod
    def alone(a):
        return a

    def __init__(self, options=Path):
        pass


HERE = f"{__name__}:Target"


def test_signatures_have_no_annotations():
    """Names, kinds and defaults are what a caller depends on; annotations change with every release."""

    def function(a: int, /, b: "str" = "x", *rest: int, c: Path = Path, **more: object) -> None:
        pass

    assert signature(function) == "(a, /, b='x', *rest, c=type, **more)"
    assert signature(3) == "int"


def test_a_patch_is_undone_in_the_reverse_order():
    def one_more(old):
        return lambda self, a, b=2, *, c=None: old(self, a) + 1

    add = Patch(f"{HERE}.method", one_more, "", "(self, a, b=2, *, c=None)")
    with apply([add]), apply([add]):
        assert Target().method(1) == 3
    assert Target().method(1) == 1
    applied = apply([add])
    applied.undo()
    applied.undo()
    assert Target().method(1) == 1


def test_static_methods_inherited_names_and_dictionaries():
    """A restored static method must not become a method, nor an inherited name one of the class itself."""
    static = Patch(f"{HERE}.alone", lambda old: lambda a: 2 * old(a), "", "(a)")
    inherited = Patch(f"{HERE}.__repr__", lambda old: lambda self: "replaced", "", "(self, /)")
    absent = Patch("sys:modules.no_such_module", lambda old: sys, "", ABSENT)
    with apply([static, inherited, absent]):
        assert (Target.alone(2), Target().alone(2), repr(Target())) == (4, 4, "replaced")
        import no_such_module

        assert no_such_module is sys
    assert Target().alone(2) == 2
    assert "__repr__" not in vars(Target) and "no_such_module" not in sys.modules


def test_all_are_checked_before_one_is_applied():
    fits = Patch(f"{HERE}.plain", lambda old: 4, "", "int")
    for other in (f"{HERE}.absent", "no_such_module:name", f"{HERE}.method"):
        with pytest.raises(UsageError):
            apply([fits, Patch(other, lambda old: None, "", "(self)")])
        assert Target.plain == 3


def test_a_failing_patch_leaves_nothing_behind():
    fits = Patch(f"{HERE}.plain", lambda old: 4, "", "int")
    with pytest.raises(ZeroDivisionError):
        apply([fits, Patch(f"{HERE}.alone", lambda old: 1 / 0, "", "(a)")])
    assert Target.plain == 3


def test_patches_of_a_process_are_applied_once(monkeypatch):
    monkeypatch.setattr(Target, "plain", 3)
    more = Patch(f"{HERE}.plain", lambda old: old + 1, "", "int")
    apply_for_good([more])
    apply_for_good([more])
    assert Target.plain == 4


def place(target: str) -> tuple[object, str]:
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    return owner, name


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target)
def test_a_changed_signature_is_one_line_that_names_the_patch(patch, monkeypatch):
    """27 replacements were made without a look at what they replaced: an upgrade would have gone wrong elsewhere."""

    def changed(of_another_version):
        pass

    owner, name = place(patch.target)
    if isinstance(owner, dict):
        monkeypatch.setitem(owner, name, changed)
    else:
        monkeypatch.setattr(owner, name, changed, raising=False)
    with pytest.raises(UsageError) as error:
        apply([patch])
    message = str(error.value)
    assert "\n" not in message
    for part in (patch.target, patch.why, patch.expects, "(of_another_version)"):
        assert part in message
    assert (owner[name] if isinstance(owner, dict) else getattr(owner, name)) is changed


# What a class loses it may inherit.
IN_MODULES = [patch for patch in PATCHES if patch.expects != ABSENT and "." not in patch.target.partition(":")[2]]


@pytest.mark.parametrize("patch", IN_MODULES, ids=lambda patch: patch.target)
def test_a_removed_target_is_one_line_that_names_the_patch(patch, monkeypatch):
    owner, name = place(patch.target)
    monkeypatch.delattr(owner, name)
    with pytest.raises(UsageError, match=f"{patch.target} .* here it is absent"):
        apply([patch])


@pytest.mark.slow
def test_every_patch_fits_what_is_installed():
    """In a process where none is in place."""
    script = (
        "from megatron_ksa.upstream.patches import check; from megatron_ksa.platform.process import declared\n"
        "for patch in declared(): check(patch)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# torch's documented switch: set for a check and put back.
SETTINGS = {"torch.utils.deterministic.fill_uninitialized_memory"}


def replaced(tree: ast.AST) -> list[tuple[int, str]]:
    """Lines that set a name of Megatron or torch, a module's or a class's: by assignment or `setattr`."""
    imported = {
        alias.asname or alias.name.partition(".")[0]: getattr(node, "module", None) or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    found = []
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else []
        targets = [part for target in targets for part in getattr(target, "elts", [target])]
        if isinstance(node, ast.AugAssign):
            targets = [node.target]
        named = [target for target in targets if isinstance(target, ast.Attribute)]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"):
            named = node.args[:1]
        for target in named:
            root = target
            while isinstance(root, ast.Attribute):
                root = root.value
            origin = imported.get(root.id, "") if isinstance(root, ast.Name) else ""
            if origin.partition(".")[0] in ("megatron", "torch") and ast.unparse(target) not in SETTINGS:
                found.append((node.lineno, ast.unparse(target)))
    return found


def test_nothing_is_replaced_elsewhere():
    """Only upstream/ replaces. The test passed over kernels/ and data_tools/, which are links in the package, over
    tools and examples, and over `setattr`."""
    root = PACKAGE.parent
    paths = [root / "pretrain_gpt.py"]
    for folder in ("megatron_ksa", "kernels", "data_tools", "tools", "examples"):
        paths += (root / folder).rglob("*.py")
    found = {
        str(path.relative_to(root)): lines
        for path in paths
        if not path.is_relative_to(PACKAGE / "upstream")
        and (lines := replaced(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.cuda.synchronize = f",
        "from megatron.training import training\nsetattr(training, 'train_step', f)",
        "from megatron.core import utils as u\na, u.x = 1, 2",
        "import torch.distributed as dist\ndel dist.all_gather",
    ],
)
def test_replacements_are_seen(code):
    assert replaced(ast.parse(code))
