"""Megatron's own refusals as one line: its checks are assertions, some without a word, that name no flag."""

import argparse
import ast
import linecache
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

from megatron.training import arguments as megatron_arguments

from megatron_ksa.errors import UsageError

MEGATRON = (os.path.join("megatron", "core", ""), os.path.join("megatron", "training", ""))
# What Megatron raises where it does not accept flags, a file or a checkpoint; a package or a path that is not there.
REFUSALS = (
    AssertionError, ValueError, NotImplementedError, ImportError, FileNotFoundError, FileExistsError, PermissionError,
    NotADirectoryError, IsADirectoryError,
)  # fmt: skip


# Words of a refusal, and the way out.
WAYS_OUT = {
    "OptimizerParamScheduler": "--override-opt-param-scheduler takes the schedule of the flags (--lr, --train-iters, "
    "--global-batch-size and the like), --use-checkpoint-opt-param-scheduler that of the checkpoint",
    "Could not find parameter group": "give the checkpoint's --lr and --min-lr, or --no-load-optim to begin with a new "
    "optimizer",
    "When bias_activation_fusion is True": "--no-bias-gelu-fusion takes the bias apart",
}


class Started(Protocol):
    """Whether training has begun."""

    started: bool


@contextmanager
def megatron_refusals(args: argparse.Namespace, kinds: tuple[type[Exception], ...] = REFUSALS) -> Iterator[None]:
    """Turn what Megatron raises in the body into a `UsageError` with its text, its condition and the flags in it.

    Args:
        args: the values of the flags.
        kinds: of exceptions that are refusals there.

    Raises:
        UsageError: an exception of these kinds, raised by code of Megatron or below it.
    """
    try:
        yield
    except Exception as error:
        frame = _megatrons(error.__traceback__)
        # Some of Megatron's checks raise Exception itself.
        refusal = isinstance(error, kinds) or type(error) is Exception
        if isinstance(error, UsageError) or frame is None or not refusal:
            raise
        raise UsageError(_line(error, frame, args)) from error


@contextmanager
def set_up_refusals(args: argparse.Namespace, step: Started) -> Iterator[None]:
    """`megatron_refusals` for as long as no step has run: then an assertion is about flags, files and checkpoints.

    Args:
        step: what the trainer calls for every micro-batch.
    """
    try:
        with megatron_refusals(args):
            yield
    except UsageError as error:
        if step.started and error.__cause__ is not None:
            raise error.__cause__ from None
        raise


def _megatrons(trace: TracebackType | None) -> traceback.FrameSummary | None:
    """The innermost frame of Megatron or of this project, where it is Megatron's."""
    for frame in reversed(traceback.extract_tb(trace)):
        if any(part in frame.filename for part in MEGATRON):
            return frame
        if "megatron_ksa" in frame.filename:
            return None
    return None


def _line(error: Exception, frame: traceback.FrameSummary, args: argparse.Namespace) -> str:
    # Where a library below Megatron raises, the condition around the call is not what was broken.
    below = traceback.extract_tb(error.__traceback__)[-1] != frame
    condition = None if below else _condition(frame)
    flags = _flags()
    named = dict.fromkeys(
        node.attr
        for node in (ast.walk(condition) if condition is not None else ())
        if isinstance(node, ast.Attribute) and node.attr in flags and hasattr(args, node.attr)
    )
    values = ", ".join(f"{flags[name]} {_value(getattr(args, name))}" for name in named)
    text = " ".join(str(error).split())
    if not text and condition is not None:
        text = f"{ast.unparse(condition)} must hold"
    place = frame.filename[frame.filename.rindex(os.path.join("megatron", "")) :]
    said = f"Megatron does not accept {values or 'this'}: {text or type(error).__name__} ({place}:{frame.lineno})"
    return "; ".join([said, *(way_out for words, way_out in WAYS_OUT.items() if words in text)])


def _value(value: object) -> str:
    return "(not given)" if value is None else str(value)


def _condition(frame: traceback.FrameSummary) -> ast.expr | None:
    """The condition of the assertion, or of the `if` around the `raise`, at a frame's line."""
    source = "".join(linecache.getlines(frame.filename))
    found = None
    for node in ast.walk(ast.parse(source)) if source else ():
        if isinstance(node, ast.Assert | ast.If) and node.lineno <= (frame.lineno or 0) <= (node.end_lineno or 0):
            # Nested ones come later in the walk.
            found = node.test
    return found


def _flags() -> dict[str, str]:
    """Destination -> flag of every argument."""
    parser = megatron_arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return {action.dest: action.option_strings[0] for action in parser._actions if action.option_strings}
