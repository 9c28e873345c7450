"""Answers on disk, one for each record and way of asking, so that nothing paid for is asked twice."""

import json
import sqlite3
from dataclasses import asdict
from pathlib import Path

from megatron_ksa.data_tools.tags.taggers import Answer
from megatron_ksa.errors import UsageError


class AnswerCache:
    """A SQLite file of answers with the tokens each took; what was put is there after the process is killed.

    Args:
        path: the file; made if it does not exist.

    Raises:
        UsageError: a file that is no cache.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connection = sqlite3.connect(path, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT, "
                "prompt_tokens INT, answer_tokens INT)"
            )
        except sqlite3.DatabaseError as error:
            raise UsageError(f"{path}: {error}; delete it to ask again") from None

    def get(self, key: str) -> tuple[Answer, int, int] | None:
        """An answer with its prompt's and its own tokens, or None."""
        row = self._connection.execute(
            "SELECT answer, prompt_tokens, answer_tokens FROM answers WHERE key = ?", (key,)
        ).fetchone()
        return None if row is None else (Answer(**json.loads(row[0])), row[1], row[2])

    def put(self, key: str, answer: Answer, prompt_tokens: int, answer_tokens: int) -> None:
        """Keep an answer."""
        row = (key, json.dumps(asdict(answer)), prompt_tokens, answer_tokens)
        self._connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", row)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()
