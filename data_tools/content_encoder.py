"""Encoding of what a person wrote: no part of it becomes a control token, and U+2581 is not read as a space."""

from collections.abc import Callable

from megatron_ksa.data_tools.plain_encoding import ContentError, NoTokenError

# SentencePiece and what is derived from it write a space as this character, and so take the character for a space.
_SPACE_SYMBOL = "\u2581"


def encoded_or_none(encode: Callable[[str], list[int]], text: str) -> list[int] | None:
    """Ids of a text, or None where a part of it has no token."""
    try:
        return encode(text)
    except NoTokenError:
        return None


class ContentEncoder:
    """Encodes what a person wrote with an encoder that knows no markers.

    Args:
        encode: text to ids.
        token_id: the id of a token by its name, None where there is none.
        control: ids that no text may become, with their names.
    """

    def __init__(
        self, encode: Callable[[str], list[int]], token_id: Callable[[str], int | None], control: dict[int, str]
    ) -> None:
        self._encode, self._control = encode, control
        # None: this tokenizer writes the space symbol as itself.
        self._bytes: list[int | None] | None = None
        symbol, space = (encoded_or_none(encode, text) for text in (f"a{_SPACE_SYMBOL}a", "a a"))
        if symbol is not None and symbol == space:
            self._bytes = [token_id(f"<0x{byte:02X}>") for byte in range(256)]

    def __call__(self, text: str) -> list[int]:
        ambiguous = self._bytes is not None and _SPACE_SYMBOL in text
        ids = self._with_space_symbol(text) if ambiguous else self._encode(text)
        if not self._control.keys().isdisjoint(ids):
            name = next(self._control[id] for id in ids if id in self._control)
            raise ContentError(f"the text contains {name!r}, which this tokenizer reads as its control token")
        return ids

    def _with_space_symbol(self, text: str) -> list[int]:
        """Ids of a text with U+2581 in it: the symbol becomes its bytes, as other characters without a token do."""
        if None in self._bytes:
            raise ContentError("the text contains U+2581, which this tokenizer reads as a space")
        # A character of three bytes that is not in the text, and which no tokenizer has a token for, holds the place.
        stand_in = next(c for c in map(chr, range(0xF8FF, 0xE000, -1)) if c not in text)
        placed = [self._bytes[byte] for byte in stand_in.encode()]
        symbol = [self._bytes[byte] for byte in _SPACE_SYMBOL.encode()]
        ids, at, replaced = self._encode(text.replace(_SPACE_SYMBOL, stand_in)), 0, 0
        while at < len(ids):
            if ids[at : at + 3] == placed:
                ids[at : at + 3], replaced = symbol, replaced + 1
            at += 1
        if replaced != text.count(_SPACE_SYMBOL):
            raise ContentError("the text contains U+2581, which this tokenizer reads as a space")
        return ids
