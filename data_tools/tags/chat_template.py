"""Records to tokens, with a mask of the responses: a chat template, ChatML, or plain joining.

The text is what the template writes of the record (`rendering.py`), its tokens are those of the whole text encoded at
once (`whole_text.py`). Contents are text: an instance that writes `<|im_end|>` ends no turn.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import batched
from typing import Any

import numpy as np

from megatron_ksa.config.options import option
from megatron_ksa.data_tools.tags.rendering import RESPONSE_ROLE, Rendering, Template
from megatron_ksa.data_tools.tags.whole_text import WholeText
from megatron_ksa.data_tools.tokenizers import ChatTemplateError, Tokenizer, load_tokenizer
from megatron_ksa.errors import UsageError

TEMPLATES = ("plain", "chatml", "tokenizer")
LOSSES = ("all", "responses")
PLAIN_SEPARATOR = "\n\n"
RECORDS_PER_TASK = 64
NO_RESPONSE = "no response"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class EncodingSettings:
    """How a record becomes tokens, for the sample step's budget in tokens and for the write step.

    Args:
        tokenizer_model: as `load_tokenizer` takes it.
        template: one of `TEMPLATES`.
        loss_on: one of `LOSSES`; `responses` writes masks.
        max_length: tokens of a document, its end included; 0 for any.
        pack: tokens of a document into which whole instances are packed; 0 for a document an instance.

    Raises:
        UsageError: a value out of range.
    """

    tokenizer_model: str | None = option(
        None, "SentencePiece .model, or a folder with tokenizer.json.", flag="--tokenizer-model"
    )
    template: str = option(
        "plain", "How messages are joined: by empty lines, as ChatML, or by the tokenizer's own chat template.",
        choices=TEMPLATES, flag="--template",
    )  # fmt: skip
    loss_on: str = option(
        "all",
        "Tokens that the loss counts; responses writes masks, leaves out records without a response and cuts what "
        "follows the last one.",
        choices=LOSSES,
        flag="--loss-on",
    )
    max_length: int = option(
        0, "Longest instance, tokens: later turns are cut, whole; a longer first exchange is left out. 0: any.",
        flag="--max-length",
    )  # fmt: skip
    pack: int = option(
        0, "Pack whole instances into documents of this many tokens, for --seq-length of the same; 0: each by itself.",
        flag="--pack",
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, choices in (("template", TEMPLATES), ("loss_on", LOSSES)):
            if getattr(self, name) not in choices:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: not one of {', '.join(choices)}")
        for name in ("max_length", "pack"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1, or 0 for none")
        if self.pack and self.max_length > self.pack:
            raise UsageError(f"--max-length {self.max_length}: at most --pack {self.pack}")

    @property
    def limit(self) -> int:
        """Longest instance, tokens; 0 for any."""
        return self.max_length or self.pack

    def decides(self) -> dict:
        """Everything but the tokenizer's content that decides the tokens, as JSON, without the place it lies at."""
        return {name: value for name, value in asdict(self).items() if name != "tokenizer_model"}


@dataclass(frozen=True)
class Document:
    """The tokens of an instance.

    Args:
        ids: int32 [tokens], the end of the document included.
        mask: uint8 [tokens], 1 where the loss counts the token.
        cut: messages left out after the last response.
        truncated: messages left out because of the length.
    """

    ids: np.ndarray
    mask: np.ndarray
    cut: int = 0
    truncated: int = 0


def _chatml(messages: list[dict], tools: list[dict], asked: bool) -> str:
    if not has_form({"messages": messages, "tools": tools}):
        raise ChatTemplateError("ChatML has no form for tools, tool calls and thoughts; use --template tokenizer")
    text = "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)
    return text + f"<|im_start|>{RESPONSE_ROLE}\n" * asked


