"""Megatron's command line, made longer where the parser is made.

Megatron 0.19.2 parses more than once, and not always with the `extra_args_provider` that its entry points take.
"""

import argparse
from collections.abc import Callable
from functools import wraps

from megatron_ksa.upstream.patches import Patch

Extend = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]


def _extended(add_megatron_arguments: Extend, extend: Extend) -> Extend:
    @wraps(add_megatron_arguments)
    def add_all_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_megatron_arguments(parser)
        for action in parser._actions:
            _escape_percent(action)
        return extend(parser)

    return add_all_arguments


def _escape_percent(action: argparse.Action) -> None:
    """Repair a help text with a bare percent sign: Megatron 0.19.2 has one, and its `--help` dies of it."""
    try:
        (action.help or "") % vars(action)
    except (ValueError, TypeError):
        action.help = action.help.replace("%", "%%")


PATCHES = (
    # `given(extend)`: the function that adds this project's flags to a parser.
    Patch(
        "megatron.training.arguments:add_megatron_arguments",
        _extended,
        why="the fault-tolerance setup parses again without extra_args_provider and refuses this project's flags",
        expects="(parser)",
    ),
)


def patches(extend: Extend) -> tuple[Patch, ...]:
    """The parser with what `extend` adds."""
    return tuple(patch.given(extend) for patch in PATCHES)
