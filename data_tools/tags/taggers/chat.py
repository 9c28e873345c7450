"""One request to an OpenAI-compatible chat endpoint, and what can go wrong with it."""

import asyncio
import json
import time
from functools import partial

import httpx

from megatron_ksa.data_tools.tags.taggers.pace import Pace, pause_seconds
from megatron_ksa.data_tools.tags.taggers.reply import Reply, Unreachable, parse_body, read_body, shown

# Ways to ask for JSON, strictest first; an endpoint that does not know one is asked in the next.
FORMATS = ("json_schema", "json_object", "text")
# An error's text is read up to this, bytes.
ERROR_BYTES = 10_000
# Names under which endpoints take the longest answer.
LIMITS = ("max_tokens", "max_completion_tokens")


class Refused(Exception):
    """The endpoint will not answer this request, however often it is asked; `for_all`: nor any other."""

    def __init__(self, message: str, *, for_all: bool) -> None:
        super().__init__(message)
        self.for_all = for_all


def request_body(messages: list[dict], *, model: str, max_tokens: int, extra: dict, attempt: int = 0) -> dict:
    """The body of a request, without the form of its answer.

    Args:
        extra: fields to add; null takes a field out, and another name for the longest answer replaces `max_tokens`.
        attempt: a first answer that does not count would come again at temperature 0.
    """
    body = {"model": model, "messages": messages, "temperature": 0.7 if attempt else 0.0, "seed": attempt}
    if not any(name in extra for name in LIMITS):
        body["max_tokens"] = max_tokens
    return {name: value for name, value in (body | extra).items() if value is not None}


def response_format(form: str, schema: dict) -> dict:
    """The field that asks for an answer in one of `FORMATS`."""
    if form == "json_schema":
        described = {"name": "answer", "strict": True, "schema": schema}
        return {"response_format": {"type": "json_schema", "json_schema": described}}
    return {"response_format": {"type": "json_object"}} if form == "json_object" else {}


class ChatClient:
    """Asks `URL/chat/completions`; an async context manager.

    Args:
        url: base URL.
        model: name of the model.
        api_key: sent as a bearer token, never shown, or None.
        timeout: seconds from the request to the last byte of its reply.
        max_tokens: longest answer.
        max_bytes: longest reply, before and after unpacking.
        extra: as `request_body` takes it.
        schema: JSON schema of the answer.
        connections: requests at a time, at most.
    """

    def __init__(
        self,
        url: str,
        model: str,
        api_key: str | None,
        *,
        timeout: float,
        max_tokens: int,
        max_bytes: int,
        extra: dict,
        schema: dict,
        connections: int,
    ) -> None:
        self.url = url
        self._url = url.rstrip("/") + "/chat/completions"
        self._key, self._timeout, self._schema, self._max_bytes = api_key, timeout, schema, max_bytes
        self._body = partial(request_body, model=model, max_tokens=max_tokens, extra=extra)
        self._form = len(FORMATS) - 1 if "response_format" in extra else 0
        self.pace = Pace(connections)
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._client = httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits)

    async def __aenter__(self) -> "ChatClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def ask(self, messages: list[dict], attempt: int) -> Reply:
        """One reply; an endpoint that does not know JSON schemas is asked again in a plainer form, for good.

        Raises:
            Refused: 400, 401, 403, 404 and their like.
            Unreachable: no connection, a timeout, a reply cut off or too large, 408, 429, 5xx, or a reply that is no
                chat completion.
        """
        form = self._form
        body = self._body(messages, attempt=attempt)
        while True:
            status, headers, content = await self._paced(body | response_format(FORMATS[form], self._schema))
            if status in (400, 415, 422, 501) and form + 1 < len(FORMATS):
                form += 1
                continue
            break
        if status != 200:
            said = f"HTTP {status}: {self._shown(content.decode('utf-8', 'replace'))}"
            if status in (408, 409, 425, 429) or status >= 500:
                raise Unreachable(f"HTTP {status}", said)
            raise Refused(said, for_all=status in (301, 302, 307, 308, 401, 402, 403, 404, 405))
        self._form = max(self._form, form)
        # A key that the endpoint repeats must not become a tag.
        return parse_body(content.replace(self._key.encode(), b"[key]") if self._key else content)

    async def _paced(self, body: dict) -> tuple[int, httpx.Headers, bytes]:
        """`_post` within the endpoint's pace, which follows what came of it."""
        async with self.pace:
            started = time.monotonic()
            try:
                status, headers, content = await self._post(body)
            except Unreachable as error:
                if error.reason == "timeout":
                    self.pace.overloaded(started)
                raise
            if status in (429, 503):
                self.pace.overloaded(started)
                self.pace.pause(pause_seconds(headers.get("Retry-After"), headers.get("Date")))
            else:
                self.pace.succeeded()
            return status, headers, content

    async def _post(self, body: dict) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and body of a reply."""
        try:
            # httpx limits the wait for each piece; a reply that drips needs a limit on the whole.
            async with asyncio.timeout(self._timeout), self._client.stream("POST", self._url, json=body) as response:
                good = response.status_code == 200
                most, encoding = self._max_bytes if good else ERROR_BYTES, response.headers.get("Content-Encoding", "")
                try:
                    content = await read_body(response.aiter_raw(), encoding, most, cut=not good)
                except Unreachable as error:
                    if good:
                        raise
                    content = str(error).encode()  # the status tells more
                return response.status_code, response.headers, content
        except (TimeoutError, httpx.TimeoutException):
            raise Unreachable("timeout", f"no reply in {self._timeout:g} s") from None
        except httpx.ConnectError as error:
            raise Unreachable("no connection", self._shown(str(error))) from None
        except httpx.TransportError as error:
            raise Unreachable("connection lost", self._shown(str(error) or type(error).__name__)) from None

    def _shown(self, text: str) -> str:
        return shown(text, self._key)


def extra_body(text: str | None) -> dict:
    """Fields of a request from a flag's JSON.

    Raises:
        ValueError: no JSON object, or one that replaces the messages.
    """
    if text is None:
        return {}
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    for name in ("messages", "stream", "n"):
        if name in value:
            raise ValueError(f"{name} cannot be set")
    return value
