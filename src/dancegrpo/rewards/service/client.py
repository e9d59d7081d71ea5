"""The judge `service`: one that runs somewhere else and is asked over HTTP."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from dancegrpo.errors import RewardError
from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import Scores, as_media, describe
from dancegrpo.rewards.service import wire
from dancegrpo.rewards.service.replicas import Channel, ExchangeError, Health, Replicas, TokenError, check_url
from dancegrpo.rewards.service.token import read_token

_DEFAULT_BATCH = 16
"""Samples per request where the served judge takes any number."""
_PARALLEL = 2
"""Requests under way per server: one is scored while the next travels."""
_PREFLIGHT = 10.0
"""Longest time in seconds that a server may take to say how it is."""
_LONGEST_WAIT = 30.0
"""Longest pause in seconds between two tries."""


class ServiceReward:
    """Asks a judge that `dancegrpo serve-reward` runs, on one or several servers.

    urls: `http://host:port`, one or a list of replicas that run the same judge; requests go to them in turn.
    token_env, token_file: the environment variable, or the file, that holds the token. judge: what the servers must
    run, as `/health` names it; None = whatever they all say. batch_size: samples per request; None = the served
    judge's own. timeout: seconds for one answer; connect_timeout: for a connection. retries: further tries of a
    request, each after a pause that starts at `backoff` seconds and doubles. wait: seconds to wait at the start for a
    server to come up.

    A request that fails for good masks its samples, with the address in the cause. A server that failed is left out for
    a while. Scores come from the server unchanged; which server answered, or after how many tries, changes none.
    Raises RewardError for options that cannot be, a wrong token, servers with different judges, or none that answers.
    """

    name = "service"
    differentiable = False
    remote = True

    def __init__(
        self,
        urls: str | Sequence[str],
        token_env: str | None = None,
        token_file: str | Path | None = None,
        judge: str | None = None,
        batch_size: int | None = None,
        timeout: float = 120.0,
        connect_timeout: float = 5.0,
        retries: int = 5,
        backoff: float = 0.5,
        wait: float = 0.0,
    ) -> None:
        addresses = _addresses(urls)
        _check_numbers(batch_size, timeout, connect_timeout, retries, backoff, wait)
        self.retries, self.backoff = retries, backoff
        self._replicas = Replicas(addresses, rest=max(backoff, 0.1))
        self._hangs = False  # a request's last try ended with the time up, and no other was answered since
        self._threads = _PARALLEL * len(addresses)
        # A run asks from several threads where it overlaps batches; connections wait for one another beyond this.
        token = read_token(token_env, token_file)
        secure = any(url.startswith("https:") for url in addresses)
        self._channel = Channel(token, timeout, connect_timeout, connections=4 * self._threads, secure=secure)
        try:
            found = _preflight(self._channel, addresses, min(timeout, _PREFLIGHT), wait)
            self.judge = _same_judge(found, judge)
        except BaseException:
            self._channel.close()
            raise
        self._limits = list(found.values())
        self.request_size: int = batch_size or self._limits[0].batch_size or _DEFAULT_BATCH
        # What a panel gives at once: enough to keep every server busy.
        self.batch_size: int | None = self.request_size * len(addresses)

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score B samples, on the media's device. media: (B, F, 3, H, W) float in [0, 1] or uint8."""
        if media.dtype != torch.uint8:
            media = as_media(media)
        size = self._fitting(media)
        starts = range(0, len(media), size)
        stop = threading.Event()

        def ask(start: int) -> Scores:
            return self._ask(media[start : start + size], prompts[start : start + size], stop)

        if len(starts) <= 1:
            return Scores.cat([ask(start) for start in starts]).to(media.device)
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="reward-service")
        try:
            return Scores.cat(list(pool.map(ask, starts))).to(media.device)
        finally:
            # After an interrupt: no further tries.
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def to(self, device: Any) -> Self:
        """The served judge has its own device: this end has nothing to move."""
        return self

    def close(self) -> None:
        """Closes the connections; the judge cannot be asked any more."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fitting(self, media: Tensor) -> int:
        """Samples per request that the servers' limits allow, at least 1 (one too large is the server's to refuse)."""
        each = media[:1].numel() * media.element_size() or 1
        room = min(limits.max_request_bytes for limits in self._limits) * 9 // 10
        return max(1, min(self.request_size, room // each, *(limits.max_samples for limits in self._limits)))

    def _ask(self, media: Tensor, prompts: Sequence[Prompt], stop: threading.Event) -> Scores:
        """One request, until it is answered or the tries are used up. Raises nothing: what fails is masked."""
        identity = uuid.uuid4().hex
        try:
            body = wire.pack_request(identity, media, prompts)
        except Exception as error:
            reason = str(error) if isinstance(error, wire.WireError) else describe(error)
            return Scores.failed(len(media), wire.shorten(f"nothing was sent to {self._replicas.urls[0]}: {reason}"))
        barred: set[str] = set()
        cause, late = "", False
        # Where the servers hang, a try lasts as long as `timeout`: those that wait behind one another make one each.
        for attempt in range(1 if self._hangs else self.retries + 1):
            if attempt and stop.wait(self._pause(attempt)):
                break
            url = self._replicas.choose(barred)
            if url is None:
                break
            try:
                scores = self._exchange(url, identity, body, len(media))
            except ExchangeError as failure:
                cause, late = f"reward service {url}: {failure}", failure.late
                if failure.for_good:
                    barred.add(url)
                if not failure.for_good or isinstance(failure, TokenError):
                    # A request that is itself at fault says nothing about the server.
                    self._replicas.failed(url)
            else:
                self._replicas.worked(url)
                self._hangs = False
                return scores
        self._hangs = late
        return Scores.failed(len(media), cause)

    def _exchange(self, url: str, identity: str, body: bytes, samples: int) -> Scores:
        answer = self._channel.score(url, body, samples)
        try:
            scores = wire.read_answer(answer, identity, self.judge, samples)
        except wire.WireError as error:
            raise ExchangeError(str(error)) from None
        return replace(scores, causes={f"{cause} (at {url})": count for cause, count in scores.causes.items()})

    def _pause(self, attempt: int) -> float:
        """Seconds before a further try; spread, so that clients do not return to a restarted server all at once."""
        return min(self.backoff * 2 ** (attempt - 1), _LONGEST_WAIT) * random.uniform(0.5, 1.0)


def _addresses(urls: Any) -> list[str]:
    addresses = [check_url(url) for url in ([urls] if isinstance(urls, str) or not hasattr(urls, "__iter__") else urls)]
    if not addresses:
        raise RewardError("urls is empty: name at least one reward service.")
    if len(set(addresses)) < len(addresses):
        raise RewardError(f"urls={', '.join(addresses)} names one server twice: name each once.")
    return addresses


def _check_numbers(batch_size: Any, timeout: Any, connect_timeout: Any, retries: Any, backoff: Any, wait: Any) -> None:
    if batch_size is not None and (not _is(batch_size, int) or batch_size < 1):
        raise RewardError(f"batch_size={batch_size!r} of a reward service is no batch: use 1 or more.")
    for option, value in {"timeout": timeout, "connect_timeout": connect_timeout}.items():
        if not _is(value, int, float) or not 0 < value <= 86400:
            raise RewardError(f"{option}={value!r} of a reward service is no time in seconds: use more than 0.")
    for option, value in {"backoff": backoff, "wait": wait}.items():
        if not _is(value, int, float) or not 0 <= value <= 86400:
            raise RewardError(f"{option}={value!r} of a reward service is no time in seconds: use 0 or more.")
    if not _is(retries, int) or not 0 <= retries <= 1000:
        raise RewardError(f"retries={retries!r} of a reward service is no number of tries: use 0 or more.")


def _is(value: Any, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _preflight(channel: Channel, urls: Sequence[str], timeout: float, wait: float) -> dict[str, Health]:
    """The servers that answer, at least one. Raises RewardError where none does within `wait`, or one refuses us."""
    deadline = time.monotonic() + wait
    while True:
        with ThreadPoolExecutor(len(urls)) as pool:
            told = dict(zip(urls, pool.map(lambda url: _health(channel, url, timeout), urls)))
        for url, answer in told.items():
            if isinstance(answer, TokenError):
                raise RewardError(f"reward service {url} refuses the token: set token_env to the variable that has it.")
        found = {url: answer for url, answer in told.items() if isinstance(answer, Health)}
        if found:
            return found
        left = deadline - time.monotonic()
        if left <= 0:
            reasons = "; ".join(f"{url}: {answer}" for url, answer in told.items())
            raise RewardError(f"no reward service answers ({reasons}): start it, mend the address, or set `wait`.")
        time.sleep(min(0.5, left))


def _health(channel: Channel, url: str, timeout: float) -> Health | ExchangeError:
    try:
        return channel.health(url, timeout)
    except ExchangeError as failure:
        return failure


def _same_judge(found: dict[str, Health], expected: str | None) -> str:
    first = next(iter(found.values())).judge
    for url, health in found.items():
        if health.judge != (expected or first):
            wanted = "judge" if expected else f"the judge of {next(iter(found))}"
            raise RewardError(
                f"reward service {url} runs {wire.shorten(health.judge)!r}, but {wanted} is {expected or first!r}: "
                "give replicas of one judge."
            )
    return first
