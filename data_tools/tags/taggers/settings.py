"""Settings of a chat endpoint: --llm-..., for tags and for the names of branches."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from megatron_ksa.config.options import option
from megatron_ksa.data_tools.tags.taggers.chat import extra_body
from megatron_ksa.errors import UsageError

MOST_REPLY_BYTES = 1 << 30


@dataclass(frozen=True)
class EndpointSettings:
    """One or several OpenAI-compatible chat endpoints, for --tagger llm and --name-branches.

    Raises:
        UsageError: a value out of range, or a URL that holds a secret.
    """

    url: str | None = option(
        None, "Base URL up to and with /v1, such as http://localhost:8000/v1; several with commas.", flag="--llm-url"
    )
    model: str = option("default", "Model name that the endpoint knows.", flag="--llm-model")
    key_variable: str = option(
        "OPENAI_API_KEY",
        "Environment variable that holds the API key; no key is sent where it is unset.",
        flag="--llm-key-variable",
    )
    concurrency: int = option(
        16,
        "Requests at a time to each endpoint, at most; fewer while it answers 429 or 503 or not in time.",
        flag="--llm-concurrency",
    )
    attempts: int = option(5, "Tries of a record before it is listed as failed.", flag="--llm-attempts")
    backoff: float = option(
        1.0, "Seconds before the second try; doubled from try to try, up to 60.", flag="--llm-backoff"
    )
    timeout: float = option(120.0, "Seconds that one request may take.", flag="--llm-timeout")
    max_tokens: int = option(
        512, "Longest answer, tokens; a changed limit asks again about failed records only.", flag="--llm-max-tokens"
    )
    max_bytes: int = option(
        4_000_000, "Longest reply, bytes, before and after unpacking.", flag="--llm-max-reply-bytes"
    )
    extra_text: str | None = option(
        None,
        'JSON object of fields for every request, such as {"max_completion_tokens": 4000} or '
        '{"chat_template_kwargs": {"enable_thinking": false}}; null takes a field out.',
        flag="--llm-extra-body",
    )
    characters: int = option(12_000, "Longest text shown; of a longer one the two ends.", flag="--llm-characters")
    input_price: float = option(0.0, "Price of a million prompt tokens, for the cost count.", flag="--llm-input-price")
    output_price: float = option(0.0, "Price of a million answer tokens.", flag="--llm-output-price")

    def __post_init__(self) -> None:
        for name in ("concurrency", "attempts", "max_tokens", "characters"):
            if not 1 <= getattr(self, name) <= 10**9:
                raise UsageError(f"--llm-{name.replace('_', '-')} {getattr(self, name)}: from 1 to a thousand million")
        for name in ("backoff", "timeout", "input_price", "output_price"):
            if not 0 <= getattr(self, name) <= 1e9:
                raise UsageError(f"--llm-{name.replace('_', '-')} {getattr(self, name)}: from 0 to a thousand million")
        if not self.timeout:
            raise UsageError("--llm-timeout 0: above 0, seconds")
        if not 1 <= self.max_bytes <= MOST_REPLY_BYTES:
            raise UsageError(f"--llm-max-reply-bytes {self.max_bytes}: from 1 to {MOST_REPLY_BYTES:,}")
        try:
            extra_body(self.extra_text)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"--llm-extra-body: {error}; give a JSON object such as '{{\"max_completion_tokens\": 4000}}'"
            ) from None
        for url in self.urls:
            _check_url(url)

    @property
    def urls(self) -> list[str]:
        """The endpoints, each once."""
        return list(dict.fromkeys(url.strip() for url in (self.url or "").split(",") if url.strip()))

    @property
    def extra(self) -> dict:
        """Fields for every request."""
        return extra_body(self.extra_text)


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good:
        raise UsageError("--llm-url: give http://HOST:PORT/v1 or https://HOST/v1")
    if parts.username or parts.password or parts.query:
        raise UsageError("--llm-url: no user, password or query in the URL; the key comes from --llm-key-variable")
