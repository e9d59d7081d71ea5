"""The web application around a judge's line: who may ask, how much, and what is answered."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from dancegrpo.rewards.base import Scores
from dancegrpo.rewards.service import wire
from dancegrpo.rewards.service.png import unpack_json
from dancegrpo.rewards.service.queueing import Line
from dancegrpo.rewards.service.wire import WireError

_UPLOAD_SECONDS = 60.0
"""How long a request's body may take to arrive."""
_DISCARD = 1 << 28
"""Bytes of a refused body that are read and thrown away, so that its sender gets to read why."""
_DISCARD_SECONDS = 5.0


@dataclass(frozen=True)
class Limits:
    """max_bytes: of one request's body. max_samples: of one request. max_queue: requests at once, uploads included."""

    max_bytes: int
    max_samples: int
    max_queue: int


@dataclass
class _State:
    """What the endpoints share. admitted: requests between their headers and their answer."""

    about: dict[str, Any]
    line: Line
    token: SecretStr | None
    limits: Limits
    admitted: int = 0
    answers: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0


def build_app(about: dict[str, Any], line: Line, token: SecretStr | None, limits: Limits) -> Starlette:
    """The application. about: what `/health` tells beside readiness and limits. All endpoints ask for the token."""
    state = _State(about, line, token, limits)

    async def score(request: Request) -> Response:
        start = time.perf_counter()
        try:
            response = await _score(state, request)
        except ClientDisconnect:
            response = Response(status_code=499)  # nobody reads it; nginx's number for the metrics
        except WireError as error:
            response = _refusal(error)
        state.answers[response.status_code] += 1
        state.seconds += time.perf_counter() - start
        return response

    async def health(request: Request) -> Response:
        if refused := _refused(state, request):
            return refused
        bounds = {"max_samples": limits.max_samples, "max_request_bytes": limits.max_bytes}
        told = {"service": "dancegrpo reward", "protocol": wire.PROTOCOL, "ready": line.ready, **about, **bounds}
        told |= {"content_types": [wire.SAFETENSORS, wire.JSON], "dtypes": list(wire.WIRE_DTYPES)}
        return JSONResponse(told, 200 if line.ready else 503)

    async def metrics(request: Request) -> Response:
        return _refused(state, request) or PlainTextResponse(_metrics(state), media_type="text/plain; version=0.0.4")

    routes = [Route("/score", score, methods=["POST"]), Route("/health", health), Route("/metrics", metrics)]
    return Starlette(routes=routes)


def _refused(state: _State, request: Request) -> Response | None:
    """The 401 for a request without the right token."""
    if state.token is None:
        return None
    scheme, _, sent = request.headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(sent.strip().encode(), state.token.get_secret_value().encode())
    if scheme.lower() == "bearer" and right:
        return None
    return JSONResponse({"error": "this service asks for a bearer token"}, 401, {"WWW-Authenticate": "Bearer"})


def _refusal(error: WireError) -> Response:
    return JSONResponse({"error": str(error)}, error.status, {"Retry-After": "1"} if error.status == 503 else None)


async def _score(state: _State, request: Request) -> Response:
    chunks = _chunks(request)
    try:
        if refused := _refused(state, request):
            await _discard(chunks)
            return refused
        if not state.line.ready or state.admitted >= state.limits.max_queue:
            await _discard(chunks)
            raise WireError("the queue is full or the service is stopping: come back later", 503)
        state.admitted += 1
        try:
            return await _answer(state, request, await _body(request, chunks, state.limits.max_bytes))
        finally:
            state.admitted -= 1
    finally:
        await chunks.aclose()


async def _answer(state: _State, request: Request, body: bytes) -> Response:
    with tempfile.TemporaryDirectory(prefix="dancegrpo-") as folder:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        parsed = await run_in_threadpool(_parse, state.limits, kind, body, Path(folder))
        scores = await _scored(request, state.line.submit(parsed))
    return Response(wire.pack_answer(parsed.id, state.about["judge"], scores), media_type=wire.JSON)


