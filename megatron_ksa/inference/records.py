"""Prompts from JSONL and their texts to JSONL: bad records are reported, a run that was cut short goes on."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_ksa.config.sampling import SamplingSettings
from megatron_ksa.data_tools.documents import BadDocument, RawDocument, json_object
from megatron_ksa.data_tools.readers import read_documents
from megatron_ksa.errors import UsageError
from megatron_ksa.files import whole_file, writing
from megatron_ksa.inference.generator import Completion, Request

SAMPLING = {field.name for field in dataclasses.fields(SamplingSettings)}


@dataclass(frozen=True)
class Record:
    """A line of the input.

    Attributes:
        index: number among the input's records, from 0.
        origin: file and line.
        fields: what it says, which goes to the output as it is.
        problem: why it cannot run, or None.
    """

    index: int
    origin: str
    fields: dict[str, Any]
    prompt: str = ""
    sampling: SamplingSettings | None = None
    problem: str | None = None


def _parse(index: int, document: RawDocument, prompt: str, defaults: SamplingSettings) -> Record:
    origin = document.origin
    try:
        fields = json_object(document.payload)
    except BadDocument as error:
        return Record(index, origin, {}, problem=str(error))
    text = fields.get(prompt)
    if not isinstance(text, str):
        problem = f"no field {prompt!r}" if text is None else f"{prompt!r} is a {type(text).__name__}, no text"
        return Record(index, origin, fields, problem=problem)
    given = {name: fields[name] for name in SAMPLING & fields.keys()}
    if isinstance(stop := given.get("stop"), str | list):
        given["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    try:
        return Record(index, origin, fields, text, dataclasses.replace(defaults, **given))
    except UsageError as error:
        return Record(index, origin, fields, problem=str(error))


def read_records(path: Path, prompt: str, defaults: SamplingSettings) -> list[Record]:
    """All records of a JSONL file.

    Args:
        prompt: the field that holds the prompt; fields named as those of `SamplingSettings` go before `defaults`.

    Raises:
        UsageError: the file cannot be read, or has no records.
    """
    try:
        documents = list(read_documents([path]))
    except OSError as error:
        raise UsageError(f"--input {path} cannot be read: {error.strerror}") from None
    if not documents:
        raise UsageError(f"--input {path} has no records")
    return [_parse(index, document, prompt, defaults) for index, document in enumerate(documents)]


def line(record: Record, request: Request, completion: Completion) -> dict[str, Any]:
    """What the output says of a record that ran."""
    return {
        "index": record.index, "input": record.fields, "text": completion.text, "finish": completion.finish,
        "prompt_tokens": len(request.prompt), "new_tokens": len(completion.tokens),
    }  # fmt: skip


def error_line(record: Record, problem: str) -> dict[str, Any]:
    """What the output says of a record that could not run."""
    return {"index": record.index, "input": record.fields, "origin": record.origin, "error": problem}


def _json_line(value: dict[str, Any]) -> str:
    """An object's line, in UTF-8 where that can say it: half of a surrogate pair stays escaped, as it was given."""
    found = json.dumps(value, ensure_ascii=False)
    try:
        found.encode("utf-8")
    except UnicodeEncodeError:
        found = json.dumps(value)
    return found + "\n"


class Texts:
    """The output while it grows: `OUTPUT.running`, a header and then a line a record in the order in which they end.

    Attributes:
        done: index -> the line that an earlier run wrote.
    """

    def __init__(self, stream: IO[str], done: dict[int, dict[str, Any]]) -> None:
        self._stream, self.done = stream, done

    def add(self, found: dict[str, Any]) -> None:
        """Write a record's line; it outlasts the process."""
        self.done[found["index"]] = found
        self._stream.write(_json_line(found))
        self._stream.flush()


def _read_running(running: Path, header: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Lines of an earlier run; one that was cut is left out."""
    try:
        whole = running.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise UsageError(f"{running} cannot be read: {error.strerror}") from None
    if not whole:
        return {}
    try:
        known, *lines = [json.loads(text) for text in whole]
        lines = [found for found in lines if "error" not in found and isinstance(found["index"], int)]
        known.keys()
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"{running} is no output of a run that was cut ({error}): remove it") from None
    if known != header:
        differing = sorted(name for name in known.keys() | header.keys() if known.get(name) != header.get(name))
        raise UsageError(
            f"{running} is of a run with other settings ({', '.join(differing)}): repeat them to go on, or remove it"
        )
    # What could not run is looked at again.
    return {found["index"]: found for found in lines}


def _write(path: Path, lines: list[dict[str, Any]]) -> None:
    with whole_file(path) as stream:
        for each in lines:
            stream.write(_json_line(each))


@contextmanager
def texts(output: Path, header: dict[str, Any]) -> Iterator[Texts]:
    """The output of a run, which takes its name when the body ends, with lines in the order of the input.

    Args:
        header: what the lines depend on; a run goes on with another's lines if it is the same.

    Raises:
        UsageError: an output that exists, or one of other settings that is under way; a full disk.
    """
    running = output.with_name(output.name + ".running")
    if output.exists():
        raise UsageError(f"--output {output} exists: choose another or remove it")
    header = json.loads(json.dumps(header))
    try:
        done = _read_running(running, header) if running.exists() else {}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{running} is no output of this program that was cut short: remove it") from None
    _write(running, [header, *done.values()])
    with writing(running), open(running, "a", encoding="utf-8", newline="\n") as stream:
        yield Texts(stream, done)
    _write(output, [done[index] for index in sorted(done)])
    running.unlink()
