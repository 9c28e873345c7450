"""A document as it was read, its text or JSON object, and why one cannot be read."""

import codecs
import json
from dataclasses import dataclass

# Reasons that more than one reader gives; what is skipped is counted by reason.
TOO_LARGE, INVALID_UTF8, INVALID_JSON = "too large", "invalid UTF-8", "invalid JSON"


class BadDocument(Exception):
    """A document that cannot be read: a reason that can be counted, and what is the matter with this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class RawDocument:
    """One document as read: undecoded, so that decoding and its errors belong to the workers.

    Args:
        origin: `file:line` of a JSONL record, `file:number` of an array's element or a Parquet row, or the path of a
            text file.
        content: bytes of the line, cell or whole file, without a byte order mark.
        is_json: the content is a JSON object with a text field, rather than text.
        bytes_read: bytes of input that reading this document consumed, for progress.
        problem: reason and detail where the reader could not read it; the content is empty then.
    """

    origin: str
    content: bytes
    is_json: bool
    bytes_read: int
    problem: tuple[str, str] | None = None

    @property
    def payload(self) -> bytes:
        """The content.

        Raises:
            BadDocument: the reader could not read it.
        """
        if self.problem is not None:
            raise BadDocument(*self.problem)
        return self.content


def decoded(payload: bytes) -> str:
    """The payload as text.

    Raises:
        BadDocument: invalid UTF-8.
    """
    try:
        return payload.decode("utf-8")
    except UnicodeDecodeError as error:
        utf16 = payload.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        hint = "; it starts like UTF-16, convert it to UTF-8" if utf16 else ""
        raise BadDocument(INVALID_UTF8, f"{error.reason} at byte {error.start}{hint}") from None


def json_object(payload: bytes) -> dict:
    """The JSON object in a document's payload.

    Raises:
        BadDocument: invalid UTF-8 or JSON, not an object, or a field given twice.
    """
    text = decoded(payload)
    repeated: list[str] = []

    def fields(pairs: list[tuple[str, object]]) -> dict:
        # Objects end from the inside out, so the last one is the record itself.
        record = dict(pairs)
        repeated[:] = [name for name, _ in pairs] if len(record) != len(pairs) else []
        return record

    try:
        record = json.loads(text, object_pairs_hook=fields)
    except (ValueError, RecursionError) as error:
        raise BadDocument(INVALID_JSON, str(error)) from None
    if not isinstance(record, dict):
        raise BadDocument("not an object", f"a JSON {type(record).__name__} where an object is needed")
    if repeated:
        twice = next(name for name in record if repeated.count(name) > 1)
        raise BadDocument("a field twice", f"{twice!r} is given more than once: which one is meant?")
    return record
