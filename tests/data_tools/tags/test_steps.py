"""Steps say what they read and write; messages name commands that exist."""

import re
from pathlib import Path

import pytest

from megatron_ksa.data_tools import tags
from megatron_ksa.data_tools.tags.pipeline import ADOPTING_STEPS, COMMANDS

SOURCES = sorted(Path(tags.__file__).parent.rglob("*.py"))
TOLD = re.compile(r"\brun the (\w+) step|(\w+) step (?:of that folder )?first\b")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_message_sends_to_a_command_that_exists(source):
    """`--method label-graph` without embeddings once said "run the embed step", which there is not."""
    told = {name for pair in TOLD.findall(source.read_text(encoding="utf-8")) for name in pair if name}
    assert told <= set(COMMANDS)


def test_messages_that_send_to_a_command_are_found():
    told = [name for source in SOURCES for pair in TOLD.findall(source.read_text(encoding="utf-8")) for name in pair]
    assert {"tag", "tree", "sample"} <= set(told)


def test_every_file_that_a_step_reads_was_written_by_one_before():
    written: set[str] = set()
    for command in COMMANDS.values():
        for step in command.steps:
            assert set(step.reads) <= written, step.name
            assert not set(step.writes) & written, step.name
            written |= set(step.writes)
    assert all(set(step.writes) <= written for step in ADOPTING_STEPS)