async def _chunks(request: Request) -> AsyncGenerator[bytes, None]:
    """The body as it comes. Raises ClientDisconnect where it breaks off."""
    more = True
    while more:
        message = await request.receive()
        if message["type"] != "http.request":
            raise ClientDisconnect
        more = message.get("more_body", False)
        yield message.get("body", b"")


async def _body(request: Request, chunks: AsyncGenerator[bytes, None], limit: int) -> bytes:
    """The body, refused as soon as it is, or says it will be, larger than `limit` bytes."""
    announced = request.headers.get("content-length", "")
    body, too_large = bytearray(), announced.isdecimal() and int(announced) > limit
    try:
        async with asyncio.timeout(_UPLOAD_SECONDS):
            while not too_large and (chunk := await anext(chunks, None)) is not None:
                body += chunk
                too_large = len(body) > limit
    except TimeoutError:
        raise WireError(f"the request did not arrive within {_UPLOAD_SECONDS:.0f} s", 408) from None
    if too_large:
        body.clear()
        await _discard(chunks)
        raise WireError(f"the request is larger than {limit} bytes: send fewer samples at once", 413)
    return bytes(body)


async def _discard(chunks: AsyncGenerator[bytes, None]) -> None:
    """Read on for a bounded while: closing with data unread would reset the connection before the answer is read."""
    left = _DISCARD
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(_DISCARD_SECONDS):
            async for chunk in chunks:
                left -= len(chunk)
                if left < 0:
                    return


def _parse(limits: Limits, content_type: str, body: bytes, folder: Path) -> wire.Request:
    if content_type == wire.SAFETENSORS:
        return wire.unpack_request(body, folder, limits.max_samples)
    if content_type == wire.JSON:
        return unpack_json(body, limits.max_samples, limits.max_bytes)
    raise WireError(f"the content type is not known: send {wire.SAFETENSORS} or {wire.JSON}", 415)


async def _scored(request: Request, future: Future[Scores]) -> Scores:
    """Waits for the scores; a client that leaves takes its samples out of the line."""
    result, left = asyncio.ensure_future(asyncio.wrap_future(future)), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((result, left), return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise ClientDisconnect
        if result.cancelled():
            raise WireError("the service is stopping: ask another one", 503)
        return result.result()
    finally:
        result.cancel()
        left.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _metrics(state: _State) -> str:
    """The counters in Prometheus' text format (version 0.0.4)."""
    line, (requests, samples) = state.line, state.line.waiting()
    judge = state.about["judge"].replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    answered: list[tuple[str, float]] = [(f'{{code="{code}"}}', count) for code, count in sorted(state.answers.items())]
    rows: list[tuple[str, str, str, list[tuple[str, float]]]] = [
        ("info", "gauge", "The judge.", [(f'{{judge="{judge}",version="{state.about["version"]}"}}', 1)]),
        ("ready", "gauge", "Whether requests get scored.", [("", int(line.ready))]),
        ("requests_total", "counter", "Score requests by status code.", answered),
        ("request_seconds_total", "counter", "Time from a request's headers to its answer.", [("", state.seconds)]),
        ("samples_total", "counter", "Samples judged.", [("", line.samples)]),
        ("failures_total", "counter", "Samples that got no score.", [("", line.failures)]),
        ("batches_total", "counter", "Batches judged.", [("", line.batches)]),
        ("scoring_seconds_total", "counter", "Time the judge worked.", [("", line.seconds)]),
        ("requests_open", "gauge", "Requests being received, waiting or scored.", [("", state.admitted)]),
        ("queue_requests", "gauge", "Requests waiting for a batch.", [("", requests)]),
        ("queue_samples", "gauge", "Samples waiting for a batch.", [("", samples)]),
    ]
    lines: list[str] = []
    for name, kind, help_text, values in rows:
        full = f"dancegrpo_reward_{name}"
        lines += [f"# HELP {full} {help_text}", f"# TYPE {full} {kind}"]
        lines += [f"{full}{labels} {value:.10g}" for labels, value in values]
    return "\n".join(lines) + "\n"
