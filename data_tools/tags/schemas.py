"""The schemas of instruction data that are recognised by their fields; each gives messages, tools or a text.

In this order, null fields counting as absent: preference pairs (`chosen`, `rejected`: the chosen side), `messages`
(OpenAI) or `conversations` (ShareGPT), `instruction` and `output` (Alpaca) or `response` (Dolly), other pairs of a
question and its answer, `text`.
"""

from typing import Any

from megatron_ksa.data_tools.documents import BadDocument
from megatron_ksa.data_tools.tags.messages import NO_FIELDS, messages_of, parsed, tools_of

LISTS = ("messages", "conversations", "conversation")
PAIRS = (
    ("instruction", "output"), ("instruction", "response"), ("question", "answer"), ("question", "response"),
    ("prompt", "completion"), ("prompt", "response"), ("query", "response"), ("query", "answer"),
    ("problem", "solution"),
)  # fmt: skip
PROMPTS = ("prompt", "instruction", "question", "query")
# Beside a question: what it is asked about.
CONTEXTS = ("input", "context")
SYSTEMS = ("system", "system_prompt")
# Whether an answer is one to learn.
LABELS = ("label", "kto_tag")
TOOLS = ("tools", "functions")
BAD_HISTORY, NOT_PREFERRED = "history that is no list of pairs", "marked as not preferred"


def field(fields: dict, name: str) -> Any:
    """The field of a name, or of a path with dots (`data.question`, `turns.0.text`); None where there is none."""
    if name in fields:
        return fields[name]
    value: Any = fields
    for part in name.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value.strip() else ""


def _first_text(fields: dict, names: tuple[str, ...]) -> str:
    return next((text for text in (_text(fields.get(name)) for name in names) if text), "")


def _history(value: Any) -> list[dict]:
    """Earlier turns: Alpaca's pairs of a question and its answer, or messages."""
    value = parsed(value)
    if value is None or value in ("", []):
        return []
    if isinstance(value, list) and all(isinstance(pair, dict) for pair in value):
        return messages_of(value)
    turns: list[dict] = []
    if not isinstance(value, list):
        raise BadDocument(BAD_HISTORY, f"history is a {type(value).__name__}")
    for pair in value:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise BadDocument(BAD_HISTORY, f"a part of it is {str(pair)[:60]!r}")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def turns_or_text(value: Any) -> Any:
    """A list of messages where a value is one, or a text that holds one as JSON; else the value."""
    found = parsed(value)
    return found if isinstance(found, list) and found and all(isinstance(turn, dict) for turn in found) else value


def exchange(fields: dict, prompt: Any, response: Any, extra: str = "") -> list[dict]:
    """Messages of a question and its answer, each a text or a list of messages; `extra` is what it is asked about."""
    asked = prompt if isinstance(prompt, list) else None
    if asked is None:
        text = "\n\n".join(part for part in (_text(prompt), extra) if part)
        asked = [{"role": "user", "content": text}] if text else []
    answered = response
    if isinstance(response, dict):
        answered = [response]
    elif not isinstance(response, list):
        answered = [{"role": "assistant", "content": response}] if _text(response) else []
    return _history(fields.get("history")) + messages_of([*asked, *answered])


def _check_preferred(fields: dict) -> None:
    """Refuse an answer that is there to be unlearned: TRL's and ms-swift's `label`, LLaMA-Factory's `kto_tag`."""
    for name in LABELS:
        if fields.get(name) is False:
            raise BadDocument(NOT_PREFERRED, f"{name} is false")


def _preferred(fields: dict) -> list[dict] | None:
    """Messages with the chosen side of a preference pair."""
    chosen = parsed(fields.get("chosen"))
    if chosen is None or fields.get("rejected") is None:
        return None
    for name in LISTS:
        if fields.get(name) is not None:
            answered = [chosen] if isinstance(chosen, dict) else chosen
            answered = [{"role": "assistant", "content": answered}] if isinstance(answered, str) else answered
            return messages_of(parsed(fields[name])) + messages_of(answered)
    prompt = next((parsed(fields[name]) for name in PROMPTS if fields.get(name) is not None), None)
    if isinstance(chosen, list) and len(chosen) > 1:
        return messages_of(chosen)  # the whole conversation, its prompt included
    return exchange(fields, prompt, chosen, _first_text(fields, CONTEXTS))


def recognised(fields: dict) -> dict:
    """The `messages` or `text` of a record, by the schema that its fields tell.

    Raises:
        BadDocument: none, or a record that cannot be carried whole.
    """
    preferred = _preferred(fields)
    if preferred is not None:
        return {"messages": preferred}
    for name in LISTS:
        if fields.get(name) is not None:
            _check_preferred(fields)
            return {"messages": _history(fields.get("history")) + messages_of(fields[name])}
    for asked, answered in PAIRS:
        prompt, response = turns_or_text(fields.get(asked)), turns_or_text(fields.get(answered))
        if isinstance(prompt, str | list) and isinstance(response, str | list):
            _check_preferred(fields)
            return {"messages": exchange(fields, prompt, response, _first_text(fields, CONTEXTS))}
    if isinstance(fields.get("text"), str):
        return {"text": fields["text"]}
    raise BadDocument(NO_FIELDS, f"its fields: {', '.join(map(repr, fields))[:200] or 'none'}")


def with_beside(body: dict, system: Any, tools: Any) -> dict:
    """The body with the system turn and the tools that stand beside its messages."""
    if "messages" not in body:
        return body
    messages = body["messages"]
    turns = messages_of([{"role": "system", "content": system}])
    first = messages[0] if messages else {}
    if turns and not (first.get("role") == "system" and first["content"] == turns[0]["content"]):
        messages = turns + messages
    found = tools_of(tools)
    return {"messages": messages, **({"tools": found} if found else {})}
