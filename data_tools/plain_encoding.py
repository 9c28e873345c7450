"""Encoding with a `tokenizer.json` in which no part of a text is left out and nothing is left to chance."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

# A BPE model fails where its token for the unknown is not in its vocabulary, and leaves characters out without one.
_NO_TOKEN = "(none)"


class ChatTemplateError(Exception):
    """A chat template refuses some messages; the message tells why."""


class ContentError(ChatTemplateError):
    """A text whose tokens would mean something else than the text; the message tells why, `reason` is its kind."""

    reason = "a control token"


class NoTokenError(ContentError):
    """A part of a text has no token, and the model has none for what is unknown."""

    reason = "no token"

    def __init__(self, error: Exception) -> None:
        super().__init__(f"a part of the text has no token in this tokenizer ({error})")


def without_losses(description: dict) -> dict:
    """A `tokenizer.json` whose encoder fails at a character without a token, and has no BPE dropout.

    Ids of other texts stay as they are. Other kinds of models than BPE fail at such characters by themselves.
    """
    model = description["model"]
    changed: dict[str, object] = {}
    if "merges" in model:
        changed = {"dropout": None, "unk_token": model.get("unk_token") or _NO_TOKEN}
    return description | {"model": model | changed, "truncation": None, "padding": None}


def plain_encoding(tokenizer: "Tokenizer", text: str) -> "Encoding":
    """The encoding of a text without what a post-processor adds.

    Raises:
        NoTokenError: a part of the text has no token.
    """
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # the library has no kind of its own
        raise NoTokenError(error) from None


# What normalisers are known to change.
_PROBES = {
    "capitals": "Ab", "newlines": "a\nb", "spaces in a row": "a  b", "spaces at the ends": " a ", "ligatures": "\ufb01",
    "composed letters": "e\u0301",
}  # fmt: skip


def changed_texts(encode: Callable[[str], Sequence[int]], decode: Callable[[list[int]], str]) -> str:
    """What does not come back from the tokens of a text, in words: what the tokenizer's normaliser changes or drops."""
    found = []
    for name, text in _PROBES.items():
        try:
            if decode(list(encode(text))) != text:
                found.append(name)
        except ContentError:  # such a document is refused
            continue
    return ", ".join(found)
