"""What was done with what: a step is skipped when its settings, inputs and outputs are those of its last run.

`manifest.json` has for each step its settings, the SHA-256 of what it read and wrote, and its counts. A changed
setting changes the hashes of what the step writes, and so redoes the steps that read it, unless it changed nothing in
the files. What was made from files that are others now, and is not made anew, is removed (`remove_stale`).
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_ksa.data_tools.tags.files import write_json
from megatron_ksa.errors import UsageError
from megatron_ksa.files import LIST_BYTES, read_small

VERSION = 1
MANIFEST, DIGESTS = "manifest.json", ".digests.json"


def remove(path: Path) -> None:
    """Remove a file, or a folder with all in it, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


class Manifest:
    """The manifest of a work folder.

    Args:
        folder: the work folder; made if it does not exist.

    Raises:
        UsageError: a manifest of another version, or none that can be read.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--work {folder}: {error.strerror}") from None
        self.folder, self.path = folder, folder / MANIFEST
        # Hashes of files by size and time of change, kept apart so that the manifest's bytes depend on contents only.
        self._digests_path = folder / DIGESTS
        self.steps: dict[str, dict] = self._load(self.path).get("steps", {})
        self._digests: dict[str, list] = self._load(self._digests_path).get("files", {})

    def begin(self) -> None:
        """Leave a sign in the folder that runs write there, before the first of them has written anything else."""
        if not self._digests_path.exists():
            write_json(self._digests_path, {"version": VERSION, "files": self._digests})

    def _load(self, path: Path) -> dict:
        if not path.exists():
            return {}
        try:
            content = json.loads(read_small(path, limit=LIST_BYTES))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}: {error}; delete it to start over") from None
        if not isinstance(content, dict) or content.get("version") != VERSION:
            raise UsageError(f"{path}: written by another version of this tool; choose another --work or delete it")
        return content

    def digest(self, path: Path) -> str | None:
        """SHA-256 of a file, or of the names and hashes of a folder's files; None where there is nothing."""
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            names = "".join(f"{file.relative_to(path)} {self.digest(file)}\n" for file in files)
            return hashlib.sha256(names.encode()).hexdigest()
        try:
            status = path.stat()
        except FileNotFoundError:
            return None
        key, state = str(path.absolute()), [status.st_size, status.st_mtime_ns]
        known = self._digests.get(key)
        if known is None or known[:2] != state:
            with open(path, "rb") as stream:
                known = [*state, hashlib.file_digest(stream, "sha256").hexdigest()]
            self._digests[key] = known
        return known[2]

    def _hashes(self, paths: dict[str, Path]) -> dict[str, str | None]:
        return {name: self.digest(path) for name, path in paths.items()}

    def run(
        self,
        step: str,
        settings: dict,
        inputs: dict[str, Path],
        outputs: list[str],
        action: Callable[[], dict],
        *,
        again: bool = False,
    ) -> bool:
        """Do a step unless its last run stands; returns whether it was done.

        Args:
            settings: everything but the inputs' content that decides what the step writes, as JSON.
            inputs: files or folders read, under names that do not depend on where they lie.
            outputs: files or folders written, named from the work folder.
            action: does the step and returns its counts, as JSON.
            again: do it even if the last run stands.
        """
        before = {"settings": json.loads(json.dumps(settings)), "inputs": self._hashes(inputs)}
        paths = {name: self.folder / name for name in outputs}
        last = self.steps.get(step)
        stands = last is not None and all(last[key] == before[key] for key in before)
        if stands and not again:
            written = self._hashes(paths)
            if None not in written.values() and written == last["outputs"]:
                return False
        counts = action()
        # A file belongs to the step that wrote it last.
        self.steps = {
            name: done for name, done in self.steps.items() if name == step or not paths.keys() & done["outputs"].keys()
        }
        self.steps[step] = before | {"outputs": self._hashes(paths), "counts": counts}
        self._save()
        return True

    def changed_by_others(self, inputs: dict[str, Path]) -> dict[str, str]:
        """Of what a step reads, the files that are not as a step of their folder wrote them, each with that step.

        Args:
            inputs: as `run` takes them; those with a colon in their names, from elsewhere, do not count.
        """
        found: dict[str, str] = {}
        for path in (path for name, path in inputs.items() if ":" not in name):
            steps = self.steps if path.parent == self.folder else Manifest(path.parent).steps
            for step, done in steps.items():
                if path.name in done["outputs"] and done["outputs"][path.name] != self.digest(path):
                    found[str(path)] = step
        return found

    def _save(self) -> None:
        write_json(self._digests_path, {"version": VERSION, "files": self._digests})
        write_json(self.path, {"version": VERSION, "steps": self.steps})

    def remove_stale(self) -> dict[str, str]:
        """Remove what steps wrote from files that are others now.

        Inputs whose name has a colon lie elsewhere; the rest are named from the work folder.

        Returns:
            For each step whose files went, the input that is another now.
        """
        found: dict[str, str] = {}
        while True:
            stale = {
                step: name
                for step, done in self.steps.items()
                for name, digest in done["inputs"].items()
                if ":" not in name and self.digest(self.folder / name) != digest
            }
            if not stale:
                return found
            found |= stale
            for step in stale:
                for name in self.steps.pop(step)["outputs"]:
                    remove(self.folder / name)
            self._save()
