"""Messages as chat templates take them, and a check that a template wrote what they carry."""

import json
from collections.abc import Callable, Iterator

from megatron_ksa.data_tools.tokenizers import ChatTemplateError

END_OF_THOUGHTS = "</think>"


def words_of(message: dict) -> str:
    """What a message says after the thoughts in its content, without the white space around it."""
    return message.get("content", "").rpartition(END_OF_THOUGHTS)[2].strip()


def can_be_marked(message: dict) -> bool:
    """Whether a message has words or a tool call, and so a place for marks."""
    return bool(words_of(message) or message.get("tool_calls"))


def marked(message: dict, marks: tuple[str, str]) -> dict:
    """The message with a mark before and after its words; without words with both after the name of its last call."""
    thoughts, end, rest = message.get("content", "").rpartition(END_OF_THOUGHTS)
    words = rest.strip()
    if not words:
        *calls, last = message["tool_calls"]
        function = {**last["function"], "name": last["function"]["name"] + "".join(marks)}
        return {**message, "tool_calls": [*calls, {**last, "function": function}]}
    before, _, after = rest.partition(words)
    return {**message, "content": f"{thoughts}{end}{before}{marks[0]}{words}{marks[1]}{after}"}


def _call(call: dict, *, parse: bool) -> dict:
    function = call["function"]
    arguments = function["arguments"]
    if parse and isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = function["arguments"]
    elif not parse and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def as_template_takes(messages: list[dict]) -> Iterator[list[dict]]:
    """The messages in the forms that templates take, the usual one first; what is not for templates is left out.

    Templates differ in whether the arguments of a tool call are an object or JSON text, and whether a call without
    words has a content.
    """
    plain = [{name: value for name, value in message.items() if name != "weight"} for message in messages]
    if not any(message.get("tool_calls") for message in plain):
        yield plain
        return
    for parse in (True, False):
        with_calls = []
        for message in plain:
            if message.get("tool_calls"):
                message = {**message, "tool_calls": [_call(call, parse=parse) for call in message["tool_calls"]]}
                if parse and not message["content"]:
                    del message["content"]
            with_calls.append(message)
        yield with_calls


def _is_python(function: dict, text: str) -> bool:
    """Whether a template wrote a call or its arguments as Python writes them, which is no JSON."""
    objects = [value for value in (function, function["arguments"]) if isinstance(value, dict)]
    return any(str(value) in text and str(value) != json.dumps(value, ensure_ascii=False) for value in objects)


def without_parts(messages: list[dict]) -> Iterator[tuple[str, list[dict]]]:
    """What messages carry beside their contents: its name, and the messages without it.

    Of thoughts only those of a response at the end: many templates leave out those of earlier ones, as they shall.
    """
    for i, message in enumerate(messages):
        calls = message.get("tool_calls", [])
        if calls:
            rest = {**message, "content": message.get("content", ""), "tool_calls": calls[:-1]}
            if not calls[:-1]:
                del rest["tool_calls"]
            yield "a tool call", [*messages[:i], rest, *messages[i + 1 :]]
    if messages and messages[-1].get("reasoning_content"):
        rest = {name: value for name, value in messages[-1].items() if name != "reasoning_content"}
        yield "reasoning_content", [*messages[:-1], rest]


def check_carried(try_render: Callable[..., str | None], text: str, messages: list[dict], tools: list[dict]) -> None:
    """Check that a template wrote what stands beside the contents: without it the text must be another.

    Args:
        try_render: messages and tools to text, None where the template refuses them.
        text: of these messages and tools.

    Raises:
        ChatTemplateError: it leaves something out.
    """
    if tools and try_render(messages, []) == text:
        raise ChatTemplateError("the template leaves out the tools")
    for name, rest in without_parts(messages):
        if try_render(rest, tools) == text:
            raise ChatTemplateError(f"the template leaves out {name}")
    for message in messages:
        if any(_is_python(call["function"], text) for call in message.get("tool_calls", ())):
            raise ChatTemplateError("the template writes the arguments of a tool call as Python, not as JSON")


def strings(value: object) -> Iterator[str]:
    """Every string in a JSON value but for the names of fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from strings(each)
