"""Conversations of every schema as messages of one form: `role`, `content` and whatever else a template may look at.

Every field of a message is kept: those that this form names are moved to their place, others stay as they are. A record
with content that cannot be kept (pictures, a tool call without a name) is refused with a reason.
"""

import json
from typing import Any

from megatron_ksa.data_tools.documents import BadDocument

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool", "tool_response": "tool",
    "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
# Roles of turns that are nothing but a tool call, ShareGPT's and ms-swift's. A call of the second belongs to the
# assistant's turn before it.
CALLS, JOINED = ("function_call", "tool_call"), "tool_call"
# A turn of ms-swift's older conversations: a question and its answer.
EXCHANGE = {"human": "user", "assistant": "assistant"}
NO_FIELDS = "no recognised fields"
MEDIA = "images or other media"
BAD_CALL, BAD_TOOLS = "tool call without a name", "tools that are no list"
BAD_WEIGHT = "weight of a message other than 0 and 1"
# Content parts by their type: the field that holds their text.
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
THOUGHT_PARTS = {"thinking": "thinking", "reasoning": "text"}
# Fields that say whether a message counts in the loss where they are true or false: axolotl's and ms-swift's.
TRAINED = ("train", "loss")
THOUGHTS = ("reasoning_content", "reasoning")
MEDIA_FIELDS = ("image", "images", "image_url", "video", "videos", "audio", "audios")
_MOVED = ("role", "from", "content", "value", "refusal", "tool_calls", "function_call", *THOUGHTS, "weight")


def parsed(value: Any) -> Any:
    """A value, or the JSON list or object that a text holds: columns of tables often hold JSON as text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def without_nulls(value: Any) -> Any:
    """A value without the null fields of its objects: a table gives every row the fields of all rows."""
    if isinstance(value, dict):
        return {name: without_nulls(each) for name, each in value.items() if each is not None}
    if isinstance(value, list):
        return [without_nulls(each) for each in value]
    return value


def check_media(fields: dict) -> None:
    """Refuse a record or a message with pictures, sound or film: a text without them would be another one.

    Raises:
        BadDocument: there are some.
    """
    for name in MEDIA_FIELDS:
        if fields.get(name) not in (None, "", [], {}):
            raise BadDocument(MEDIA, f"its field {name!r}")


def _content(value: Any) -> tuple[str, str]:
    """Text and thoughts of a message's content: a string, or a list of parts."""
    if isinstance(value, str):
        return value, ""
    if value is None:
        return "", ""
    if not isinstance(value, list):
        raise BadDocument(NO_FIELDS, f"a message's content is a {type(value).__name__}")
    texts: list[str] = []
    thoughts: list[str] = []
    for part in value:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        for kinds, found in ((TEXT_PARTS, texts), (THOUGHT_PARTS, thoughts)):
            if kind in kinds and isinstance(part.get(kinds[kind]), str):
                found.append(part[kinds[kind]])
                break
        else:
            raise BadDocument(MEDIA, f"a part of a message's content is of type {str(kind)[:40]!r}")
    return "\n".join(texts), "\n".join(thoughts)


def _call(value: Any) -> dict:
    """One tool call as `{"id"?, "type": "function", "function": {"name", "arguments"}}`; arguments stay as given."""
    if not isinstance(value, dict):
        raise BadDocument(BAD_CALL, f"a tool call is a {type(value).__name__}")
    function = value.get("function") if isinstance(value.get("function"), dict) else value
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name.strip():
        raise BadDocument(BAD_CALL, f"its fields: {', '.join(map(str, value))[:200]}")
    if arguments is None:
        arguments = function.get("parameters", {})
    rest = {key: each for key, each in value.items() if key not in ("type", "function") and each is not None}
    if function is value:
        rest = {key: each for key, each in rest.items() if key not in ("name", "arguments", "parameters")}
    return {**rest, "type": "function", "function": {"name": name, "arguments": arguments}}


def _calls(message: dict, role: str, content: Any) -> tuple[str, list[dict]]:
    """Content and tool calls of a message, whatever the schema."""
    calls = parsed(message.get("tool_calls"))
    if calls is not None and not isinstance(calls, list):
        raise BadDocument(BAD_CALL, f"tool_calls are a {type(calls).__name__}")
    calls = list(calls or [])
    if message.get("function_call") is not None:
        calls.append(parsed(message["function_call"]))
    if role in CALLS:
        found = parsed(content)
        if isinstance(found, str):
            raise BadDocument(BAD_CALL, f"a {role} turn is no JSON")
        calls += found if isinstance(found, list) else [found]
        content = ""
    return content, [_call(call) for call in calls]


