"""Which flags were given by hand: the parser tells, whatever way they are written."""

import argparse
import functools
from collections.abc import Iterator

# On the parsed arguments: destination -> the flag as it was written, then all names of the argument.
GIVEN = "_given_flags"


def record_given(parser: argparse.ArgumentParser) -> None:
    """Let every argument that the parser has note in the parsed arguments that it was given."""
    for action in parser._actions:
        if action.option_strings:
            action.__class__ = _recording(type(action))


@functools.cache
def _recording(kind: type[argparse.Action]) -> type[argparse.Action]:
    class Recording(kind):
        def __call__(self, parser, namespace, values, option_string=None) -> None:
            given = getattr(namespace, GIVEN, {})
            setattr(namespace, GIVEN, {**given, self.dest: (option_string, *self.option_strings)})
            super().__call__(parser, namespace, values, option_string)

    return Recording


def given_flags(args: argparse.Namespace) -> dict[str, str]:
    """Destination -> flag of the arguments that were given by hand; none for arguments of another origin."""
    return {name: written for name, (written, *_) in getattr(args, GIVEN, {}).items()}


def given_names(args: argparse.Namespace) -> Iterator[tuple[str, frozenset[str]]]:
    """Each flag given by hand as it was written, with every name that its argument has."""
    for written, *names in getattr(args, GIVEN, {}).values():
        yield written, frozenset(names)


def forget_given(args: argparse.Namespace) -> None:
    """Leave in the arguments what Megatron knows, and what checkpoints store."""
    vars(args).pop(GIVEN, None)
