"""Instances as records of one form, whatever their schema: Alpaca, ShareGPT, messages, text, or fields by flag."""

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from megatron_ksa.config.options import option
from megatron_ksa.data_tools.readers import BadDocument, RawDocument, decoded, json_object
from megatron_ksa.errors import UsageError

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
    "function_call": "assistant",
}  # fmt: skip
NO_FIELDS, EMPTY, TOO_LARGE = "no recognised fields", "empty", "too large"
MAX_TAGS = 64
MAX_TAG_CHARACTERS = 100


@dataclass(frozen=True)
class RecordSettings:
    """Which fields of an input record hold what; recognised schemas need none of it.

    Raises:
        UsageError: settings that contradict each other.
    """

    text_field: str | None = option(None, "Field with plain text, where it is not text.", flag="--text-field")
    prompt_field: str | None = option(None, "Field with the instruction; with --response-field.", flag="--prompt-field")
    response_field: str | None = option(None, "Field with the response; with --prompt-field.", flag="--response-field")
    messages_field: str | None = option(
        None, "Field with a list of messages, where it is not messages or conversations.", flag="--messages-field"
    )
    id_field: str = option("id", "Field with the record's id.", flag="--id-field")
    source_field: str = option(
        "source", "Field with the record's source; the file's name where it is absent.", flag="--source-field"
    )
    quality_field: str = option("quality", "Field with a quality score, 1 to 10.", flag="--quality-field")
    difficulty_field: str = option("difficulty", "Field with a difficulty score, 1 to 10.", flag="--difficulty-field")
    tags_field: str = option("tags", "Field with tags: a list, or text with commas.", flag="--tags-field")
    max_bytes: int = option(10_000_000, "Larger records are left out, bytes of JSON.", flag="--max-record-bytes")

    def __post_init__(self) -> None:
        if (self.prompt_field is None) != (self.response_field is None):
            raise UsageError("--prompt-field and --response-field go together")
        named = [self.text_field, self.prompt_field, self.messages_field]
        if sum(name is not None for name in named) > 1:
            raise UsageError("name one of --text-field, --prompt-field (with --response-field) and --messages-field")
        if self.max_bytes < 1:
            raise UsageError(f"--max-record-bytes {self.max_bytes}: at least 1")


def record_text(record: dict) -> str:
    """The words of a record, for tagging, embedding and comparing: its text, or its messages' contents in order."""
    if "text" in record:
        return record["text"]
    return "\n\n".join(message["content"] for message in record["messages"])


def _content(value: Any) -> str:
    """Text of a message's content: a string, or the text parts of a list of parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        texts = [part["text"] for part in value if isinstance(part, dict) and isinstance(part.get("text"), str)]
        if texts:
            return "\n".join(texts)
    if value is None:
        return ""
    raise BadDocument(NO_FIELDS, f"a message's content is a {type(value).__name__}")


def _messages(value: Any) -> list[dict]:
    if not isinstance(value, list):
        raise BadDocument(NO_FIELDS, f"messages are a {type(value).__name__} where a list is needed")
    messages = []
    for message in value:
        if not isinstance(message, dict):
            raise BadDocument(NO_FIELDS, f"a message is a {type(message).__name__}")
        role = message.get("role", message.get("from"))
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise BadDocument(NO_FIELDS, f"a message's role is {str(role)[:40]!r}, none of {', '.join(ROLES)}")
        content = _content(message.get("content", message.get("value")))
        if content.strip():
            messages.append({"role": ROLES[role.lower()], "content": content})
    return messages


def _turns(prompt: Any, response: Any, system: Any = None, extra: Any = None) -> list[dict]:
    """Messages of a single exchange; `extra` is Alpaca's input."""
    parts = [part for part in (prompt, extra) if isinstance(part, str) and part.strip()]
    turns = [("system", system), ("user", "\n\n".join(parts)), ("assistant", response)]
    return [{"role": role, "content": text} for role, text in turns if isinstance(text, str) and text.strip()]