def _first(message: dict, names: tuple[str, ...]) -> Any:
    """The first of the fields that is not null."""
    return next((message[name] for name in names if message.get(name) is not None), None)


def _thoughts(message: dict) -> str:
    """Thoughts beside the content."""
    for name in THOUGHTS:
        given = message.get(name)
        if given is not None and not isinstance(given, str):
            raise BadDocument(NO_FIELDS, f"a message's {name} is a {type(given).__name__}")
    return next((given for name in THOUGHTS if (given := message.get(name)) and given.strip()), "")


def _counts(message: dict) -> bool:
    """Whether a message counts in the loss, as far as the message tells."""
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise BadDocument(BAD_WEIGHT, f"weight {str(weight)[:40]}")
    return weight != 0 and not any(message.get(name) is False for name in TRAINED)


def _role(value: dict) -> Any:
    role = value.get("role") if value.get("role") is not None else value.get("from")
    return role.lower() if isinstance(role, str) else role


def _is_turn_of(before: dict, call: dict) -> bool:
    """Whether a message that is a tool call has nothing that the assistant's message before it has otherwise."""
    return all(before.get(key) == each for key, each in call.items() if key not in ("content", "tool_calls")) and (
        before.get("weight") == call.get("weight")
    )


def message_of(value: Any) -> dict:
    """A message as `{"role", "content", ...}`, with `tool_calls`, `reasoning_content` and `weight` (0) if it has them.

    Raises:
        BadDocument: it cannot be carried.
    """
    if not isinstance(value, dict):
        raise BadDocument(NO_FIELDS, f"a message is a {type(value).__name__}")
    role = _role(value)
    if not isinstance(role, str) or role not in ROLES:
        raise BadDocument(NO_FIELDS, f"a message's role is {str(role)[:40]!r}, none of {', '.join(ROLES)}")
    check_media(value)
    said = _first(value, ("content", "value"))
    is_call = role in CALLS and isinstance(said, dict)  # a table has the call itself, and not its JSON
    content, thoughts = (json.dumps(said), "") if is_call else _content(said)
    content = "\n".join(text for text in (content, _content(value.get("refusal"))[0]) if text)
    content, calls = _calls(value, role, content)
    message: dict[str, Any] = {"role": ROLES[role], "content": content}
    if calls:
        message["tool_calls"] = calls
    thoughts = _thoughts(value) or thoughts
    if thoughts.strip():
        message["reasoning_content"] = thoughts
    if not _counts(value):
        message["weight"] = 0
    rest = {key: each for key, each in value.items() if key not in _MOVED and each is not None}
    return message | {key: each for key, each in rest.items() if key not in TRAINED or not isinstance(each, bool)}


def says_something(message: dict) -> bool:
    """Whether there is anything in a message."""
    return bool(message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content"))


def messages_of(value: Any) -> list[dict]:
    """Messages of a list, or of a text that holds one as JSON, without empty system messages and empty last ones."""
    value = parsed(value)
    if not isinstance(value, list):
        raise BadDocument(NO_FIELDS, f"messages are a {type(value).__name__} where a list is needed")
    messages: list[dict] = []
    for turn in value:
        if isinstance(turn, dict) and turn.keys() == EXCHANGE.keys():
            messages += [message_of({"role": role, "content": turn[name]}) for name, role in EXCHANGE.items()]
            continue
        message = message_of(turn)
        if _role(turn) == JOINED and messages and _is_turn_of(messages[-1], message):
            messages[-1] = messages[-1] | {"tool_calls": messages[-1].get("tool_calls", []) + message["tool_calls"]}
        else:
            messages.append(message)
    messages = [message for message in messages if message["role"] != "system" or says_something(message)]
    while messages and not says_something(messages[-1]):
        messages.pop()
    return messages


def tools_of(value: Any) -> list[dict]:
    """Tools as `[{"type": "function", "function": {...}}]`, from a list of those or of bare functions, or its JSON.

    Raises:
        BadDocument: something else.
    """
    value = parsed(value)
    if value is None or value in ("", [], {}):
        return []
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadDocument(BAD_TOOLS, f"tools are a {type(value).__name__}")
    return [
        {"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool for tool in value
    ]
