"""Questions with documents and answers from a user's file, for question answering among distractors."""

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_ksa.errors import UsageError
from megatron_ksa.files import read_small

MAX_BYTES = 500_000_000


@dataclass(frozen=True)
class Question:
    """A question, the documents that have its answer, and the answers that count."""

    text: str
    documents: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Questions:
    """The questions of a file, and all their documents, each once: a question's documents distract from the others'."""

    questions: tuple[Question, ...]
    documents: tuple[str, ...]


def _texts(value: object) -> tuple[str, ...]:
    """A string, or a list of strings; nothing for anything else or an empty one."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        return ()
    return tuple(text.strip() for text in texts)


def _question(record: object, name: str) -> Question:
    if not isinstance(record, dict):
        raise UsageError(f"{name} is no object with question, context and answers")
    fields = {key: _texts(record.get(key)) for key in ("question", "context", "answers")}
    for key, texts in fields.items():
        if not texts:
            raise UsageError(f"{name}: {key} is {record.get(key)!r:.60}, a text or a list of texts is needed")
        try:
            "".join(texts).encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(f"{name}: {key} is no UTF-8 text: {error.reason}") from None
    return Question(fields["question"][0], fields["context"], fields["answers"])


def read_questions(path: Path, flag: str = "--questions") -> Questions:
    """Read a JSON list, or a `.jsonl` file with a record a line, of {"question", "context", "answers"}.

    Args:
        path: `context` and `answers` are a text or a list of texts.

    Raises:
        UsageError: a file that cannot be read, is no such list, is empty, or has a record that lacks something.
    """
    content, name = read_small(path, flag, MAX_BYTES), f"{flag} {path}"
    # Not splitlines: a text may hold U+2028 and other characters that end lines elsewhere.
    lines = [(number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]
    place, found = "", []
    try:
        if path.suffix == ".jsonl":
            for number, line in lines:
                place = f", line {number}"
                found.append((f"{name}{place}", json.loads(line)))
        else:
            records = json.loads(content)
            if not isinstance(records, list):
                raise UsageError(f"{name} is no JSON list of questions")
            found = [(f"{name}, record {number}", record) for number, record in enumerate(records, start=1)]
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name}{place} is not JSON: {error}") from None
    if not found:
        raise UsageError(f"{name} has no questions")
    questions = tuple(_question(record, where) for where, record in found)
    return Questions(questions, tuple(dict.fromkeys(text for question in questions for text in question.documents)))
