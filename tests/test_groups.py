"""Tests that start ranks, Slurm or forks run in one worker."""

import re

from groups import FORKS, GROUPS, SLURM, TESTS, WORLD

STARTS_RANKS = re.compile(
    r"from trainer import .*\blaunch\b|from processes import|from two_nodes import|ranks=\d|"
    r"[\"-]m?[\" ]*torch\.distributed\.run"
)


def test_every_module_that_starts_ranks_is_in_the_group():
    """A module that is not would start its ranks beside another's."""
    modules = {path.relative_to(TESTS).as_posix(): path.read_text() for path in TESTS.rglob("test_*.py")}
    assert set(modules) >= WORLD | SLURM
    starts = {name for name, text in modules.items() if STARTS_RANKS.search(text)} - {"test_groups.py"}
    assert len(starts) > 10 and starts <= WORLD | SLURM, starts - WORLD


def test_every_module_with_forks_is_in_a_group():
    """A module that is not would have Megatron imported for its forks in one more worker."""
    # `command` is a fixture of tests/huggingface.
    uses = re.compile(r"from warm import|import warm\b|def test_\w+\([^)]*\bcommand\b")
    modules = {path.relative_to(TESTS).as_posix(): path.read_text() for path in TESTS.rglob("test_*.py")}
    assert {name for name, text in modules.items() if uses.search(text)} - WORLD - {"test_groups.py"} == FORKS
    assert len(frozenset().union(*GROUPS.values())) == sum(map(len, GROUPS.values()))


def test_every_module_has_a_name_of_its_own():
    """Two modules of one name in two folders cannot be collected together: the whole suite stopped at three of them."""
    names = sorted(path.name for path in TESTS.rglob("test_*.py"))
    assert len(names) > 100
    assert [name for name, after in zip(names, names[1:], strict=False) if name == after] == []
