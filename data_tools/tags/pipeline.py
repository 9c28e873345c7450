"""The steps from raw data to a blend and its report, each skipped when its last run stands (`manifest.py`)."""

import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_ksa.data_tools.tags import (
    canonicalise,
    decontaminate,
    duplicates,
    export,
    ground,
    naming,
    read,
    report,
    selection,
    tag,
    tree,
    write,
)
from megatron_ksa.data_tools.tags.manifest import MANIFEST, Manifest, remove
from megatron_ksa.data_tools.tags.step import Context, Step
from megatron_ksa.errors import UsageError

TARGET = "target"
# Of counts by name, how many names a line has, the largest first, and how many characters of each.
NAMES, NAME = 8, 60
# In the work folder while a run is under way: one that was killed leaves it.
UNFINISHED = "UNFINISHED.txt"
_UNFINISHED_TEXT = (
    "A run began here and has not ended: files may be older than those they are made from. Run the command again.\n"
)


@dataclass(frozen=True)
class Command:
    """A command of `tools/preprocess_tags.py`.

    Args:
        help: one line.
        steps: what it does to the pool, in order.
        target_steps: what it then does to the target.
    """

    help: str
    steps: tuple[Step, ...]
    target_steps: tuple[Step, ...] = ()


COMMANDS = {
    "tag": Command("read the input and tag every record", (read.STEP, tag.STEP), (read.STEP, tag.STEP)),
    "tree": Command(
        "leave out near-duplicates, join tags into a tree, put the records on it",
        (duplicates.STEP, canonicalise.STEP, tree.STEP, naming.STEP, ground.STEP), (duplicates.STEP, ground.STEP),
    ),
    "sample": Command(
        "leave out what holds evaluation data, choose what covers the tree best within a budget, aligned to the target",
        (decontaminate.STEP, selection.STEP),
    ),
    "export": Command("the chosen records as data for any trainer: --export jsonl or parquet", (export.STEP,)),
    "write": Command(
        "write the selection as datasets and a blend file that pretrain_gpt.py --data-args-path reads", (write.STEP,)
    ),
    "report": Command("a page, a picture and a summary of the selection", (report.STEP,)),
}  # fmt: skip
# What `tag --batch-out` does.
BATCH_STEPS = (read.STEP, tag.BATCH_STEP)
# What `tree` does with the tree of another work folder.
ADOPTING_STEPS = (duplicates.STEP, tree.ADOPT, naming.STEP, ground.STEP)


class Pipeline:
    """Runs steps in one work folder.

    Args:
        context: the folder, and what steps work with.
        settings: an object of every class that the steps take.
        tell: takes one line for every step.
    """

    def __init__(
        self, context: Context, settings: dict[type, Any], tell: Callable[[str], None] = print
    ) -> None:  # fmt: skip
        self.context, self.settings, self.tell = context, settings, tell
        self.manifest = Manifest(context.folder)

    def _arguments(self, step: Step) -> tuple:
        counts = {name: done["counts"] for name, done in self.manifest.steps.items()}
        return self.context.with_counts(counts), *(self.settings[kind] for kind in step.settings.values())

    def check(self, steps: Iterable[Step]) -> None:
        """Tell mistakes before anything runs.

        Raises:
            UsageError: the first.
        """
        for step in steps:
            arguments = self._arguments(step)
            if step.wanted(*arguments):
                step.check(*arguments)

    def run(self, steps: Iterable[Step]) -> None:
        """Do the steps that do not stand, in order, and tell what came of each."""
        for step in steps:
            arguments = self._arguments(step)
            if not step.wanted(*arguments):
                continue
            inputs = {name: self.context.folder / name for name in step.reads} | step.also_reads(*arguments)
            with _disk_errors(step, self.context.folder), self._damage_told(step, inputs):
                done = self.manifest.run(
                    step.name, step.decides(*arguments), inputs, list(step.writes),
                    partial(self._do, step, arguments), again=step.again(*arguments),
                )  # fmt: skip
            counts = self.manifest.steps[step.name]["counts"]
            self.tell(f"{step.name}: {'' if done else 'stands; '}{_sentence(counts)}")

    @contextmanager
    def _damage_told(self, step: Step, inputs: dict[str, Path]) -> Iterator[None]:
        """What a step makes of a file that was cut or edited by hand is one line, whatever it is."""
        try:
            yield
        except (UsageError, OSError, sqlite3.Error):
            raise
        except Exception as error:
            changed = self.manifest.changed_by_others(inputs)
            if not changed:
                raise
            path, writer = next(iter(changed.items()))
            raise UsageError(
                f"{step.name}: {path} is not as the {writer} step wrote it, and cannot be used "
                f"({type(error).__name__}: {str(error)[:200]}); delete it and run that step again"
            ) from error

    def end(self) -> None:
        """Take back the mark of a run that is under way."""
        self._mark.unlink(missing_ok=True)

    @property
    def _mark(self) -> Path:
        return (self.context.pool or self.context.folder) / UNFINISHED

    def _do(self, step: Step, arguments: tuple) -> dict:
        self.manifest.begin()
        self._mark.write_text(_UNFINISHED_TEXT, encoding="utf-8")
        return step.run(*arguments)


@contextmanager
def _disk_errors(step: Step, folder: Path) -> Iterator[None]:
    """A full disk, or a file that cannot be read or written, is one line."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        place, reason = getattr(error, "filename", None) or folder, getattr(error, "strerror", None) or error
        raise UsageError(f"{step.name}: {place}: {reason}; nothing half-written is kept, run it again") from None


def forget_target(folder: Path) -> bool:
    """Remove what steps wrote for a target that is given no more; answers of an endpoint stay.

    Returns:
        Whether there was one.
    """
    if not (folder / MANIFEST).exists():
        return False
    for done in Manifest(folder).steps.values():
        for name in done["outputs"]:
            remove(folder / name)
    (folder / MANIFEST).unlink()
    return True


def finish(pipelines: list[Pipeline]) -> None:
    """End a run, whether it went well or not: what is older than what it was made from goes, with a line each."""
    try:
        found = True
        while found:
            found = False
            for pipeline in pipelines:
                for step, name in pipeline.manifest.remove_stale().items():
                    found = True
                    pipeline.tell(f"{step}: what it wrote is removed, since {name} is another now; run it again")
    except OSError as error:
        # The mark stays: what is left may not fit together.
        pipelines[0].tell(f"what is older than its input could not be removed ({error.strerror or error})")
        return
    for pipeline in pipelines:
        pipeline.end()


def _sentence(counts: dict) -> str:
    """Counts in one line, such as `1,000 records; 3 rejected; reasons: 2 empty, 1 invalid JSON`."""
    parts = []
    for name, value in sorted(counts.items(), key=lambda item: (isinstance(item[1], dict), item[0])):
        words = name.replace("_", " ")
        if isinstance(value, dict):
            found = sorted(((-each, key) for key, each in value.items() if each))
            if found:
                inner = ", ".join(f"{-each:,} {key[:NAME]}" for each, key in found[:NAMES])
                more = f" and {len(found) - NAMES:,} more" if len(found) > NAMES else ""
                parts.append(f"{words}: {inner}{more}")
        elif isinstance(value, list):
            parts.append(f"{words}: {' '.join(f'{each:,}' for each in value)}")
        else:
            parts.append(f"{value:,} {words}")
    return "; ".join(parts)
