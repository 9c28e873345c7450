"""Per-layer patterns such as `([128]*3+[1024])*6` and `kkkf*6`: parsed by a small grammar, never evaluated.

    pattern := term ('+' term)*
    term    := atom ('*' COUNT)*
    atom    := '(' pattern ')' | ITEMS

ITEMS is `128` or `[128]` or `[128, 1024]` for integers, and a run of letters such as `kkkf` for letters. Numbers have
at most nine digits. White space parts tokens and joins none: `2 2` is refused, not read as 22.
"""

import re
from collections.abc import Callable

from megatron_ksa.errors import UsageError

MAX_ENTRIES, MAX_DEPTH, MAX_DIGITS = 65536, 50, 9

_INTEGER_TOKENS = re.compile(r"[0-9]+|[\[\](),+*]")
_LETTER_TOKENS = re.compile(r"[a-z]+|[0-9]+|[()+*]")


class _Parser:
    """Recursive descent over the tokens of one pattern."""

    def __init__(self, text: str, tokens: re.Pattern[str], items: Callable[["_Parser"], list], flag: str) -> None:
        self.text, self.flag, self.items, self.position, self.depth = text, flag, items, 0, 0
        self.tokens = tokens.findall(text)
        if "".join(self.tokens) != "".join(text.split()) or not self.tokens:
            self.fail("has characters that are not in the grammar")
        if any(token.isdigit() and len(token) > MAX_DIGITS for token in self.tokens):
            self.fail(f"has a number of more than {MAX_DIGITS} digits")

    def fail(self, why: str) -> None:
        shown = self.text if len(self.text) <= 60 else f"{self.text[:60]}..."
        raise UsageError(f"{self.flag} {shown!r} {why}; write for example {self.example()}")

    def example(self) -> str:
        """The way to write what was meant, where that is plain, else one of the grammar."""
        words = self.text.split()
        item = "[a-z]+" if self.items is _letters else "[0-9]{1,9}"
        if 1 < len(words) <= 16 and all(re.fullmatch(item, word) for word in words):
            return "+".join(words)
        return "kkkf*6" if self.items is _letters else "128 or ([128]*3+[1024])*6"

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self, expected: str | None = None) -> str:
        token = self.peek()
        if not token or (expected is not None and token != expected):
            self.fail(
                f"lacks {expected or 'a value'!r} at its end" if not token else f"has an unexpected {token[:20]!r}"
            )
        self.position += 1
        return token

    def count(self) -> int:
        token = self.take()
        if not token.isdigit():
            self.fail(f"has {token!r} where a count belongs")
        return int(token)

    def check_entries(self, count: int) -> None:
        if count > MAX_ENTRIES:
            self.fail(f"has more than {MAX_ENTRIES} entries")

    def pattern(self) -> list:
        entries = self.term()
        while self.peek() == "+":
            self.take()
            more = self.term()
            self.check_entries(len(entries) + len(more))
            entries += more
        return entries

    def term(self) -> list:
        if self.peek() == "(":
            self.take()
            self.depth += 1
            if self.depth > MAX_DEPTH:
                self.fail(f"has more than {MAX_DEPTH} parentheses within each other")
            entries = self.pattern()
            self.take(")")
            self.depth -= 1
        else:
            entries = self.items(self)
        while self.peek() == "*":
            self.take()
            times = self.count()
            self.check_entries(len(entries) * times)
            entries = entries * times
        return entries

    def parse(self) -> list:
        entries = self.pattern()
        if self.peek():
            self.fail(f"has an unexpected {self.peek()[:20]!r}: entries are joined by +")
        return entries


def _integers(parser: _Parser) -> list[int]:
    if parser.peek() != "[":
        return [parser.count()]
    parser.take()
    entries = [parser.count()]
    while parser.peek() == ",":
        parser.take()
        entries.append(parser.count())
    parser.take("]")
    return entries


def _letters(parser: _Parser) -> list[str]:
    token = parser.take()
    if not token.isalpha():
        parser.fail(f"has {token[:20]!r} where layer letters belong")
    return list(token)


def _per_layer(entries: list, num_layers: int, text: str, flag: str) -> tuple:
    if len(entries) == 1:
        entries = entries * num_layers
    if len(entries) != num_layers:
        raise UsageError(
            f"{flag} {text[:60]!r} describes {len(entries)} layers, the model has {num_layers}: "
            f"give one entry or {num_layers} (--num-layers)"
        )
    return tuple(entries)


def parse_integers(text: str, num_layers: int, flag: str) -> tuple[int, ...]:
    """One integer a layer from a pattern such as `128` or `([128]*3+[1024])*6`.

    Raises:
        UsageError: text outside the grammar, or neither 1 nor num_layers entries.
    """
    return _per_layer(_Parser(text, _INTEGER_TOKENS, _integers, flag).parse(), num_layers, text, flag)


def parse_letters(text: str, letters: str, num_layers: int, flag: str) -> tuple[str, ...]:
    """One letter a layer, each one of `letters`, from a pattern such as `k` or `kkkf*6`.

    Raises:
        UsageError: text outside the grammar, another letter, or neither 1 nor num_layers entries.
    """
    entries = _Parser(text, _LETTER_TOKENS, _letters, flag).parse()
    unknown = sorted(set(entries) - set(letters))
    if unknown:
        raise UsageError(f"{flag} {text[:60]!r} has layer kind {unknown[0]!r}; the kinds are {', '.join(letters)}")
    return _per_layer(entries, num_layers, text, flag)
