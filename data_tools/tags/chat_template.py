"""Messages to tokens, with a mask of the responses: a chat template, ChatML, or plain joining.

A template is asked once for every sequence of roles, with place-holders for the contents. What it writes around them is
markup, where names of special tokens mean those tokens; contents are text, so an instance that writes `<|im_end|>` ends
no turn.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import batched, groupby
from os.path import commonprefix

import numpy as np

from megatron_ksa.config.options import option
from megatron_ksa.data_tools.tokenizers import ChatTemplateError, Tokenizer, load_tokenizer
from megatron_ksa.errors import UsageError

TEMPLATES = ("plain", "chatml", "tokenizer")
RESPONSE_ROLE = "assistant"
PLAIN_SEPARATOR = "\n\n"
RECORDS_PER_TASK = 64


@dataclass(frozen=True)
class EncodingSettings:
    """How a record becomes tokens, for the sample step's budget in tokens and for the write step.

    Args:
        tokenizer_model: as `load_tokenizer` takes it.
        template: one of `TEMPLATES`.
    """

    tokenizer_model: str | None = option(
        None, "SentencePiece .model, or a folder with tokenizer.json.", flag="--tokenizer-model"
    )
    template: str = option(
        "plain", "How messages are joined: by empty lines, as ChatML, or by the tokenizer's own chat template.",
        choices=TEMPLATES, flag="--template",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.template not in TEMPLATES:
            raise UsageError(f"--template {self.template}: not one of {', '.join(TEMPLATES)}")

    def decides(self) -> dict:
        """Everything but the tokenizer's content that decides the tokens, as JSON, without the place it lies at."""
        return {name: value for name, value in asdict(self).items() if name != "tokenizer_model"}


@dataclass(frozen=True)
class Segment:
    """A piece of a document: the content of a message, or markup where `message` is None, and whether it counts."""

    text: str
    message: int | None
    counts: bool


def _chatml(messages: list[dict[str, str]]) -> str:
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


def _place_holder(message: int) -> str:
    return f"\ue000{message}\ue001"


class DocumentEncoder:
    """Records to token ids and loss masks.

    Args:
        template: one of `TEMPLATES`. `plain` joins contents by empty lines, without role names.
    """

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        self.tokenizer, self.template = tokenizer, template
        self._layouts: dict[tuple[str, ...], list[Segment]] = {}

    def layout(self, roles: tuple[str, ...]) -> list[Segment]:
        """Segments of a conversation with these roles, place-holders as the contents.

        Raises:
            ChatTemplateError: the template refuses these roles, or does not write every content once and in order.
        """
        if roles not in self._layouts:
            self._layouts[roles] = self._make_layout(roles)
        return self._layouts[roles]

    def _render(self, roles: tuple[str, ...]) -> str:
        messages = [{"role": role, "content": _place_holder(i)} for i, role in enumerate(roles)]
        return _chatml(messages) if self.template == "chatml" else self.tokenizer.render_chat(messages)

    def _make_layout(self, roles: tuple[str, ...]) -> list[Segment]:
        responses = [role == RESPONSE_ROLE for role in roles]
        if self.template == "plain":
            segments = [Segment(PLAIN_SEPARATOR, None, False)] * (2 * len(roles) - 1)
            segments[::2] = [Segment("", i, counts) for i, counts in enumerate(responses)]
            return segments
        rest, segments = self._render(roles), []
        for i, counts in enumerate(responses):
            before, found, rest = rest.partition(_place_holder(i))
            if not found or _place_holder(i) in rest:
                raise ChatTemplateError(f"the template does not write the {roles[i]} message once and in order")
            segments += [Segment(before, None, False), Segment("", i, counts)]
            if counts:
                # What ends the turn is the response's as well, and no more than that.
                end = self._render(roles[: i + 1]).partition(_place_holder(i))[2]
                end = commonprefix([end, rest])
                segments.append(Segment(end, None, True))
                rest = rest.removeprefix(end)
        return [
            segment
            for segment in (*segments, Segment(rest, None, False))
            if segment.text or segment.message is not None
        ]

    def encode(self, record: dict) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 [tokens] with the end of the document, and uint8 [tokens], 1 where the loss counts the token.

        Every token of a plain text counts. The end of the document counts after a response.

        Args:
            record: {"messages": [{"role", "content"}, ...]} or {"text"}.

        Raises:
            ChatTemplateError: the template refuses the messages, or a text has no UTF-8.
        """
        if "messages" in record:
            contents = [message["content"] for message in record["messages"]]
            segments = self.layout(tuple(message["role"] for message in record["messages"]))
        else:
            contents, segments = [record["text"]], [Segment("", 0, True)]
        ids: list[int] = []
        mask: list[bool] = []
        for (counts, is_markup), run in groupby(segments, lambda segment: (segment.counts, self._is_markup(segment))):
            text = "".join(segment.text if segment.message is None else contents[segment.message] for segment in run)
            try:
                # A lone surrogate, which JSON can escape, has no bytes to tokenise.
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ChatTemplateError(f"invalid UTF-8 ({error.reason})") from None
            new = self.tokenizer.encode(text) if is_markup else self.tokenizer.encode_content(text)
            ids += new
            mask += [counts] * len(new)
        if not ids or ids[-1] != self.tokenizer.end_of_document:
            ids.append(self.tokenizer.end_of_document)
            mask.append(any(segment.counts for segment in segments[-2:]))
        return np.array(ids, np.int32), np.array(mask, np.uint8)

    def _is_markup(self, segment: Segment) -> bool:
        return segment.message is None and self.template != "plain"


@cache
def _encoder(settings: EncodingSettings) -> DocumentEncoder:
    return DocumentEncoder(load_tokenizer(settings.tokenizer_model), settings.template)


def _encode_some(settings: EncodingSettings, records: tuple[dict, ...]) -> list[tuple[np.ndarray, np.ndarray] | str]:
    encoder, results = _encoder(settings), []
    for record in records:
        try:
            results.append(encoder.encode(record))
        except ChatTemplateError as error:
            results.append(str(error))
    return results


def encode_records(
    records: Iterable[dict], settings: EncodingSettings, run: Callable = map
) -> Iterator[tuple[np.ndarray, np.ndarray] | str]:
    """What `DocumentEncoder.encode` gives for each record, in order, or why the template refuses it.

    Args:
        run: `map`, or one that works elsewhere: results of a function of tasks, in order (`engine.Engine.map`).
    """
    _encoder(settings)  # a tokenizer that does not load is reported here and not by a worker
    for results in run(partial(_encode_some, settings), batched(records, RECORDS_PER_TASK)):
        yield from results
