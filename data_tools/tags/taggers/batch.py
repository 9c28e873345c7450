"""The batch form of the endpoint tagger: requests as a file, and results from files, for a batch service.

Both are JSON lines as OpenAI's Batch API takes and gives them; vLLM's `run-batch` uses the same. A request has
`custom_id` (the key of its answer), `method`, `url` and `body`. A result has `custom_id` and `response`
(`status_code`, `body`) or `error`. Results may come in any order, in several files, and with those of other runs.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_ksa.data_tools.documents import BadDocument
from megatron_ksa.data_tools.readers import read_json_lines
from megatron_ksa.data_tools.tags.files import json_line
from megatron_ksa.data_tools.tags.taggers import Failure, prompt
from megatron_ksa.data_tools.tags.taggers.ask import take
from megatron_ksa.data_tools.tags.taggers.cache import AnswerCache
from megatron_ksa.data_tools.tags.taggers.chat import FORMATS, request_body, response_format
from megatron_ksa.data_tools.tags.taggers.endpoint import QUESTION, EndpointTagger
from megatron_ksa.data_tools.tags.taggers.prompt import BadAnswer
from megatron_ksa.data_tools.tags.taggers.reply import Unreachable, parse_completion, shown
from megatron_ksa.data_tools.tags.taggers.settings import EndpointSettings
from megatron_ksa.errors import UsageError
from megatron_ksa.files import whole_file

# OpenAI's limits of one file.
MOST_REQUESTS, MOST_BYTES = 50_000, 190_000_000
ENDPOINT = "/v1/chat/completions"


def numbered(path: Path, number: int) -> Path:
    """`requests.jsonl`, `requests-2.jsonl`, and so on."""
    return path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")


def write_requests(records: Path, path: Path, settings: EndpointSettings, cache_path: Path) -> dict:
    """Write a request for every question that the cache does not answer; returns counts.

    A file takes 50,000 requests and 190 MB; what is beyond goes to files with a number in their names.

    Args:
        records: `records.jsonl`.
        path: the first file.
    """
    cache = AnswerCache(cache_path)
    seen: set[str] = set()
    counts: Counter[str] = Counter(requests=0, answered=0, files=0)
    lines = _request_lines(EndpointTagger(settings, cache_path), records, settings, cache, seen, counts)
    try:
        line = next(lines, None)
        while line is not None:
            counts["files"] += 1
            with whole_file(numbered(path, counts["files"])) as stream:
                written = size = 0
                while line is not None and written < MOST_REQUESTS and size + len(line.encode()) <= MOST_BYTES:
                    stream.write(line)
                    written, size = written + 1, size + len(line.encode())
                    line = next(lines, None)
    finally:
        cache.close()
    return dict(counts)


def _request_lines(
    tagger: EndpointTagger,
    records: Path,
    settings: EndpointSettings,
    cache: AnswerCache,
    seen: set[str],
    counts: Counter,
) -> Iterator[str]:
    form = {} if "response_format" in settings.extra else response_format(FORMATS[0], prompt.SCHEMA)
    for key, messages in tagger.questions(records):
        if cache.get(key) is not None:
            counts["answered"] += 1
        elif key not in seen:
            seen.add(key)
            counts["requests"] += 1
            body = request_body(
                messages, model=settings.model, max_tokens=settings.max_tokens, extra=settings.extra,
                attempt=min(cache.spent(key).tries, settings.attempts),
            )  # fmt: skip
            yield json_line({"custom_id": key, "method": "POST", "url": ENDPOINT, "body": body | form})


class BatchTagger(EndpointTagger):
    """Takes answers from files of results; the cache keeps them, so that later files need to have the rest only.

    Args:
        settings: those with which the requests were written.
        cache: file of answers.
        results: files of results, JSON lines.
    """

    MISSING = Failure("no result in the batch", "--batch-out writes what is left", 0)

    def __init__(self, settings: EndpointSettings, cache: Path, results: list[Path]) -> None:
        super().__init__(settings, cache)
        self._results = results

    def _fill(self, cache: AnswerCache, records: Path, total: int) -> dict[str, Failure]:
        wanted = {key for key, _ in self.questions(records)}
        failures: dict[str, Failure] = {}
        unknown = 0
        for path in self._results:
            for origin, line in self._lines(path):
                result = self._result(line, origin)
                if result.get("custom_id") not in wanted:
                    unknown += 1
                    continue
                key = result["custom_id"]
                value = self._answer(result, cache, line)
                if not isinstance(value, Failure):
                    cache.put(key, value)
                elif key not in failures:
                    failures[key] = value
        if unknown:
            self._totals["results_of_other_records"] = unknown
        return failures

    def _lines(self, path: Path) -> Iterator[tuple[str, bytes]]:
        for document in read_json_lines(path, max_bytes=self._settings.max_bytes, flag="--batch-in"):
            try:
                yield document.origin, document.payload
            except BadDocument as error:
                raise UsageError(
                    f"--batch-in {document.origin}: {error.detail} in a line (--llm-max-reply-bytes)"
                ) from None

    def _result(self, line: bytes, origin: str) -> dict:
        try:
            result = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"--batch-in {origin}: {type(error).__name__}: {error}; fetch the results again") from None
        if not isinstance(result, dict) or not isinstance(result.get("custom_id"), str):
            raise UsageError(f"--batch-in {origin}: no result with a custom_id; give the file that the batch wrote")
        return result

    def _answer(self, result: dict, cache: AnswerCache, line: bytes) -> Any | Failure:
        """The answer in a result, as JSON, or why there is none."""
        response = result.get("response")
        response = response if isinstance(response, dict) else {}
        body, status = response.get("body"), response.get("status_code")
        if result.get("error") is not None or status != 200:
            said = json.dumps(result.get("error") or body, ensure_ascii=True)
            reason = f"HTTP {status}" if isinstance(status, int) and 200 < status < 1000 else "batch error"
            return Failure(reason, shown(said))
        try:
            reply = parse_completion(body)
        except Unreachable as error:
            return Failure(error.reason, str(error))
        # The same file may be read again, and its cost must not count again.
        if cache.first_time(hashlib.sha256(line).hexdigest()):
            cache.spend(result["custom_id"], reply.prompt_tokens, reply.answer_tokens)
        try:
            return take(reply, QUESTION, self._settings)
        except BadAnswer as error:
            return Failure(error.reason, str(error))
