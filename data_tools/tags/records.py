"""Raw documents as records of one form, by a schema that is recognised (`schemas.py`) or by fields that flags name."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from megatron_ksa.config.options import option
from megatron_ksa.data_tools.documents import BadDocument, RawDocument, decoded, json_object
from megatron_ksa.data_tools.tags.messages import NO_FIELDS, check_media, messages_of, without_nulls
from megatron_ksa.data_tools.tags.schemas import SYSTEMS, TOOLS, exchange, field, recognised, turns_or_text, with_beside
from megatron_ksa.errors import UsageError

EMPTY, TOO_LARGE = "empty", "too large"
MAX_TAGS = 64
MAX_TAG_CHARACTERS = 100


@dataclass(frozen=True)
class RecordSettings:
    """Which fields of a raw document hold what; recognised schemas need none of it. A name may be a path with dots.

    Raises:
        UsageError: settings that contradict each other.
    """

    text_field: str | None = option(None, "Field with plain text, where it is not text.", flag="--text-field")
    prompt_field: str | None = option(None, "Field with the instruction; with --response-field.", flag="--prompt-field")
    response_field: str | None = option(None, "Field with the response; with --prompt-field.", flag="--response-field")
    messages_field: str | None = option(
        None, "Field with a list of messages, where it is not messages or conversations.", flag="--messages-field"
    )
    system_field: str = option("system", "Field with the system prompt beside the messages.", flag="--system-field")
    tools_field: str = option("tools", "Field with the tools beside the messages.", flag="--tools-field")
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
    """The words of a record, for tagging, embedding and comparing: its text, or what its messages say, in order.

    A tool call says its name and its arguments. Thoughts beside the content are left out.
    """
    if "text" in record:
        return record["text"]
    return "\n\n".join(text for message in record["messages"] if (text := message_text(message)))


def message_text(message: dict) -> str:
    """The words of a message: its content and its tool calls."""
    calls = (call["function"] for call in message.get("tool_calls", ()))
    said = [f"{call['name']} {_as_text(call['arguments'])}" for call in calls]
    return "\n".join(part for part in (message["content"], *said) if part)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _body(fields: dict, settings: RecordSettings) -> dict:
    """The record's `messages` (and `tools`) or `text`, by the fields named or else by the schema recognised."""
    if settings.text_field is not None:
        text = field(fields, settings.text_field)
        if not isinstance(text, str):
            raise BadDocument(NO_FIELDS, f"no text under {settings.text_field!r} (--text-field)")
        return {"text": text}
    check_media(fields)
    if settings.prompt_field is not None:
        found = [turns_or_text(field(fields, name)) for name in (settings.prompt_field, settings.response_field)]
        for name, value in zip((settings.prompt_field, settings.response_field), found, strict=True):
            if not isinstance(value, str | list):
                raise BadDocument(NO_FIELDS, f"no text under {name!r}")
        body = {"messages": exchange(fields, *found)}
    elif settings.messages_field is not None and field(fields, settings.messages_field) is not None:
        body = {"messages": messages_of(field(fields, settings.messages_field))}
    else:
        body = recognised(fields)
    system = next((value for name in (settings.system_field, *SYSTEMS) if (value := field(fields, name))), None)
    tools = next((value for name in (settings.tools_field, *TOOLS) if (value := field(fields, name))), None)
    return with_beside(body, system, tools)


