"""Answers on disk, one for each record and way of asking, so that nothing paid for is asked twice."""

import json
import sqlite3
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ksa.errors import UsageError


class Spent(NamedTuple):
    """What the tries for some answers took: tries with a reply, their prompt's tokens and their own."""

    tries: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0


class AnswerCache:
    """A SQLite file of answers and of what every try took; what was put is there after the process is killed.

    Args:
        path: the file; made if it does not exist.

    Raises:
        UsageError: a file that is no cache.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        try:
            self._connection = sqlite3.connect(path, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.execute("CREATE TABLE IF NOT EXISTS answer (key TEXT PRIMARY KEY, value TEXT)")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS spent "
                "(key TEXT PRIMARY KEY, tries INT, prompt_tokens INT, answer_tokens INT)"
            )
            self._connection.execute("CREATE TABLE IF NOT EXISTS taken (name TEXT PRIMARY KEY)")
        except sqlite3.DatabaseError as error:
            raise UsageError(f"{path}: {error}; delete it to ask again") from None

    def _run(self, statement: str, values: tuple) -> sqlite3.Cursor:
        try:
            return self._connection.execute(statement, values)
        except sqlite3.DatabaseError as error:
            # A full disk, or a file damaged since it was opened.
            raise UsageError(f"{self._path}: {error}; answers so far are kept") from None

    def get(self, key: str) -> Any | None:
        """An answer, as JSON, or None."""
        row = self._run("SELECT value FROM answer WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, key: str, value: Any) -> None:
        """Keep an answer."""
        self._run("INSERT OR REPLACE INTO answer VALUES (?, ?)", (key, json.dumps(value)))

    def spend(self, key: str, prompt_tokens: int, answer_tokens: int) -> None:
        """Count a try, whatever its answer is worth."""
        self._run(
            "INSERT INTO spent VALUES (?1, 1, ?2, ?3) ON CONFLICT (key) DO UPDATE SET tries = tries + 1, "
            "prompt_tokens = prompt_tokens + ?2, answer_tokens = answer_tokens + ?3",
            (key, prompt_tokens, answer_tokens),
        )

    def spent_once(self, key: str) -> Spent:
        """`spent` at the first call with a key, nothing at a later one: equal records share what their answer took."""
        self._run("CREATE TEMP TABLE IF NOT EXISTS counted (key TEXT PRIMARY KEY)", ())
        first = self._run("INSERT OR IGNORE INTO counted VALUES (?)", (key,)).rowcount == 1
        return self.spent(key) if first else Spent()

    def spent(self, key: str) -> Spent:
        """What the tries for one answer took."""
        row = self._run("SELECT tries, prompt_tokens, answer_tokens FROM spent WHERE key = ?", (key,)).fetchone()
        return Spent() if row is None else Spent(*row)

    def first_time(self, name: str) -> bool:
        """Whether this is the first call with the name, in any run."""
        return self._run("INSERT OR IGNORE INTO taken VALUES (?)", (name,)).rowcount == 1

    def close(self) -> None:
        """Close the file."""
        self._connection.close()
