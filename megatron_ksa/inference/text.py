"""Text that grows by tokens: characters appear when they are whole, and stop strings end it."""

from collections.abc import Callable, Sequence

# Tokens of the prompt that a new token is decoded behind: tokenizers drop a space at the start of a text.
CONTEXT = 4
# Tokens that are decoded together at most: bytes that never become a character do not hold the text up.
LONGEST_CHARACTER = 16
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class GrowingText:
    """The text of generated tokens.

    Args:
        decode: token ids -> text.
        prompt: ids before the text.
        stop: strings that end it.

    Attributes:
        text: so far, without the stop string and what comes after it.
        stopped: a stop string has come.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, stop
        self._tokens = list(prompt[-CONTEXT:])
        # Tokens from `_first` on are decoded again with each new one; the text of those before `_read` is out.
        self._first, self._read = 0, len(self._tokens)
        self._longest_stop = max(map(len, stop), default=0)
        self.text, self.stopped = "", False
        self._given = 0

    def add(self, token: int) -> None:
        """Go on by a token; behind a stop string nothing is added."""
        if self.stopped:
            return
        self._tokens.append(token)
        self._grow(final=False)

    def finish(self) -> None:
        """No token comes any more: what is left of a character is shown as a replacement character."""
        if not self.stopped:
            self._grow(final=True)

    def _grow(self, final: bool) -> None:
        before = self._decode(self._tokens[self._first : self._read])
        after = self._decode(self._tokens[self._first :])
        if after.endswith(INCOMPLETE) and not final and len(self._tokens) - self._read < LONGEST_CHARACTER:
            return
        old = len(self.text)
        self.text += after[len(before) :]
        self._first, self._read = self._read, len(self._tokens)
        start = max(old - self._longest_stop + 1, 0)
        places = [place for stop in self._stop if (place := self.text.find(stop, start)) >= 0]
        if places:
            self.text, self.stopped = self.text[: min(places)], True

    def news(self, final: bool = False) -> str:
        """Text that was not given out before and will stay; the start of what may become a stop string is kept back."""
        end = len(self.text)
        if not (final or self.stopped):
            for length in range(min(self._longest_stop - 1, end - self._given), 0, -1):
                if any(stop.startswith(self.text[end - length :]) for stop in self._stop):
                    end -= length
                    break
        given, self._given = self._given, max(end, self._given)
        return self.text[given:end]
