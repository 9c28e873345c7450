"""Megatron's parser reads the sources of its dataclasses for help texts: once a process is enough for tests.

Reading took 0.7 s of the 1.4 s of a training run of three iterations, which builds the parser twice.
"""

import functools
import sys

MODULE = "megatron.training.argument_utils"


def read_docstrings_once() -> None:
    """Keep what the parser has read, where Megatron's parser is imported."""
    if MODULE not in sys.modules:
        return
    factory = sys.modules[MODULE].ArgumentGroupFactory
    original = factory._get_field_docstrings
    if getattr(factory, "reads_once", False):
        return

    @functools.cache
    def read(source: type) -> dict[str, str]:
        return original(object.__new__(factory), source)

    factory._get_field_docstrings, factory.reads_once = (lambda _, source: read(source)), True