def score(value: Any) -> float | None:
    """A score from 1 to 10 as a float; None for anything else, such as NaN or an integer of 400 digits."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= 10:
        return None
    return float(value)


def _tags(value: Any) -> list[str] | None:
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list):
        return None
    return [tag for tag in value if isinstance(tag, str)]


class _Fields(dict):
    """The fields of a raw document; remembers which were read."""

    def __init__(self, fields: dict) -> None:
        super().__init__(fields)
        self._read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self._read.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return super().__getitem__(name)

    def unread(self) -> list[str]:
        """Names of fields with a value that nothing has read."""
        return [name for name, value in self.items() if name not in self._read and value not in (None, "", [], {})]


def _named(fields: dict, file_source: str, settings: RecordSettings) -> tuple[str, str | int | None]:
    """The source of a raw document and its own id, None where it has none."""
    own_source, given = field(fields, settings.source_field), field(fields, settings.id_field)
    source = own_source if isinstance(own_source, str) and own_source.strip() else file_source
    has_id = isinstance(given, str | int) and not isinstance(given, bool) and str(given).strip()
    return source, given if has_id else None


def own_id(document: RawDocument, file_source: str, settings: RecordSettings) -> str | None:
    """`source/own id` of a document that cannot be used, as far as it has one that can be read and written."""
    if not document.is_json or document.problem is not None or len(document.content) > settings.max_bytes:
        return None
    try:
        source, given = _named(json_object(document.content), file_source, settings)
        name = f"{source}/{given}"
        name.encode("utf-8")
    except (BadDocument, UnicodeEncodeError):
        return None
    return None if given is None else name


def parse_record(
    document: RawDocument, file_source: str, settings: RecordSettings, *, from_table: bool = False
) -> tuple[dict, list[str]]:
    """A record as `records.jsonl` holds it, and the names of the document's fields of which nothing is in it.

    Args:
        file_source: the source of records that name none.
        from_table: it is a row of a table (Parquet, Arrow), whose null fields at any depth are no fields.

    Raises:
        BadDocument: it cannot be used, with the reason.
    """
    if len(document.payload) > settings.max_bytes:
        raise BadDocument(
            TOO_LARGE, f"{len(document.payload):,} bytes, more than --max-record-bytes {settings.max_bytes:,}"
        )
    fields = json_object(document.payload) if document.is_json else {"text": decoded(document.payload)}
    fields = _Fields(without_nulls(fields) if from_table else fields)
    body = _body(fields, settings)
    if not record_text(body).strip():
        raise BadDocument(EMPTY)
    source, given = _named(fields, file_source, settings)
    try:
        digest = hashlib.sha256(json.dumps(body, ensure_ascii=False).encode("utf-8")).hexdigest()[:16]
        record = {
            "id": f"{source}/{digest if given is None else given}",
            "source": source,
            **body,
            "quality": score(field(fields, settings.quality_field)),
            "difficulty": score(field(fields, settings.difficulty_field)),
            "tags": _tags(field(fields, settings.tags_field)),
        }
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can escape half of a surrogate pair, which has no UTF-8.
        raise BadDocument("invalid UTF-8", error.reason) from None
    except ValueError as error:
        # Python reads NaN and Infinity, which are no JSON.
        raise BadDocument("invalid JSON", str(error)) from None
    return record, fields.unread() + _without_use(fields, record, settings)


def _without_use(fields: dict, record: dict, settings: RecordSettings) -> list[str]:
    """Names of fields with scores and tags that are none: a score out of its range, tags that are no text."""
    names = {"quality": settings.quality_field, "difficulty": settings.difficulty_field, "tags": settings.tags_field}
    given = {key: value for key, name in names.items() if (value := field(fields, name)) not in (None, "", [], {})}
    return [
        names[key] for key, value in given.items()
        if record[key] is None or (isinstance(value, list) and len(record[key]) < len(value))
    ]  # fmt: skip


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
        printable = tag if tag.isprintable() else "".join(c if c.isprintable() else " " for c in tag)
        text = " ".join(printable.split())
        if len(text) > MAX_TAG_CHARACTERS:
            dropped.append((text[:MAX_TAG_CHARACTERS], f"{len(text):,} characters, more than {MAX_TAG_CHARACTERS}"))
        elif not any(c.isalnum() for c in text):
            dropped.append((text, "no letter or digit"))
        elif len(kept) == limit:
            dropped.append((text, f"more than {limit} tags"))
        elif text not in kept:
            kept.append(text)
    return kept, dropped