def _make_template(tokenizer: Tokenizer, name: str, whole: WholeText) -> Template:
    if name == "chatml":
        return Template(_chatml, whole)

    def render(messages: list[dict], tools: list[dict], asked: bool) -> str:
        return tokenizer.render_chat(messages, tools, asked=asked)

    def generation(messages: list[dict], tools: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        fast: Any = getattr(tokenizer, "fast")  # noqa: B009
        chosen = fast.get_chat_template(tools=tools or None)
        rendered: Any = render_jinja_template(
            conversations=[messages], tools=list(tools) or None, chat_template=chosen,
            return_assistant_tokens_mask=True, **fast.special_tokens_map,
        )  # fmt: skip
        texts, spans = rendered
        return texts[0], spans[0]

    written = getattr(getattr(tokenizer, "fast", None), "chat_template", None)
    return Template(render, whole, generation if _GENERATION.search(str(written)) else None)


class DocumentEncoder:
    """Records to token ids and loss masks.

    Args:
        template: one of `TEMPLATES`. `plain` joins contents by empty lines, without role names.
    """

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        self.tokenizer, self.whole = tokenizer, WholeText(tokenizer)
        self._template = None if template == "plain" else _make_template(tokenizer, template, self.whole)

    def _rendering(self, record: dict, *, masked: bool) -> Rendering:
        messages, tools = record["messages"], record.get("tools", [])
        if self._template is not None:
            return self._template.rendering(messages, tools, with_responses=masked)
        if not has_form(record):
            raise ChatTemplateError(
                "plain joining has no form for tools, tool calls and thoughts; use --template tokenizer"
            )
        text, responses = "", []
        for i, message in enumerate(messages):
            text += PLAIN_SEPARATOR * (i > 0)
            if message["role"] == RESPONSE_ROLE:
                responses.append((i, len(text), len(text) + len(message["content"])))
            text += message["content"]
        # Nothing is markup here, so no name means a control token.
        return Rendering(text, responses, [(0, len(text))] if self.whole.has_name(text) else [])

    def encode(self, record: dict, *, masked: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 [tokens] with the end of the document, and uint8 [tokens], 1 where the loss counts the token.

        Every token of a plain text counts. A token that is part of a response and part of markup counts, and so does
        the end of the document after a response. A response of weight 0 does not count.

        Args:
            record: {"messages", "tools"} or {"text"}, as in `records.jsonl`.
            masked: tell responses; every token counts without.

        Raises:
            ChatTemplateError: the template refuses the messages or leaves something out, or a text has no UTF-8.
        """
        if "text" in record:
            ids, counts, ends = self._text_ids(record["text"]), None, True
        else:
            rendering = self._rendering(record, masked=masked)
            tokens, messages = self.whole.encode(rendering.text, rendering.as_text), record["messages"]
            ids, counts = tokens.ids, None
            weights = [message.get("weight", 1) for message in messages]
            ends = messages[-1]["role"] == RESPONSE_ROLE and weights[-1] != 0
            if masked:
                counts = tokens.overlap([(first, end) for i, first, end in rendering.responses if weights[i]])
        mask = np.ones(len(ids), np.uint8) if counts is None else counts.astype(np.uint8)
        if not len(ids) or ids[-1] != self.tokenizer.end_of_document:
            ids = np.append(ids, np.int32(self.tokenizer.end_of_document))
            mask = np.append(mask, np.uint8(ends or not masked))
        return ids, mask

    def _text_ids(self, text: str) -> np.ndarray:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ChatTemplateError(f"invalid UTF-8 ({error.reason})") from None
        return np.array(self.tokenizer.encode_content(text), np.int32)


def check_encoding(settings: EncodingSettings) -> None:
    """Load the tokenizer and look for its chat template where it is asked for, before hours of work.

    Raises:
        UsageError: it does not load, or has no chat template.
    """
    encoder = _encoder(settings.tokenizer_model, settings.template)
    if settings.template == "tokenizer":
        with suppress(ChatTemplateError):
            encoder.tokenizer.render_chat([{"role": "user", "content": "?"}])


def has_form(record: dict) -> bool:
    """Whether `chatml` and `plain` have a form for all of a record: it has no tools, tool calls and thoughts."""
    messages = record.get("messages", ())
    return not (
        record.get("tools")
        or any(message.get(name) for message in messages for name in ("tool_calls", "reasoning_content"))
    )


def has_response(record: dict) -> bool:
    """Whether there is anything for a loss on responses: a text, or a response that is not of weight 0."""
    return "text" in record or any(m["role"] == RESPONSE_ROLE and m.get("weight", 1) for m in record["messages"])


def until_response(messages: list[dict], limit: int | None = None) -> list[dict]:
    """The messages up to the last response among the first `limit`; none where there is no response."""
    for i in range(len(messages) if limit is None else limit, 0, -1):
        if messages[i - 1]["role"] == RESPONSE_ROLE:
            return messages[:i]
    return []


def encode_document(encoder: DocumentEncoder, record: dict, settings: EncodingSettings) -> Document:
    """The tokens of a record under the settings.

    Raises:
        ChatTemplateError: from `DocumentEncoder.encode`, or there is no response, or it is too long.
    """
    masked = settings.loss_on == "responses"
    if "text" in record:
        document = Document(*encoder.encode(record, masked=masked))
        if settings.limit and len(document.ids) > settings.limit:
            raise ChatTemplateError(f"a text longer than {settings.limit:,} tokens")
        return document
    messages = record["messages"]
    kept = until_response(messages) if masked else messages
    if not kept or (masked and not has_response(record)):
        raise ChatTemplateError(NO_RESPONSE)
    cut, whole = len(messages) - len(kept), len(kept)
    ids, mask = encoder.encode({**record, "messages": kept}, masked=masked)
    while settings.limit and len(ids) > settings.limit:
        kept = until_response(kept, len(kept) - 1)
        if not kept:
            raise ChatTemplateError(f"a first exchange longer than {settings.limit:,} tokens")
        ids, mask = encoder.encode({**record, "messages": kept}, masked=masked)
    if masked and not mask.any():
        raise ChatTemplateError(NO_RESPONSE)
    return Document(ids, mask, cut, whole - len(kept))


@cache
def _encoder(tokenizer_model: str, template: str) -> DocumentEncoder:
    return DocumentEncoder(load_tokenizer(tokenizer_model), template)


def _encode_some(settings: EncodingSettings, records: tuple[dict, ...]) -> list[Document | str]:
    encoder = _encoder(settings.tokenizer_model, settings.template)
    results: list[Document | str] = []
    for record in records:
        try:
            results.append(encode_document(encoder, record, settings))
        except ChatTemplateError as error:
            results.append(str(error))
    return results


def encode_records(
    records: Iterable[dict], settings: EncodingSettings, run: Callable = map
) -> Iterator[Document | str]:
    """The document of each record, in order, or why there is none.

    Args:
        run: `map`, or one that works elsewhere: results of a function of tasks, in order (`engine.Engine.map`).
    """
    # A tokenizer that does not load is reported here and not by a worker.
    _encoder(settings.tokenizer_model, settings.template)
    for results in run(partial(_encode_some, settings), batched(records, RECORDS_PER_TASK)):
        yield from results