def _body(fields: dict, settings: RecordSettings) -> dict:
    """The record's `messages` or `text`, by the fields named or else by the schema recognised."""
    if settings.text_field is not None:
        if not isinstance(fields.get(settings.text_field), str):
            raise BadDocument(NO_FIELDS, f"no text under {settings.text_field!r} (--text-field)")
        return {"text": fields[settings.text_field]}
    if settings.prompt_field is not None:
        names = (settings.prompt_field, settings.response_field)
        for name in names:
            if not isinstance(fields.get(name), str):
                raise BadDocument(NO_FIELDS, f"no text under {name!r}")
        return {"messages": _turns(*(fields[name] for name in names))}
    for name in (settings.messages_field,) if settings.messages_field else ("messages", "conversations"):
        if name in fields:
            return {"messages": _messages(fields[name])}
    if isinstance(fields.get("instruction"), str) and isinstance(fields.get("output"), str):
        return {"messages": _turns(fields["instruction"], fields["output"], fields.get("system"), fields.get("input"))}
    if settings.messages_field is None and isinstance(fields.get("text"), str):
        return {"text": fields["text"]}
    raise BadDocument(NO_FIELDS, f"its fields: {', '.join(map(repr, fields))[:200] or 'none'}")


def score(value: Any) -> float | None:
    """A score from 1 to 10 as a float; None for anything else."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not 1 <= value <= 10
    ):
        return None
    return float(value)


def _tags(value: Any) -> list[str] | None:
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list):
        return None
    return [tag for tag in value if isinstance(tag, str)]


def parse_record(document: RawDocument, file_source: str, settings: RecordSettings) -> dict:
    """A record as `records.jsonl` holds it.

    Args:
        file_source: the source of records that name none.

    Raises:
        BadDocument: it cannot be used, with the reason.
    """
    if len(document.payload) > settings.max_bytes:
        raise BadDocument(
            TOO_LARGE, f"{len(document.payload):,} bytes, more than --max-record-bytes {settings.max_bytes:,}"
        )
    fields = json_object(document.payload) if document.is_json else {"text": decoded(document.payload)}
    body = _body(fields, settings)
    if not record_text(body).strip():
        raise BadDocument(EMPTY)
    own_source, own_id = fields.get(settings.source_field), fields.get(settings.id_field)
    source = own_source if isinstance(own_source, str) and own_source.strip() else file_source
    has_id = isinstance(own_id, str | int) and not isinstance(own_id, bool) and str(own_id).strip()
    try:
        digest = hashlib.sha256(json.dumps(body, ensure_ascii=False).encode("utf-8")).hexdigest()[:16]
        record = {
            "id": f"{source}/{own_id if has_id else digest}",
            "source": source,
            **body,
            "quality": score(fields.get(settings.quality_field)),
            "difficulty": score(fields.get(settings.difficulty_field)),
            "tags": _tags(fields.get(settings.tags_field)),
        }
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can escape half of a surrogate pair, which has no UTF-8.
        raise BadDocument("invalid UTF-8", error.reason) from None
    return record


def clean_tags(tags: list, limit: int = MAX_TAGS) -> tuple[list[str], list[tuple[str, str]]]:
    """Tags that can be used, in order, and those that cannot with why.

    Args:
        tags: list of anything, data rather than instructions: only short text is taken.
        limit: tags of one instance.
    """
    kept: list[str] = []
    dropped: list[tuple[str, str]] = []
    for tag in tags:
        if not isinstance(tag, str):
            dropped.append((str(tag)[:MAX_TAG_CHARACTERS], "not text"))
            continue
        text = " ".join("".join(c if c.isprintable() else " " for c in tag).split())
        if len(text) > MAX_TAG_CHARACTERS:
            dropped.append((text[:MAX_TAG_CHARACTERS], f"{len(text):,} characters, more than {MAX_TAG_CHARACTERS}"))
        elif not any(c.isalnum() for c in text):
            dropped.append((text, "no letter or digit"))
        elif len(kept) == limit:
            dropped.append((text, f"more than {limit} tags"))
        elif text not in kept:
            kept.append(text)
    return kept, dropped
