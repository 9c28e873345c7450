"""What a step is: a name, the settings it takes, the files it reads and writes, and a function that does it.

Each step is the constant `STEP` of its module; `pipeline.py` lists them by command and loops over them.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_ksa.data_tools.tags.engine import Engine
from megatron_ksa.errors import UsageError


@dataclass(frozen=True)
class Context:
    """Where a step works, and with what.

    Args:
        folder: the work folder of the records at hand: the pool's or the target's.
        engine: where records are handled.
        inputs: raw files, for the read step.
        tree: work folder whose tree is copied here, instead of building one.
        target: the target's work folder, or None.
        pool: of a target, the pool's work folder.
        counts: counts of each step's last run in this folder, by its name.
    """

    folder: Path
    engine: Engine = field(default_factory=Engine)
    inputs: tuple[Path, ...] = ()
    tree: Path | None = None
    target: Path | None = None
    pool: Path | None = None
    counts: dict[str, dict] = field(default_factory=dict)

    @property
    def tree_folder(self) -> Path:
        """The work folder whose tree records are put on: the pool's."""
        return self.pool or self.folder

    def counted(self, step: str, name: str) -> int:
        """A count of a step's last run.

        Raises:
            UsageError: it was not run.
        """
        if step not in self.counts:
            raise UsageError(
                f"--work {self.folder}: the {step} step was not run here; data_tools/tags/README.md has the order"
            )
        return self.counts[step][name]

    def with_counts(self, counts: dict[str, dict]) -> "Context":
        """The same with the counts of what was done since."""
        return replace(self, counts=counts)

    def files(self, folder: Path, title: str, *names: str) -> dict[str, Path]:
        """Files of a work folder under the names that a manifest gives them.

        Those of this folder, of the target's below it and of the pool's above it have their path from this folder. A
        name with a colon tells a file from elsewhere, which no step of these folders writes.
        """
        start = {self.folder: "", self.target: "target/", self.pool: "../"}.get(folder, f"{title}:")
        return {f"{start}{name}": folder / name for name in names}


def _nothing(context: Context, *settings: Any) -> dict[str, Path]:
    return {}


def _every_field(context: Context, *settings: Any) -> dict:
    return {name: value for each in settings for name, value in asdict(each).items()}


def _never(context: Context, *settings: Any) -> bool:
    return False


def _always(context: Context, *settings: Any) -> bool:
    return True


def _no_objection(context: Context, *settings: Any) -> None:
    return None


@dataclass(frozen=True)
class Step:
    """One step. Its functions take a `Context` and an object of each class in `settings`.

    Args:
        name: as messages and manifests have it.
        settings: title and config dataclass of each group of its flags.
        reads: files of the work folder.
        writes: files and folders of the work folder.
        run: does it and returns its counts, as JSON.
        also_reads: other inputs, under names as `Context.files` gives them.
        decides: everything but the inputs' content that decides what is written, as JSON.
        check: raises a `UsageError` for a mistake that can be told before any step runs.
        again: do it even if its last run stands.
        wanted: whether the settings ask for it at all.
    """

    name: str
    settings: dict[str, type]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    run: Callable[..., dict]
    also_reads: Callable[..., dict[str, Path]] = _nothing
    decides: Callable[..., dict] = _every_field
    check: Callable[..., object] = _no_objection
    again: Callable[..., bool] = _never
    wanted: Callable[..., bool] = _always
