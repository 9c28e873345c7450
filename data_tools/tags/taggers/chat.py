"""One request to an OpenAI-compatible chat endpoint, and what can go wrong with it."""

import asyncio
import json
import time
from dataclasses import dataclass

import httpx

# Ways to ask for JSON, strictest first; an endpoint that does not know one is asked in the next.
FORMATS = ("json_schema", "json_object", "text")
LONGEST_RETRY_AFTER = 120.0


class Refused(Exception):
    """The endpoint will not answer this request, however often it is asked; `for_all`: nor any other."""

    def __init__(self, message: str, *, for_all: bool) -> None:
        super().__init__(message)
        self.for_all = for_all


class Unreachable(Exception):
    """No usable reply this time; `reason` can be counted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Reply:
    """A reply's message, whatever it is, and the tokens that the endpoint counted."""

    content: object
    prompt_tokens: int
    answer_tokens: int


class ChatClient:
    """Asks `URL/chat/completions`; an async context manager.

    Args:
        url: base URL.
        model: name of the model.
        api_key: sent as a bearer token, never shown, or None.
        timeout: seconds from the request to the last byte of its reply.
        max_tokens: longest answer.
        schema: JSON schema of the answer.
        connections: requests at a time.
    """

    def __init__(
        self,
        url: str,
        model: str,
        api_key: str | None,
        *,
        timeout: float,
        max_tokens: int,
        schema: dict,
        connections: int,
    ) -> None:
        self._url = url.rstrip("/") + "/chat/completions"
        self._key, self._timeout, self._schema = api_key, timeout, schema
        self._body = {"model": model, "max_tokens": max_tokens}
        self._format = 0
        self._not_before = 0.0
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._client = httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits)

    async def __aenter__(self) -> "ChatClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    def retry_after(self) -> float:
        """Seconds that the endpoint asked to be left alone."""
        return max(0.0, self._not_before - time.monotonic())

    def _request(self, messages: list[dict], attempt: int, form: int) -> dict:
        # A first answer that does not count would come again at temperature 0.
        body = self._body | {"messages": messages, "temperature": 0.7 if attempt else 0.0, "seed": attempt}
        if FORMATS[form] == "json_schema":
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "tags", "strict": True, "schema": self._schema},
            }
        elif FORMATS[form] == "json_object":
            body["response_format"] = {"type": "json_object"}
        return body

    def _shown(self, text: str) -> str:
        """The start of what an endpoint said, in one line, without the key that it may repeat."""
        if self._key:
            text = text.replace(self._key, "[key]")
        return " ".join(text[:300].split())

    async def ask(self, messages: list[dict], attempt: int) -> Reply:
        """One reply; an endpoint that does not know JSON schemas is asked again in a plainer form, for good.

        Raises:
            Refused: 400, 401, 403, 404 and their like.
            Unreachable: no connection, a timeout, a reply cut off, 408, 429, 5xx, or a reply that is no chat
            completion.
        """
        form = self._format
        while True:
            response = await self._post(self._request(messages, attempt, form))
            if response.status_code in (400, 415, 422, 501) and form + 1 < len(FORMATS):
                form += 1
                continue
            break
        self._check(response)
        self._format = max(self._format, form)
        return self._parse(response)

    async def _post(self, body: dict) -> httpx.Response:
        try:
            # httpx limits the wait for each piece; a reply that drips needs a limit on the whole.
            async with asyncio.timeout(self._timeout):
                return await self._client.post(self._url, json=body)
        except (TimeoutError, httpx.TimeoutException):
            raise Unreachable("timeout", f"no reply in {self._timeout:g} s") from None
        except httpx.ConnectError as error:
            raise Unreachable("no connection", self._shown(str(error))) from None
        except httpx.TransportError as error:
            raise Unreachable("connection lost", self._shown(str(error) or type(error).__name__)) from None
        except httpx.DecodingError as error:
            raise Unreachable("broken reply", self._shown(str(error))) from None

    def _check(self, response: httpx.Response) -> None:
        status = response.status_code
        if status == 200:
            return
        said = f"HTTP {status}: {self._shown(response.text)}"
        if status == 429 or status == 503:
            self._not_before = time.monotonic() + _seconds(response.headers.get("Retry-After"))
        if status in (408, 409, 425, 429) or status >= 500:
            raise Unreachable(f"HTTP {status}", said)
        raise Refused(said, for_all=status in (301, 302, 307, 308, 401, 402, 403, 404, 405))

    def _parse(self, response: httpx.Response) -> Reply:
        try:
            value = json.loads(response.content)
            content = value["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise Unreachable(
                "broken reply", f"no chat completion: {type(error).__name__} {self._shown(str(error))}"
            ) from None
        usage = value.get("usage") if isinstance(value.get("usage"), dict) else {}
        return Reply(content, _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")))


def _count(value: object) -> int:
    return value if isinstance(value, int) and value >= 0 else 0


def _seconds(retry_after: str | None) -> float:
    """Seconds of a Retry-After header; its form with a date counts as none."""
    try:
        return min(max(float(retry_after or 0), 0.0), LONGEST_RETRY_AFTER)
    except ValueError:
        return 0.0
