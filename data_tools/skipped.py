"""What a run leaves out: one line for each document, with its place and the reason, in a file beside the output."""

import json
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO

from megatron_ksa.files import whole_file


class SkipLog:
    """Context manager for the lines of PATH; a file appears only where something is left out and the body ends well.

    Args:
        path: JSONL of {"origin", "reason", "detail"}; that of an earlier run is replaced or removed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reasons: Counter[str] = Counter()
        self.first = ""
        self._files = ExitStack()
        self._stream: IO | None = None

    def __enter__(self) -> "SkipLog":
        return self

    def add(self, origin: str, reason: str, detail: str = "") -> None:
        """A document is left out."""
        self.reasons[reason] += 1
        self.first = self.first or f"{origin}: {reason}{f' ({detail})' if detail else ''}"
        if self._stream is None:
            self._stream = self._files.enter_context(whole_file(self.path))
        self._stream.write(json.dumps({"origin": origin, "reason": reason, "detail": detail}) + "\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        if kind is None and self._stream is None:
            self.path.unlink(missing_ok=True)
        return self._files.__exit__(kind, error, traceback)

    @property
    def why(self) -> str:
        """Such as `2 invalid UTF-8, 1 empty; the first is books.jsonl:7: invalid UTF-8`, "" where all is there."""
        return f"{self._counts}; the first is {self.first}" if self.reasons else ""

    @property
    def _counts(self) -> str:
        return ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.reasons.items()))

    def __str__(self) -> str:
        """Such as `left out: 2 invalid UTF-8, 1 empty; listed in books.skipped.jsonl`."""
        return f"left out: {self._counts}; listed in {self.path}"
