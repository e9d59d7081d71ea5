"""A judge behind HTTP: `POST /score`, `GET /health`, `GET /metrics`."""

from __future__ import annotations

import contextlib
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from dancegrpo.errors import RewardError
from dancegrpo.rewards.base import Reward, describe
from dancegrpo.rewards.catalog import CATALOG
from dancegrpo.rewards.compose import OnDevice
from dancegrpo.rewards.loading import load_reward
from dancegrpo.rewards.service.queueing import Line
from dancegrpo.rewards.service.token import checked
from dancegrpo.rewards.weights import best_device
from dancegrpo.settings import RewardConfig

if TYPE_CHECKING:
    from uvicorn import Server

_DEFAULT_BATCH = 32
"""Samples per batch when requests are packed together and neither the judge nor the user says how many."""
_PLACE = ("batch_size", "threads", "timeout", "concurrency", "port")
"""Options of judges that say how they run, not what they say."""
_GRACE = 30
"""Seconds that accepted requests have to finish after a signal to stop."""


def serve(
    name: str,
    config: RewardConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    token: SecretStr | str | None = None,
    device: str | None = None,
    max_request_mb: float = 256,
    max_samples: int = 1024,
    max_batch: int | None = None,
    batch_across_requests: bool = True,
    wait_ms: float = 5,
    max_queue: int = 64,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Run the judge that `config` describes until SIGTERM or SIGINT; requests already accepted are answered first.

    name: what health and metrics call it. host, port: where to listen; port 0 = any free one. token: what clients must
    send; required unless `host` is loopback. device: of the judge; None = the GPU where there is one.
    max_request_mb: size of one request in MB (10^6 bytes). max_samples: of one request. max_queue: requests at once,
    uploads included; more are told to come back (503). batch_across_requests: pack samples of several requests into
    batches of `max_batch` (None = the judge's own), waiting `wait_ms` milliseconds for a batch to fill; False = score
    each request on its own, bit for bit as in one process. on_ready: called with the URL once requests are answered.
    Raises RewardError for settings that cannot be, an address in use, and as `load_reward` does.
    """
    check_limits(max_request_mb, max_samples, max_batch, wait_ms, max_queue)
    secret = checked(token, "the token") if isinstance(token, str) else token
    if secret is None and not is_loopback(host):
        raise RewardError(f"host={host!r} is open to other machines: set a token, or listen on 127.0.0.1.")
    # The address is taken before minutes of loading, but nobody can connect until the judge is there.
    with contextlib.closing(bind(host, port)) as bound:
        reward = load_reward(name, config).to(device or best_device())
        batch_size = max_batch or own_batch_size(reward) or _DEFAULT_BATCH
        line = Line(name, reward, batch_size=batch_size if batch_across_requests else None, wait=wait_ms / 1000)
        from dancegrpo.rewards.service.app import Limits, build_app

        limits = Limits(int(max_request_mb * 1e6), max_samples, max_queue)
        url = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"
        app = build_app(describe_judge(name, config, reward), line, secret, limits)
        server = make_server(app, lambda: on_ready(url) if on_ready else None)
        try:
            with _no_second_signal():
                server.run(sockets=[bound])
        finally:
            line.close(timeout=_GRACE)


def describe_judge(name: str, config: RewardConfig, reward: Reward) -> dict[str, Any]:
    """What `/health` says of a judge. Its options stay here: they may hold paths or keys."""
    entry = CATALOG.get(config.judge)
    return {
        "name": name,
        "judge": identity(config),
        "version": version("dancegrpo"),
        # A wrapper from `load_reward` shows the frames of clips, one by one, to a judge of pictures.
        "takes": "either" if entry is None or _is_wrapped(reward) else entry.takes,
        "batch_size": own_batch_size(reward),
    }


def _is_wrapped(reward: Reward) -> bool:
    return hasattr(reward.reward if isinstance(reward, OnDevice) else reward, "reward")


def identity(config: RewardConfig) -> str:
    """One judge as one line, the same on every replica: its name and the settings that change its scores.

    Options that are texts (paths, addresses, devices) stay out: they differ between machines, and may be secret.
    """
    parts: dict[str, Any] = {"frames": config.frames, "threshold": config.threshold}
    parts |= {k: v for k, v in sorted(config.options.items()) if isinstance(v, bool | int | float) and k not in _PLACE}
    return " ".join([config.judge, *(f"{key}={value}" for key, value in parts.items() if value is not None)])


def own_batch_size(reward: Any) -> int | None:
    """What the judge, or the judge inside a wrapper, takes at once."""
    while reward is not None and reward.batch_size is None:
        reward = getattr(reward, "reward", None)
    return None if reward is None else reward.batch_size


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to `host`."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def check_limits(
    max_request_mb: float, max_samples: int, max_batch: int | None, wait_ms: float, max_queue: int
) -> None:
    """Raises RewardError for a limit that lets nothing through."""
    for option, value in {"max_samples": max_samples, "max_batch": max_batch, "max_queue": max_queue}.items():
        if value is not None and value < 1:
            raise RewardError(f"{option}={value} lets nothing through: use 1 or more.")
    if not max_request_mb > 0:
        raise RewardError(f"max_request_mb={max_request_mb} lets nothing through: use more than 0.")
    if not 0 <= wait_ms <= 10_000:
        raise RewardError(f"wait_ms={wait_ms} is no wait in milliseconds: use 0 to 10000.")


def bind(host: str, port: int) -> socket.socket:
    """A socket that has the address but does not listen yet."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        # A server that was killed a moment ago must not block its successor.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or describe(error)
        raise RewardError(f"cannot listen on {host}:{port}: {reason}; choose another port or host.") from error
    return bound


def make_server(app: Any, on_ready: Callable[[], None]) -> Server:
    """uvicorn around `app`; `on_ready` is called once it answers. It stops by a signal, or by its `should_exit`."""
    import uvicorn

    class Announcing(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                on_ready()

    # No access log: it would grow by a line per batch, and headers (the token) never belong in a log.
    return Announcing(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=_GRACE,
            ws="none",
        )
    )


@contextlib.contextmanager
def _no_second_signal() -> Iterator[None]:
    """uvicorn raises the signal that stopped it once more at the end; being asked to stop is no failure."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: None) for number in caught]
    try:
        yield
    finally:
        for number, handler in zip(caught, before):
            signal.signal(number, handler)
