"""All of Megatron's arguments: each works or is refused by name, and one that a new version adds fails here by name."""

import argparse
import re
from pathlib import Path

import pytest
from megatron.training import arguments as megatron_arguments

from megatron_ksa.training.megatron_flags import NEVER, VALUES_DECIDE, WITHOUT_KSA, WORKS

ROOT = Path(__file__).parents[2]
REFUSED = [*NEVER, *WITHOUT_KSA]
PLACES = [WORKS, VALUES_DECIDE, *(group.flags for group in REFUSED)]


def parser() -> argparse.ArgumentParser:
    return megatron_arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


ARGUMENTS = [action.option_strings for action in parser()._actions if "--help" not in action.option_strings]


def test_every_argument_has_one_place():
    """A flag that Megatron adds fails here by its name: look at who reads it, then give it a place in the table."""
    missing = [names[0] for names in ARGUMENTS if not any(set(names) & place for place in PLACES)]
    assert not missing, f"not in megatron_ksa/training/megatron_flags.py: {' '.join(missing)}"
    twice = [names[0] for names in ARGUMENTS if sum(len(set(names) & place) for place in PLACES) > 1]
    assert not twice


def test_the_table_has_nothing_else():
    known = {name for names in ARGUMENTS for name in names}
    assert not {flag for place in PLACES for flag in place} - known
    assert len(ARGUMENTS) == sum(len(place) for place in PLACES)


@pytest.mark.parametrize("group", REFUSED, ids=lambda group: min(group.flags))
def test_reasons_are_one_line_with_a_way_out(group):
    way_out = r": (drop|use|give|requeue)|, and this trainer |instead|is for the"
    assert "\n" not in group.why and re.search(way_out, group.why)


def test_no_job_script_or_example_gives_a_refused_flag():
    """Model files have KSA on; what they give must work with it."""
    refused = {flag for group in REFUSED for flag in group.flags}
    patterns = ("slurm/**/*.args", "slurm/*.sh", "docs/training.md", "docs/conversion.md", "examples/**/*.py")
    files = [file for pattern in patterns for file in ROOT.glob(pattern)]
    assert len(files) > 10
    given = {word for file in files for word in re.findall(r"--[a-z][a-z0-9-]+", file.read_text(encoding="utf-8"))}
    assert given & WORKS
    # The example of a length extension has a flag of its own by this name.
    assert given & refused <= {"--warmup"}
