"""A reply of a chat endpoint, read within a stated size and taken apart: nothing in it is trusted."""

import json
import zlib
from collections.abc import AsyncIterable
from dataclasses import dataclass
from typing import Any

# A count of tokens beyond this is no count.
MOST_TOKENS = 10**9
_COMPRESSED = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


class Unreachable(Exception):
    """No usable reply this time; `reason` can be counted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Reply:
    """A chat completion.

    Args:
        content: the message's content, whatever it is.
        prompt_tokens, answer_tokens: as the endpoint counted them, 0 where it did not.
        cut_off: the answer ended at its limit of tokens.
        thought: characters of reasoning beside the content.
        refusal: the model's refusal, where the endpoint reports it apart.
    """

    content: object
    prompt_tokens: int = 0
    answer_tokens: int = 0
    cut_off: bool = False
    thought: int = 0
    refusal: str | None = None


async def read_body(chunks: AsyncIterable[bytes], encoding: str, most: int, *, cut: bool = False) -> bytes:
    """The bytes of a reply's body, unpacked.

    Args:
        chunks: the body as it comes.
        encoding: the `Content-Encoding` header.
        most: bytes, before and after unpacking.
        cut: take the start of a longer body instead of raising.

    Raises:
        Unreachable: it is longer, or packed in a way that was not asked for, or broken.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        unpack = None
    elif encoding in _COMPRESSED:
        unpack = zlib.decompressobj(_COMPRESSED[encoding])
    else:
        raise Unreachable("broken reply", f"packed as {encoding[:40]!r}, which was not asked for")
    body = bytearray()
    try:
        async for chunk in chunks:
            # One byte more than allowed tells that there is more, whatever the rest would unpack to.
            body += chunk if unpack is None else unpack.decompress(chunk, most + 1 - len(body))
            if len(body) > most and cut:
                return bytes(body[:most])
            if len(body) > most:
                raise Unreachable("reply too large", f"more than {most:,} bytes (--llm-max-reply-bytes)")
        if unpack is not None and not unpack.eof:
            raise Unreachable("connection lost", "the packed reply was cut off")
    except zlib.error as error:
        raise Unreachable("broken reply", str(error)) from None
    return bytes(body)


def parse_completion(value: Any) -> Reply:
    """The reply in a chat completion, as JSON.

    Raises:
        Unreachable: it is none.
    """
    try:
        choice = value["choices"][0]
        message = choice["message"]
        if not isinstance(message, dict):
            raise TypeError(f"the message is a {type(message).__name__}")
    except (KeyError, IndexError, TypeError) as error:
        raise Unreachable("broken reply", f"no chat completion: {type(error).__name__} {str(error)[:100]}") from None
    usage = value.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    thought = message.get("reasoning_content") or message.get("reasoning")
    refusal = message.get("refusal")
    return Reply(
        message.get("content"), token_count(usage.get("prompt_tokens")), token_count(usage.get("completion_tokens")),
        cut_off=choice.get("finish_reason") == "length",
        thought=len(thought) if isinstance(thought, str) else 0,
        refusal=refusal if isinstance(refusal, str) and refusal else None,
    )  # fmt: skip


def parse_body(body: bytes) -> Reply:
    """The reply in a body.

    Raises:
        Unreachable: it is no chat completion.
    """
    try:
        return parse_completion(json.loads(body))
    except (ValueError, RecursionError) as error:
        raise Unreachable("broken reply", f"no chat completion: {type(error).__name__} {str(error)[:100]}") from None


def token_count(value: object) -> int:
    """A number of tokens that an endpoint states; 0 for anything that is none."""
    return value if type(value) is int and 0 <= value <= MOST_TOKENS else 0


def shown(text: str, secret: str | None = None, most: int = 300) -> str:
    """The start of what an endpoint said, in one printable line, without the key that it may repeat."""
    if secret:
        text = text.replace(secret, "[key]")
    return " ".join("".join(c if c.isprintable() else " " for c in text[:most]).split())
