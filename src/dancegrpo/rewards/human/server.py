"""The page's server: loopback only, and only for who knows the token."""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import threading
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

from dancegrpo.errors import RewardError
from dancegrpo.rewards.human.questions import Questions

HOST = "127.0.0.1"
LARGEST_VOTE = 65_536
"""Bytes of a request's body; the votes on a thousand samples take a tenth of it."""
CLOSED = "the run is not waiting for this group any more"
ASSETS = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
HEADERS = {
    # Nothing from elsewhere, nothing inline: a prompt cannot become script, and nothing leaves the page.
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",  # the address holds the token
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Server:
    """Serves `questions` in a background thread until `close`. `url` holds the token; port 0 = any free port.

    Raises RewardError where the port cannot be had.
    """

    def __init__(self, questions: Questions, *, mode: str, per_page: int, fps: float, port: int = 0) -> None:
        import uvicorn

        self.token = secrets.token_urlsafe(16)
        listener = _listen(port)
        self.url = f"http://{HOST}:{listener.getsockname()[1]}/{self.token}/"
        app = build_app(questions, self.token, settings={"mode": mode, "per_page": per_page}, fps=fps)
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        arguments = {"sockets": [listener]}
        self._thread = threading.Thread(target=self._server.run, kwargs=arguments, name="human-page", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.should_exit = True
        self._thread.join(timeout=5)


def build_app(questions: Questions, token: str, *, settings: Mapping[str, Any], fps: float) -> Any:
    """The page as a Starlette application: its files, the state, the media and the votes, all under `/TOKEN/`."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    def guarded(answer: Callable[[Request], Response]) -> Callable[[Request], Response]:
        def checked(request: Request) -> Response:
            if hmac.compare_digest(request.path_params["token"].encode(), token.encode()):
                return answer(request)
            return JSONResponse({"error": "wrong token: open the address that the run printed"}, 403, HEADERS)

        return checked

    def asset(request: Request) -> Response:
        name = request.url.path.rpartition("/")[2] or "page.html"
        content = resources.files("dancegrpo.rewards.human").joinpath("assets", name).read_bytes()
        return Response(content, headers=HEADERS, media_type=ASSETS[name])

    def state(request: Request) -> Response:
        # As ASCII: a prompt may hold half a surrogate pair, which UTF-8 cannot carry.
        content = json.dumps({**settings, **questions.state()})
        return Response(content, headers=HEADERS, media_type="application/json")

    def media(request: Request) -> Response:
        question, index = questions.get(request.path_params["key"]), request.path_params["index"]
        if question is None or index >= len(question.frames):
            return JSONResponse({"error": CLOSED}, 404, HEADERS)
        content, kind = question.encode(index, fps)
        # Not to be cached: the key names a set of samples, and a later question may have them in another order.
        return Response(content, headers=HEADERS, media_type=kind)

    async def vote(request: Request) -> Response:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > LARGEST_VOTE:
                return JSONResponse({"error": f"a vote has at most {LARGEST_VOTE} bytes"}, 413, HEADERS)
        request.state.body = bytes(body)
        return await run_in_threadpool(guarded(cast), request)

    def cast(request: Request) -> Response:
        status, told = take(questions, request.state.body)
        return JSONResponse(told, status, HEADERS)

    pages = [Route(f"/{{token}}/{name}", guarded(asset)) for name in ("", *ASSETS)]
    answers = [Route("/{token}/state", guarded(state)), Route("/{token}/media/{key}/{index:int}", guarded(media))]
    return Starlette(routes=[*pages, *answers, Route("/{token}/vote", vote, methods=["POST"])])


def take(questions: Questions, body: bytes) -> tuple[int, dict[str, str]]:
    """Keep the vote in a request's body, `{"group": key, "votes": [...]}` or `{"group": key, "skipped": true}`.

    Returns the HTTP status and what to tell.
    """
    try:
        sent = json.loads(body)
        questions.answer(str(sent["group"]), sent.get("votes"), skipped=sent.get("skipped") is True)
    except KeyError:
        return 409, {"error": CLOSED}
    except OSError as error:
        return 507, {"error": f"the vote could not be kept: {error.strerror or error}"}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        return 400, {"error": f"that is no vote: {error}"}
    return 200, {}


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen()
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise RewardError(
            f"port={port} of the human judge cannot be had: {reason}; give another, or 0 for any."
        ) from error
    return listener
