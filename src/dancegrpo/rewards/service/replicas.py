"""The servers a client knows: which one to ask next, and one exchange with one of them."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from dancegrpo.errors import RewardError
from dancegrpo.rewards.service.wire import PROTOCOL, SAFETENSORS, shorten

if TYPE_CHECKING:
    from httpx import Client, Response

_HEALTH_BYTES = 1 << 16
_BYTES_PER_SAMPLE, _BYTES_BESIDES = 1 << 13, 1 << 20
_LONGEST_REST = 30.0
_TRY_LATER = (408, 429, 500, 502, 503, 504)


class ExchangeError(Exception):
    """An exchange without an answer. for_good: asking this server again with the same request would change nothing.
    late: the time for an answer was up.
    """

    def __init__(self, reason: str, *, for_good: bool = False, late: bool = False) -> None:
        super().__init__(reason)
        self.for_good, self.late = for_good, late


class TokenError(ExchangeError):
    """The server asks for another token."""


@dataclass(frozen=True)
class Health:
    """What a server says of itself. judge: what is scored by, the same line on every replica."""

    judge: str
    batch_size: int | None
    max_samples: int
    max_request_bytes: int

    @staticmethod
    def read(told: Any) -> Health:
        """From `/health`'s JSON. Raises ExchangeError for another program's answer."""
        if not isinstance(told, dict) or told.get("service") != "dancegrpo reward":
            raise ExchangeError("something other than a reward service answered")
        if told.get("protocol") != PROTOCOL:
            raise ExchangeError(
                f"it speaks protocol {shorten(told.get('protocol'))}, this client {PROTOCOL}", for_good=True
            )
        numbers = [told.get("batch_size") or 1, told.get("max_samples"), told.get("max_request_bytes")]
        if not isinstance(told.get("judge"), str) or not all(isinstance(n, int) and n >= 1 for n in numbers):
            raise ExchangeError("its health report is incomplete")
        if told.get("ready") is not True:
            raise ExchangeError("it is not ready")
        return Health(told["judge"], told.get("batch_size"), told["max_samples"], told["max_request_bytes"])


class Replicas:
    """Servers of one judge, asked in turn. One that failed rests, twice as long each time, then gets another chance."""

    def __init__(self, urls: Sequence[str], rest: float) -> None:
        self.urls = tuple(urls)
        self._rest = rest
        self._lock = threading.Lock()
        self._turn = 0
        self._fails = dict.fromkeys(self.urls, 0)
        self._rests_until = dict.fromkeys(self.urls, 0.0)

    def choose(self, barred: Collection[str] = ()) -> str | None:
        """The next server that works as far as is known, else the one whose rest ends first; None if all are barred."""
        with self._lock:
            count, now = len(self.urls), time.monotonic()
            order = [self.urls[(self._turn + i) % count] for i in range(count)]
            allowed = [url for url in order if url not in barred]
            if not allowed:
                return None
            awake = [url for url in allowed if self._rests_until[url] <= now]
            url = awake[0] if awake else min(allowed, key=lambda url: self._rests_until[url])
            self._turn = (self.urls.index(url) + 1) % count
            return url

    def worked(self, url: str) -> None:
        """It answered: no rest."""
        with self._lock:
            self._fails[url], self._rests_until[url] = 0, 0.0

    def failed(self, url: str) -> None:
        """It did not answer: a rest, doubled with each failure in a row."""
        with self._lock:
            rest = min(self._rest * 2 ** min(self._fails[url], 16), _LONGEST_REST)
            self._fails[url] += 1
            self._rests_until[url] = time.monotonic() + rest


class Channel:
    """Exchanges over HTTP, each bounded in time and size. The token is sent, and never told."""

    def __init__(
        self, token: SecretStr | None, timeout: float, connect_timeout: float, connections: int, *, secure: bool
    ) -> None:
        import httpx

        headers = {"Accept-Encoding": "identity"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token.get_secret_value()}"
        self.timeout = timeout
        self._timeouts = httpx.Timeout(timeout, connect=connect_timeout)
        # No proxies or .netrc from the environment: they would get between a run and a service next to it.
        self._client: Client = httpx.Client(
            headers=headers,
            timeout=self._timeouts,
            limits=httpx.Limits(max_connections=connections, keepalive_expiry=5.0),
            trust_env=False,
            # The system's certificates; reading them takes a while, and without an https address nobody asks for them.
            verify=ssl.create_default_context() if secure else False,
        )

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def health(self, url: str, timeout: float) -> Health:
        """Asks `/health`. Raises ExchangeError."""
        body = self._exchange("GET", f"{url}/health", timeout, _HEALTH_BYTES)
        try:
            return Health.read(json.loads(body))
        except (ValueError, RecursionError):
            raise ExchangeError("something other than a reward service answered") from None

    def score(self, url: str, body: bytes, samples: int) -> bytes:
        """Posts a request; the answer's body. Raises ExchangeError."""
        limit = _BYTES_BESIDES + samples * _BYTES_PER_SAMPLE
        return self._exchange("POST", f"{url}/score", self.timeout, limit, body)

    def _exchange(self, method: str, url: str, timeout: float, limit: int, body: bytes | None = None) -> bytes:
        import httpx

        deadline = time.monotonic() + timeout
        timeouts = httpx.Timeout(timeout, connect=min(timeout, self._timeouts.connect or timeout))
        headers = {"Content-Type": SAFETENSORS} if body is not None else None
        try:
            with self._client.stream(method, url, content=body, headers=headers, timeout=timeouts) as response:
                told = _read(response, deadline, limit, timeout)
        except httpx.ConnectTimeout:
            raise ExchangeError("no connection in time") from None
        except httpx.TimeoutException:
            raise ExchangeError(f"no answer within {timeout:g} s", late=True) from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            # The text of these errors may name local ports, which would split one cause into many.
            raise ExchangeError(f"the connection failed ({type(error).__name__})") from None
        if response.status_code != 200:
            _refuse(response.status_code, told)
        return told


def _read(response: Response, deadline: float, limit: int, timeout: float) -> bytes:
    """A body, as it was sent: a server that drips or floods is cut off."""
    told = bytearray()
    for chunk in response.iter_raw():
        told += chunk
        if len(told) > limit:
            raise ExchangeError("its answer is too long")
        if time.monotonic() > deadline:
            raise ExchangeError(f"no whole answer within {timeout:g} s", late=True)
    return bytes(told)


def _refuse(status: int, told: bytes) -> None:
    if status in (401, 403):
        raise TokenError(f"it refuses the token ({status})", for_good=True)
    try:
        reason = json.loads(told)["error"]
    except (ValueError, RecursionError, KeyError, TypeError):
        reason = "no reason given"
    raise ExchangeError(f"it answered {status}: {shorten(reason)}", for_good=status not in _TRY_LATER)


def check_url(url: Any) -> str:
    """A server's address without its last slash. Raises RewardError for what is none, or would show a password."""
    from urllib.parse import urlsplit

    problem = "write http://host:port"
    try:
        parts = urlsplit(url) if isinstance(url, str) else None
        fine = parts is not None and parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fine = False
    if not fine or parts is None or url != "".join(url.split()):
        raise RewardError(f"url {url!r} is no address of a reward service: {problem}.")
    if parts.username is not None or parts.password is not None:
        raise RewardError(
            f"the url of {parts.hostname} holds a password: put a token in a variable, named by token_env."
        )
    if parts.query or parts.fragment:
        raise RewardError(f"url {url!r} has more than a path: {problem}.")
    return url.rstrip("/")
