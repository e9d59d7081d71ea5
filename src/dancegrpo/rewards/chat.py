"""Chat completions of any OpenAI-compatible endpoint: asked with bounded patience, read with suspicion."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from threading import Event
from typing import Any

from dancegrpo.errors import RewardError
from dancegrpo.redaction import HIDDEN, redact, remember

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""HTTP statuses after which the same request may succeed."""
LONGEST_WAIT = 60.0
"""Seconds: the most a request waits between two tries, whatever `Retry-After` asks for."""
LARGEST_ANSWER = 8_000_000
"""Bytes; a score never takes more, and a broken server must not fill the memory."""


class ScoreError(Exception):
    """Why one sample has no score; `status` is the HTTP status where the server refused."""

    def __init__(self, cause: str, status: int | None = None) -> None:
        super().__init__(" ".join(cause.split()))
        self.status = status


class Endpoint:
    """`URL/chat/completions` with bounded patience: every error names the URL, none the key."""

    def __init__(
        self, url: str, api_key_env: str | None = None, *, timeout: float, retries: int, connections: int
    ) -> None:
        import httpx

        at_least(0, retries=retries)
        at_least(1, concurrency=connections)
        if not timeout > 0:
            raise RewardError(f"timeout={timeout} of the vlm judge is no time: give seconds above 0.")
        self.url = f"{_base_url(url)}/chat/completions"
        self.key = _key(api_key_env)
        self.timeout, self.retries, self.stopped = timeout, retries, Event()
        self.hangs = False
        """Whether a request's last try ended with the time up, and no other was answered since."""
        self.client = httpx.Client(
            timeout=timeout,
            limits=httpx.Limits(max_connections=connections),
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
        )

    def post(self, body: Mapping[str, Any]) -> Any:
        """The answer to one request, as parsed JSON. Raises ScoreError after the last try."""
        import httpx

        # A server that hangs costs `timeout` per try: the requests that wait behind one another make one each.
        tries = 1 if self.hangs else self.retries + 1
        for attempt in range(tries):
            delay = min(0.5 * 2**attempt, LONGEST_WAIT)
            try:
                response = self._send(body)
            except httpx.HTTPError as error:
                failure = ScoreError(f"{self.url} cannot be reached: {type(error).__name__} {self._clean(str(error))}")
                late = isinstance(error, httpx.ReadTimeout)
            else:
                late = False
                if response.status_code == 200:
                    self.hangs = False
                    return self._parse(response)
                text = self._clean(response.text)
                failure = ScoreError(f"{self.url} answered {response.status_code}: {text}", response.status_code)
                if response.status_code not in RETRIED:
                    break
                delay = min(_retry_after(response.headers.get("retry-after")) or delay, LONGEST_WAIT)
            if attempt + 1 < tries and self.stopped.wait(delay):
                break
        self.hangs = late
        raise failure

    def _send(self, body: Mapping[str, Any]) -> Any:
        """One try, within `timeout` seconds in all: httpx's own timeout starts anew with every byte."""
        import httpx

        deadline, content = time.monotonic() + self.timeout, bytearray()
        with self.client.stream("POST", self.url, json=dict(body)) as response:
            for chunk in response.iter_bytes():
                content += chunk
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the answer takes too long")
                if len(content) > LARGEST_ANSWER:
                    raise ScoreError(f"{self.url} answered more than {LARGEST_ANSWER} bytes")
            # The bytes are decompressed already.
            headers = {k: v for k, v in response.headers.items() if k not in ("content-encoding", "content-length")}
            return httpx.Response(response.status_code, headers=headers, content=bytes(content))

    def _parse(self, response: Any) -> Any:
        try:
            return response.json()
        except (ValueError, RecursionError) as error:
            raise ScoreError(f"{self.url} answered something that is not JSON") from error

    def _clean(self, text: str) -> str:
        """The beginning of what a server says; some repeat the key."""
        return " ".join(redact(text.replace(self.key, HIDDEN) if self.key else text).split())[:200]


@dataclass(frozen=True)
class Answer:
    """What the model wrote, and per token its bytes and the log-probabilities of it and its alternatives."""

    text: str
    tokens: tuple[tuple[bytes, Mapping[bytes, float]], ...] | None
    cut: bool = False
    """Whether the server stopped the model at the token limit."""

    @staticmethod
    def read(answer: Any) -> Answer:
        """A chat completion's first choice. Raises ScoreError for anything else."""
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"]
            listed = (choice.get("logprobs") or {}).get("content")
            tokens = None if not listed else tuple((_bytes(entry), _alternatives(entry)) for entry in listed)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ScoreError("the server's answer is no chat completion") from error
        if not isinstance(text, str):
            raise ScoreError("the model answered without text")
        return Answer(text, tokens, cut=choice.get("finish_reason") == "length")


def _alternatives(entry: Mapping[str, Any]) -> dict[bytes, float]:
    """Log-probability by token, the token written among them. A server may list it twice; it counts once."""
    found = {_bytes(other): float(other["logprob"]) for other in [*(entry.get("top_logprobs") or ()), entry]}
    if not all(log_prob <= 1e-3 for log_prob in found.values()):
        raise ValueError("a log-probability above 0")
    return found


def _bytes(entry: Mapping[str, Any]) -> bytes:
    # Servers write the pieces of a character that several tokens share as bytes; as text they are lost.
    told = entry.get("bytes")
    return bytes(told) if told and isinstance(told, list) else str(entry["token"]).encode("utf-8", "replace")


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait: the header holds seconds or a date."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return seconds if seconds > 0 else None


def _base_url(url: str) -> str:
    import httpx

    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise RewardError(f"url={url!r} of the vlm judge is no URL: write it as http://host:port/v1.") from error
    if parsed.userinfo or parsed.query:
        raise RewardError("the vlm judge's url holds a user or a query: name the key's variable in `api_key_env`.")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise RewardError(f"url={url!r} of the vlm judge is no web address: write it as http://host:port/v1.")
    return url.rstrip("/").removesuffix("/chat/completions")


def _key(variable: str | None) -> str | None:
    key = os.environ.get(variable, "").strip() if variable is not None else None
    if variable is not None and not key:
        raise RewardError(f"api_key_env={variable!r} of the vlm judge is not set: export the variable with the key.")
    if key and not all("!" <= letter <= "~" for letter in key):
        # Refused here: the library's own message about such a header quotes it.
        raise RewardError(f"the key in {variable} has characters that no header carries: export one line of ASCII.")
    return remember(key) if key else None


def at_least(bound: int, **options: Any) -> None:
    """Refuse options that are no whole numbers of `bound` or more."""
    for name, value in options.items():
        if type(value) is not int or value < bound:
            raise RewardError(f"{name}={value!r} of the vlm judge: give a whole number of {bound} or more.")
