"""A conversation as the text that a chat template writes, with where its responses lie in that text.

Where a response lies is told by the template's generation marks, or else by renderings: of the conversation's prefixes,
and of the conversation with marks in its contents. What these do not show is refused, not guessed.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import Any

from megatron_ksa.data_tools.tags.carried import (
    as_template_takes,
    can_be_marked,
    check_carried,
    marked,
    strings,
    words_of,
)
from megatron_ksa.data_tools.tags.whole_text import WholeText
from megatron_ksa.data_tools.tokenizers import ChatTemplateError

RESPONSE_ROLE = "assistant"
# Characters of the private planes mark places in contents and stand for names of control tokens.
MARKS, STAND_INS = 0xE000, 0xF0000
MOST_MESSAGES = 1000
MOST_SEAMS = 1000
LONGEST_MARKER = 100
_MARKER = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")

Place = tuple[int, int]


@dataclass(frozen=True)
class Rendering:
    """What a template writes.

    Args:
        text: the whole.
        responses: of each response the number of its message, its first character and the one after its last.
        as_text: spans in which the name of a control token is content.
    """

    text: str
    responses: list[tuple[int, int, int]] = field(default_factory=list)
    as_text: list[Place] = field(default_factory=list)


def find_marks(text: str, marks: str) -> tuple[str, dict[str, int]]:
    """The text without the marks, and the place of each mark in it.

    Raises:
        ChatTemplateError: a mark stands there twice.
    """
    parts = re.split(f"([{marks}])", text)
    places: dict[str, int] = {}
    at = 0
    for part, mark in zip(parts[::2], [*parts[1::2], ""], strict=True):
        at += len(part)
        if mark in places:
            raise ChatTemplateError("the template writes a message twice")
        places[mark] = at
    return "".join(parts[::2]), places


class Template:
    """A chat template.

    Args:
        render: messages, tools, and whether to end with what comes before a response, to text; raises
            `ChatTemplateError`.
        whole: knows the names of control tokens.
        generation: messages and tools to text and the spans of its generation marks, of a template that has such marks.
    """

    def __init__(
        self,
        render: Callable[[list[dict], list[dict], bool], str],
        whole: WholeText,
        generation: Callable[[list[dict], list[dict]], tuple[str, list[Place]]] | None = None,
    ) -> None:
        self._render, self._whole, self._generation = render, whole, generation
        # For conversations of one shape, what stands before and after the words of each response.
        self._seams: dict[tuple, list[tuple[str, str]]] = {}

    def rendering(self, messages: list[dict], tools: list[dict], *, with_responses: bool = True) -> Rendering:
        """The text of a conversation.

        Raises:
            ChatTemplateError: the template refuses it or leaves something out, or does not show where responses lie.
        """
        if len(messages) > MOST_MESSAGES:
            raise ChatTemplateError(f"{len(messages):,} messages, more than {MOST_MESSAGES:,}")
        refusal = None
        for taken in as_template_takes(messages):
            try:
                return self._one_rendering(taken, tools, with_responses)
            except ChatTemplateError as error:
                # The last form has every field: a template that fails on an earlier one only lacks that form.
                refusal = error
        raise refusal

    def _one_rendering(self, messages: list[dict], tools: list[dict], with_responses: bool) -> Rendering:
        text = self._render(messages, tools, False)
        check_carried(self._try, text, messages, tools)
        places = self._places(text, messages, tools)
        as_text = self._as_text(text, messages, tools)
        if not with_responses:
            return Rendering(text, as_text=as_text)
        wanted = [i for i, message in enumerate(messages) if message["role"] == RESPONSE_ROLE]
        if self._generation is None:
            return Rendering(text, self._responses(text, messages, tools, places, wanted), as_text)
        same, spans = self._generation(messages, tools)
        if same != text or len(spans) != len(wanted):
            raise ChatTemplateError(f"{len(spans)} generation marks where there are {len(wanted)} responses")
        return Rendering(text, [(i, *span) for i, span in zip(wanted, spans, strict=True)], as_text)

    def _places(self, text: str, messages: list[dict], tools: list[dict]) -> list[Place | None]:
        """Where the words of each message, or the name of its call, stand in the text; None for an empty message."""
        free = (chr(MARKS + i) for i in range(0x1900) if chr(MARKS + i) not in text)
        pairs = [(next(free), next(free)) if can_be_marked(message) else None for message in messages]
        if not any(pairs):
            return [None] * len(messages)
        with_marks = [marked(message, pair) if pair else message for message, pair in zip(messages, pairs, strict=True)]
        found = self._render(with_marks, tools, False)
        rest, places = find_marks(found, "".join(mark for pair in pairs if pair for mark in pair))
        result = [pair and (places.get(pair[0]), places.get(pair[1])) for pair in pairs]
        last = 0
        for message, place in zip(messages, result, strict=True):
            if place is not None:
                if None in place or not last <= place[0] <= place[1]:
                    raise ChatTemplateError(
                        f"the template does not write the {message['role']} message once and in order"
                    )
                last = place[1]
        if rest != text:
            raise ChatTemplateError("the template changes contents: what it writes of them cannot be found again")
        return result

    def _as_text(self, text: str, messages: list[dict], tools: list[dict]) -> list[Place]:
        """Spans of the text in which the name of a control token comes from a content."""
        if not any(map(self._whole.has_name, strings([messages, tools]))):
            return []
        stand_in = {name: chr(STAND_INS + i) for i, name in enumerate(self._whole.names)}
        name_of = {character: name for name, character in stand_in.items()}

        def hidden(value: Any, *, key: str = "") -> Any:
            if isinstance(value, str):
                return value if key == "role" else self._whole.hide_names(value, stand_in)
            if isinstance(value, dict):
                return {name: hidden(each, key=name) for name, each in value.items()}
            return [hidden(each) for each in value] if isinstance(value, list) else value

        found = self._render(hidden(messages), hidden(tools), False)
        parts, spans, at = [], [], 0
        for character in found:
            written = name_of.get(character, character)
            if written is not character:
                spans.append((at, at + len(written)))
            parts.append(written)
            at += len(written)
        if "".join(parts) != text:
            raise ChatTemplateError("the template changes a content that names a control token")
        return spans

    def _responses(
        self, text: str, messages: list[dict], tools: list[dict], places: list[Place | None], wanted: list[int]
    ) -> list[tuple[int, int, int]]:
        shape = (bool(tools), *map(_shape, messages))
        seams = self._seams.get(shape)
        if seams is not None:
            known = _by_seams(text, places, wanted, seams)
            if known is not None:
                return known
        found = [(i, *self._response(text, messages, tools, places, i)) for i in wanted]
        if seams is None and all(places) and len(self._seams) < MOST_SEAMS:
            self._seams[shape] = [
                (text[places[i - 1][1] if i else 0 : start], text[places[i][1] : end]) for i, start, end in found
            ]
        return found

    def _response(
        self, text: str, messages: list[dict], tools: list[dict], places: list[Place | None], i: int
    ) -> tuple[int, int]:
        """Where the response that is message `i` starts and ends."""
        start = self._start(text, messages, tools, places, i)
        end = self._end(text, messages, tools, places, i)
        if start is None or end is None or not start <= end:
            raise ChatTemplateError("the text of the template does not show where a response lies")
        return start, end

    def _try(self, messages: list[dict], tools: list[dict], *, asked: bool = False) -> str | None:
        """The text of a prefix of the conversation, where the template writes one."""
        try:
            return self._render(messages, tools, asked) if messages else None
        except ChatTemplateError:
            return None

    def _start(
        self, text: str, messages: list[dict], tools: list[dict], places: list[Place | None], i: int
    ) -> int | None:
        """The first character after what the template writes before any response at this place."""
        before, asked = self._try(messages[:i], tools), self._try(messages[:i], tools, asked=True)
        bound = places[i][0] if places[i] else len(text)
        prompt = asked.removeprefix(before) if asked and before and asked.startswith(before) else ""
        if prompt and text.startswith(asked) and len(asked) <= bound:
            return len(asked)
        if prompt and i and places[i - 1] and text.count(prompt, places[i - 1][1], bound) == 1:
            # The template writes earlier turns in another way once there are later ones.
            return text.index(prompt, places[i - 1][1], bound) + len(prompt)
        # The template's prompt for a response is not what it writes before this one: what it writes before any other.
        other = {"role": RESPONSE_ROLE, "content": chr(STAND_INS)}
        changed = self._try([*messages[:i], other, *messages[i + 1 :]], tools)
        return None if changed is None else min(_before_marker(text, len(commonprefix([changed, text]))), bound)

    def _end(
        self, text: str, messages: list[dict], tools: list[dict], places: list[Place | None], i: int
    ) -> int | None:
        """The end of what the template writes after the response as well where it is the last: what ends its turn."""
        if i == len(messages) - 1:
            return len(text)
        if places[i] is None:
            until = self._try(messages[: i + 1], tools)
            return len(until) if until and text.startswith(until) else None
        free = (chr(MARKS + k) for k in range(0x1900) if chr(MARKS + k) not in text)
        pair = next(free), next(free)
        until = self._try([*messages[:i], marked(messages[i], pair)], tools)
        if until is None or pair[1] not in until:
            return None
        last = places[i][1]
        return max(last, _before_marker(text, last + len(commonprefix([until.rpartition(pair[1])[2], text[last:]]))))


def _before_marker(text: str, place: int) -> int:
    """The place, or the start of the marker that it is in the middle of: different markers may begin alike."""
    first = max(place - LONGEST_MARKER, 0)
    for marker in _MARKER.finditer(text, first, place + LONGEST_MARKER):
        if marker.start() < place < marker.end():
            return marker.start()
    return place


def _shape(message: dict) -> tuple:
    """What decides how a template writes a message, its words aside."""
    content = message.get("content", "")
    return (
        message["role"], bool(words_of(message)), "</think>" in content, bool(message.get("reasoning_content")),
        len(message.get("tool_calls", ())),
    )  # fmt: skip


def _by_seams(
    text: str, places: list[Place], wanted: list[int], seams: list[tuple[str, str]]
) -> list[tuple[int, int, int]] | None:
    """Responses found by what stands before and after them in a conversation of the same shape, or None."""
    found = []
    for i, (before, after) in zip(wanted, seams, strict=True):
        first = places[i - 1][1] if i else 0
        start, end = first + len(before), places[i][1] + len(after)
        if not text.startswith(before, first) or not text.startswith(after, places[i][1]) or start > places[i][0]:
            return None
        found.append((i, start, end))
    return found
