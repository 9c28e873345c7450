"""What a run reads and what it writes lie apart: no file of the user's is replaced, and no output is read as data."""

import re
from collections.abc import Iterable
from pathlib import Path

from megatron_ksa.data_tools.tags.manifest import DIGESTS, MANIFEST
from megatron_ksa.data_tools.tags.pipeline import ADOPTING_STEPS, COMMANDS, TARGET, UNFINISHED
from megatron_ksa.errors import UsageError


def places(work: Path) -> list[Path]:
    """The files and folders that steps write into a work folder and into the target's below it."""
    steps = [step for command in COMMANDS.values() for step in (*command.steps, *command.target_steps)]
    names = sorted({name for step in (*steps, *ADOPTING_STEPS) for name in step.writes} | {MANIFEST, UNFINISHED})
    return [folder / name for folder in (work, work / TARGET) for name in names]


def check_folders(work: Path, named: dict[str, list[str]]) -> None:
    """Check that the work folder lies in no folder that is read: the next run would read what this one wrote.

    Args:
        named: files and folders that each flag names.

    Raises:
        UsageError: it does.
    """
    for flag, names in named.items():
        for name in names:
            folder = Path(name)
            if folder.is_dir() and work.resolve().is_relative_to(folder.resolve()):
                raise UsageError(f"--work {work}: lies in {flag} {name}, so that its files would be read as data")


def check_files(work: Path, read: dict[str, Iterable[Path]], batch_out: str | None = None) -> None:
    """Check that nothing that is read would be replaced.

    Args:
        work: the work folder.
        read: files that each flag names.
        batch_out: file of `--batch-out`, beside which others appear with a number or `-target` in their names.

    Raises:
        UsageError: something would.
    """
    written = {path.resolve(): path for path in places(work)}
    batch = None if batch_out is None else Path(batch_out).resolve()
    if batch is not None and any(place in written for place in (batch, *batch.parents)):
        raise UsageError(f"--batch-out {batch_out}: --work {work} writes a file of its own there; name another")
    for flag, files in read.items():
        for file in files:
            resolved = file.resolve()
            place = next((each for each in (resolved, *resolved.parents) if each in written), None)
            if place is not None:
                raise UsageError(f"{flag} {file}: a run writes its own {written[place]}; name another --work folder")
            if batch is not None and resolved.parent == batch.parent:
                pattern = re.escape(batch.stem) + r"(-target)?(-\d+)?" + re.escape(batch.suffix)
                if re.fullmatch(pattern, resolved.name):
                    raise UsageError(f"--batch-out {batch_out} would replace {flag} {file}; name another file")


def check_unused(work: Path) -> None:
    """Check that a folder without a run in it has no file under a name that a step writes.

    Raises:
        UsageError: it has.
    """
    if any((work / sign).exists() for sign in (MANIFEST, DIGESTS, UNFINISHED)):
        return
    taken = next((path for path in places(work) if path.exists()), None)
    if taken is not None:
        raise UsageError(
            f"--work {work}: {taken} is there, and no run wrote it; name another work folder, or move the file"
        )
