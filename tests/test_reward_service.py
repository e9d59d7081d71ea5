"""A judge behind HTTP: the real server on a free port, the real client, and what goes wrong between them."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import SecretStr

from dancegrpo.errors import RewardError
from dancegrpo.prompts import Prompt
from dancegrpo.rewards import Judges, Scores, load_reward
from dancegrpo.rewards.service import ServiceReward, read_token, serve, wire
from dancegrpo.rewards.service.app import Limits, build_app
from dancegrpo.rewards.service.queueing import Line
from dancegrpo.rewards.service.server import bind, identity, is_loopback, make_server
from dancegrpo.settings import RewardConfig

TOKEN = "s3cret-token"


class Marks:
    """A score that names its sample: 256 * prompt id + the level of its first pixel; level 255 has none."""

    name, differentiable = "marks", False

    def __init__(self, batch_size=4, seconds=0.0, held=False):
        self.batch_size, self.seconds, self.batches, self.seen = batch_size, seconds, [], []
        self.entered, self.go = threading.Event(), threading.Event()
        if not held:
            self.go.set()

    def __call__(self, media, prompts):
        self.entered.set()
        assert self.go.wait(10)
        time.sleep(self.seconds)
        self.batches.append(len(media))
        self.seen += prompts
        if any(prompt.text == "raise" for prompt in prompts):
            raise ValueError("this judge does not like the prompt")
        level = (media[:, 0, 0, 0, 0] * 255).round()
        values = level + 256 * torch.tensor([prompt.id for prompt in prompts])
        scores = Scores(values, torch.ones_like(values, dtype=torch.bool), {"level": level})
        return scores.mask(level == 255, "too bright")

    def to(self, device):
        return self


class Projection:
    """A network's rounding: a random projection of all pixels, a sum whose order depends on the batch."""

    name, differentiable, batch_size = "projection", False, 3

    def __call__(self, media, prompts):
        flat = media.flatten(1)
        weights = torch.randn(flat.shape[1], 7, generator=torch.Generator().manual_seed(0))
        values = (flat @ weights).tanh().sum(1)
        return Scores(values, torch.ones_like(values, dtype=torch.bool))

    def to(self, device):
        return self


@contextlib.contextmanager
def running(reward, *, port=0, token=None, judge="m:marks", pack=4, wait=0.0, limits=None):
    """The server of `serve`, in a thread. Yields its URL and line."""
    line = Line("it", reward, batch_size=pack, wait=wait)
    about = {"name": "it", "judge": judge, "version": "0", "takes": "either", "batch_size": reward.batch_size}
    app = build_app(about, line, token and SecretStr(token), limits or Limits(10**6, 64, 64))
    ready, bound = threading.Event(), bind("127.0.0.1", port)
    server = make_server(app, ready.set)
    address = f"http://127.0.0.1:{bound.getsockname()[1]}"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield address, line
    finally:
        server.should_exit = True
        thread.join(10)
        line.close(10)


@contextlib.contextmanager
def answering(score, health=None):
    """A server that answers /score with `score(body) -> (status, bytes)` and /health as a real one would."""
    good = {"service": "dancegrpo reward", "protocol": 1, "ready": True, "judge": "m:marks", "batch_size": 4}
    good |= {"max_samples": 64, "max_request_bytes": 10**6}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(200, json.dumps(good).encode() if health is None else health)

        def do_POST(self):
            self.reply(*score(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, status, body):
            if status is None:  # the connection breaks off
                self.close_connection = True
                return
            with contextlib.suppress(OSError):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def samples(*marks):
    """One flat 2 x 2 picture per (prompt id, level)."""
    levels = torch.tensor([level for _, level in marks], dtype=torch.float32) / 255
    media = levels.view(-1, 1, 1, 1, 1).expand(-1, 1, 3, 2, 2).clone()
    return media, [Prompt(number, f"prompt {number}") for number, _ in marks]


def until(condition):
    """Waits for something that happens soon, or fails."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def free_port():
    with contextlib.closing(bind("127.0.0.1", 0)) as bound:
        return bound.getsockname()[1]


@pytest.fixture(scope="module")
def service():
    with running(Marks()) as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(service):
    with ServiceReward(service, retries=0, timeout=10) as client:
        yield client


# Scores


def test_scores_come_back_to_their_samples(client):
    media, prompts = samples(*((i, 3 * i) for i in range(20)))
    told = client(media, prompts)
    assert told.values.tolist() == [259 * i for i in range(20)]
    assert told.extra["level"].tolist() == [3 * i for i in range(20)]
    assert told.valid.all()


def test_a_sample_the_judge_masks_is_masked_here_with_its_cause_and_the_address(client, service):
    told = client(*samples((0, 1), (0, 255), (0, 2)))
    assert told.valid.tolist() == [True, False, True]
    assert told.values.isnan().tolist() == [False, True, False]
    assert told.causes == {f"too bright (at {service})": 1}


def test_no_samples_need_no_request(client):
    assert len(client(torch.zeros(0, 1, 3, 2, 2), [])) == 0


def test_broken_pixels_are_masked_by_the_server(client):
    media, prompts = samples((0, 1), (0, 2))
    media[0, 0, 1, 1, 1] = torch.nan
    told = client(media, prompts)
    assert told.valid.tolist() == [False, True]
    assert "not finite" in next(iter(told.causes))


@pytest.mark.parametrize("pack", [None, 3, 5])
def test_scores_match_those_of_one_process(pack):
    media = torch.rand(7, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    prompts = [Prompt(i, "a") for i in range(7)]
    expected = Judges({"p": Projection()}).score(media, prompts)["p"].values
    with running(Projection(), pack=pack) as (url, _), ServiceReward(url) as client:
        told = Judges({"p": client}).score(media, prompts)["p"].values
    # Exactly where requests are not packed together.
    torch.testing.assert_close(told, expected, rtol=0, atol=0 if pack is None else 1e-5)


def test_hostile_prompts_reach_the_judge_as_they_are():
    texts = ["a\r\nAuthorization: x", "<b>&amp;</b>", '{"text": 1}', "\u202e\u0000零🎨", "half \ud83d"]
    judge = Marks(batch_size=8)
    with running(judge) as (url, _), ServiceReward(url) as client:
        client(torch.zeros(5, 1, 3, 2, 2), [Prompt(0, text, metadata={text: text}) for text in texts])
    assert [prompt.text for prompt in judge.seen] == texts
    assert [dict(prompt.metadata) for prompt in judge.seen] == [{text: text} for text in texts]


def test_png_pictures_get_the_scores_of_the_same_bytes():
    array = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3), dtype=np.uint8)
    pictures = []
    for picture in array:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        pictures.append(base64.b64encode(buffer.getvalue()).decode())
    media = torch.from_numpy(array).permute(0, 3, 1, 2)[:, None]
    with running(Projection()) as (url, _), ServiceReward(url) as client:
        told = client(media, [Prompt(0, "a")] * 3)
        answer = httpx.post(f"{url}/score", json={"prompts": ["a"] * 3, "media": pictures}).json()
    assert answer["values"] == told.values.tolist()
    assert answer["valid"] == [True] * 3


def test_requests_respect_the_servers_limits():
    judge = Marks(batch_size=None)
    with running(judge, limits=Limits(2000, 3, 8)) as (url, _), ServiceReward(url, batch_size=50) as client:
        few = client(*samples(*((i, 1) for i in range(10))))
        media = torch.rand(4, 1, 3, 8, 12, generator=torch.Generator().manual_seed(0))  # 1152 bytes each
        large = client(media, [Prompt(0, "a")] * 4)
    assert few.valid.all()
    assert large.valid.all()


# Many at once


def ask_many(url, number, seconds):
    """Requests of one client until the time is up: how many samples, and how many came back wrong or not at all."""
    random, asked, wrong = np.random.default_rng(number), 0, 0
    with ServiceReward(url, batch_size=8) as client:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            marks = [(int(a), int(b)) for a, b in zip(random.integers(0, 9999, 5), random.integers(0, 255, 5))]
            told = client(*samples(*marks[: random.integers(1, 6)]))
            expected = torch.tensor([256.0 * a + b for a, b in marks[: len(told)]])
            asked, wrong = asked + len(told), wrong + int((told.values != expected).sum())
    return asked, wrong


@pytest.mark.parametrize("pack", [None, 6])
def test_eight_clients_at_once_lose_and_mix_up_nothing(pack):
    judge = Marks(batch_size=6)
    with running(judge, pack=pack, wait=0.002) as (url, line), ThreadPoolExecutor(8) as pool:
        told = list(pool.map(lambda number: ask_many(url, number, 1.5), range(8)))
        assert sum(wrong for _, wrong in told) == 0
        assert all(asked for asked, _ in told)
        assert line.samples == sum(asked for asked, _ in told)
    if pack:
        assert max(judge.batches) == 6


def held_line(batch_size):
    """A judge at work on a first request until its `go` is set, its line, and that request's future."""
    judge = Marks(batch_size=batch_size, held=True)
    line = Line("it", judge, batch_size=batch_size, wait=0.0)
    first = line.submit(wire.Request("", *samples((9, 9))))
    assert judge.entered.wait(10)
    return judge, line, first


def test_samples_of_several_requests_share_a_batch_up_to_its_size():
    judge, line, first = held_line(6)
    futures = [line.submit(wire.Request("", *samples(*((i, j) for j in range(4))))) for i in range(3)]
    judge.go.set()
    assert [future.result(5).values.tolist() for future in futures] == [
        [256.0 * i + j for j in range(4)] for i in range(3)
    ]
    assert first.result(5).values.tolist() == [256 * 9 + 9]
    assert judge.batches == [1, 6, 6]
    line.close(5)


def test_pictures_of_different_sizes_never_share_a_batch():
    judge, line, _ = held_line(8)
    sizes = [wire.Request("", torch.zeros(2, 1, 3, 2, side), [Prompt(side, "a")] * 2) for side in (3, 4, 3)]
    futures = [line.submit(request) for request in sizes]
    judge.go.set()
    assert [future.result(5).values.tolist() for future in futures] == [[768] * 2, [1024] * 2, [768] * 2]
    assert judge.batches == [1, 4, 2]
    line.close(5)


def test_a_request_that_breaks_a_batch_masks_only_its_own_samples():
    judge, line, _ = held_line(8)
    media, _ = samples((0, 1))
    bad = line.submit(wire.Request("", media, [Prompt(0, "raise")]))
    good = line.submit(wire.Request("", *samples((1, 2))))
    judge.go.set()
    assert good.result(5).values.tolist() == [258]
    assert not bad.result(5).valid.any()
    assert "does not like the prompt" in next(iter(bad.result().causes))
    line.close(5)


def test_a_request_taken_back_is_not_scored():
    judge, line, first = held_line(1)
    line.submit(wire.Request("", *samples((2, 2)))).cancel()
    last = line.submit(wire.Request("", *samples((3, 3))))
    judge.go.set()
    assert (first.result(5).values.item(), last.result(5).values.item()) == (2313, 771)
    assert [prompt.id for prompt in judge.seen] == [9, 3]
    line.close(5)


def test_a_client_that_leaves_takes_its_samples_out_of_the_line():
    judge = Marks(batch_size=1, held=True)
    with running(judge, pack=1) as (url, line):
        body = wire.pack_request("", *samples((0, 1), (0, 2), (0, 3), (0, 4)))
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/score", content=body, headers={"Content-Type": wire.SAFETENSORS}, timeout=1)
        assert judge.entered.wait(10)
        until(lambda: "requests_open 0" in httpx.get(f"{url}/metrics").text)
        judge.go.set()
        until(lambda: line.waiting() == (0, 0))
    assert len(judge.seen) == 1


# Health, metrics, tokens, limits


def test_health_says_what_is_served(service):
    told = httpx.get(f"{service}/health").json()
    assert (told["name"], told["judge"], told["ready"], told["batch_size"]) == ("it", "m:marks", True, 4)
    assert (told["max_samples"], told["max_request_bytes"], told["takes"]) == (64, 10**6, "either")


def test_metrics_count_requests_samples_and_failures():
    with running(Marks()) as (url, _), ServiceReward(url, batch_size=2) as client:
        client(*samples((0, 1), (0, 255), (0, 2)))
        httpx.post(f"{url}/score", content=b"rubbish")
        text = httpx.get(f"{url}/metrics").text
    told = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert told['dancegrpo_reward_requests_total{code="200"}'] == "2"
    assert told['dancegrpo_reward_requests_total{code="415"}'] == "1"
    assert told["dancegrpo_reward_samples_total"] == "3"
    assert told["dancegrpo_reward_failures_total"] == "1"
    assert told["dancegrpo_reward_queue_samples"] == "0"
    assert float(told["dancegrpo_reward_scoring_seconds_total"]) > 0


@pytest.mark.parametrize("header", [None, "Bearer wrong", f"Basic {TOKEN}", TOKEN, "Bearer"])
@pytest.mark.parametrize("path", ["score", "health", "metrics"])
def test_nothing_is_told_without_the_token(guarded, path, header):
    headers = {"Authorization": header} if header else {}
    method = "POST" if path == "score" else "GET"
    answer = httpx.request(method, f"{guarded}/{path}", headers=headers)
    assert answer.status_code == 401
    assert answer.json() == {"error": "this service asks for a bearer token"}


@pytest.fixture(scope="module")
def guarded():
    with running(Marks(), token=TOKEN) as (url, _):
        yield url


def test_the_token_opens_the_service(guarded, monkeypatch):
    monkeypatch.setenv("REWARD_TOKEN", f" {TOKEN}\n")
    with ServiceReward(guarded, token_env="REWARD_TOKEN") as client:
        assert client(*samples((1, 1))).values.tolist() == [257]


def test_a_wrong_token_is_the_users_to_mend(guarded, monkeypatch):
    monkeypatch.setenv("REWARD_TOKEN", "wr0ng-token")
    with pytest.raises(RewardError, match=f"{guarded} refuses the token: set token_env") as caught:
        ServiceReward(guarded, token_env="REWARD_TOKEN", wait=30)
    assert "wr0ng" not in str(caught.value)


def test_a_token_that_is_refused_later_masks(monkeypatch):
    with answering(lambda body: (401, b'{"error": "no"}')) as url, ServiceReward(url, retries=3) as client:
        told = client(*samples((0, 0)))
    assert told.causes == {f"reward service {url}: it refuses the token (401)": 1}


def test_tokens_are_read_and_not_shown(tmp_path, monkeypatch):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    token = read_token(file=tmp_path / "token")
    assert token.get_secret_value() == TOKEN
    assert TOKEN not in repr(token) + str(token)
    assert read_token() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"env": "NO_SUCH_TOKEN"}, "NO_SUCH_TOKEN is not set"),
        ({"file": "/no/such/file"}, "token file /no/such/file cannot be read: No such file"),
        ({"file": os.devnull}, "is empty"),
        ({"env": "ODD_TOKEN"}, "ODD_TOKEN holds characters that no token may have"),
        ({"env": "ODD_TOKEN", "file": "x"}, "name one of them"),
    ],
)
def test_a_token_that_cannot_be_is_refused(options, message, monkeypatch):
    monkeypatch.setenv("ODD_TOKEN", "with space")
    with pytest.raises(RewardError, match=message):
        read_token(**options)


def chunked(data):
    yield from (data[i : i + 1000] for i in range(0, len(data), 1000))


@pytest.mark.parametrize("announced", [True, False])
def test_a_request_too_large_is_refused_whether_or_not_it_says_so(announced):
    data = b"x" * 3_000_000
    with running(Marks(), limits=Limits(10_000, 64, 8)) as (url, _):
        answer = httpx.post(f"{url}/score", content=data if announced else chunked(data))
        alive = httpx.get(f"{url}/health")
    assert (answer.status_code, alive.status_code) == (413, 200)
    assert answer.json()["error"] == "the request is larger than 10000 bytes: send fewer samples at once"


def test_an_endless_body_is_never_kept():
    with running(Marks(), limits=Limits(1000, 64, 8)) as (url, _):
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as raw:
            raw.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\nabc")
            time.sleep(0.1)
        assert httpx.get(f"{url}/health").status_code == 200


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("text/plain", b"{}", 415),
        ("application/x-python-pickle", b"\x80\x04K\x01.", 415),
        (wire.JSON, b"{", 400),
        (wire.SAFETENSORS, b"", 400),
        (wire.SAFETENSORS, wire.pack_request("", torch.zeros(65, 1, 3, 1, 1), [Prompt(0, "a")] * 65), 413),
    ],
)
def test_a_wrong_request_gets_one_line(service, kind, body, status):
    answer = httpx.post(f"{service}/score", content=body, headers={"Content-Type": kind})
    assert answer.status_code == status
    assert "\n" not in answer.json()["error"]


def test_a_full_queue_says_come_back_and_the_client_does():
    judge = Marks(held=True)
    body = wire.pack_request("", *samples((0, 1)))
    with running(judge, limits=Limits(10**6, 64, 1)) as (url, _), ThreadPoolExecutor(3) as pool:
        client = ServiceReward(url, retries=30, backoff=0.1)
        told = [pool.submit(client, *samples((i, i))) for i in range(3)]
        assert judge.entered.wait(10)
        refused = httpx.post(f"{url}/score", content=body, headers={"Content-Type": wire.SAFETENSORS})
        judge.go.set()
        assert [future.result(20).values.item() for future in told] == [0, 257, 514]
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")


def test_other_machines_need_a_token():
    with pytest.raises(RewardError, match=r"host='0\.0\.0\.0' is open to other machines: set a token"):
        serve("it", RewardConfig(judge="shapes"), host="0.0.0.0", port=0)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [(host, True) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost")]
    + [(host, False) for host in ("0.0.0.0", "::", "192.168.1.4", "example.org", "")],
)
def test_loopback_is_known(host, loopback):
    assert is_loopback(host) == loopback


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_request_mb": 0}, "max_request_mb=0"),
        ({"max_batch": 0}, "max_batch=0"),
        ({"max_queue": 0}, "max_queue=0"),
        ({"wait_ms": -1}, "wait_ms=-1"),
        ({"host": "no.such.host.invalid", "token": "t"}, "cannot listen on no.such.host.invalid"),
        ({"token": "two words"}, "the token holds characters"),
    ],
)
def test_a_server_that_cannot_be_is_refused(options, message):
    with pytest.raises(RewardError, match=message):
        serve("it", RewardConfig(judge="shapes"), port=0, **options)


def test_a_port_in_use_is_named(service):
    port = int(service.rsplit(":", 1)[1])
    with pytest.raises(RewardError, match=f"cannot listen on 127.0.0.1:{port}: .*; choose another port"):
        serve("it", RewardConfig(judge="shapes"), port=port)


def test_a_judge_is_known_by_what_changes_its_scores():
    assert identity(RewardConfig(judge="hps", options={"weights": "/x"}, weight=2)) == "hps"
    assert identity(RewardConfig(judge="hps", frames="first", threshold=0.3)) == "hps frames=first threshold=0.3"


# A service that fails


def test_a_recipe_names_a_service(service):
    judge = load_reward("far", RewardConfig(judge="service", options={"urls": [service], "timeout": 5}, threshold=200))
    assert judge(*samples((0, 7), (1, 7))).values.tolist() == [0, 1]
    assert judge.reward.remote


def test_nobody_at_the_address_is_told_at_once():
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(RewardError, match=f"no reward service answers \\({url}: the connection failed \\(ConnectError"):
        ServiceReward(url)


def test_another_program_at_the_address_is_told():
    with (
        answering(None, health=b"<html>hello</html>") as url,
        pytest.raises(RewardError, match=f"{url}: something other than a reward service"),
    ):
        ServiceReward(url)


def test_a_service_that_comes_up_late_is_waited_for():
    port, found = free_port(), []
    waiter = threading.Thread(target=lambda: found.append(ServiceReward(f"http://127.0.0.1:{port}", wait=10)))
    waiter.start()
    time.sleep(0.3)
    with running(Marks(), port=port):
        waiter.join(10)
        assert found[0](*samples((1, 1))).values.tolist() == [257]
        found[0].close()


def test_a_slow_service_masks_in_time_and_names_the_url():
    with running(Marks(seconds=2)) as (url, _), ServiceReward(url, timeout=0.2, retries=1, backoff=0.01) as client:
        start = time.monotonic()
        told = client(*samples((0, 1), (0, 2)))
        assert time.monotonic() - start < 2
    assert told.causes == {f"reward service {url}: no answer within 0.2 s": 2}
    assert told.values.isnan().all()


def rubbish(**changes):
    """A server's answer to one sample, with one thing wrong."""

    def score(body):
        told = {"id": json.loads(_head(body))["id"], "judge": "m:marks", "values": [1.0], "valid": [True]}
        return 200, json.dumps(told | changes).encode()

    return score


def _head(body):
    length = int.from_bytes(body[:8], "little")
    return json.loads(body[8 : 8 + length])["__metadata__"]["request"]


@pytest.mark.parametrize(
    ("score", "cause"),
    [
        (lambda body: (200, b"<html>"), "its answer is not JSON"),
        (lambda body: (200, b"x" * 3_000_000), "its answer is too long"),
        (lambda body: (500, b"oops"), "it answered 500: no reason given"),
        (lambda body: (302, b""), "it answered 302: no reason given"),
        (lambda body: (422, b'{"error": "two\\nlines"}'), "it answered 422: two lines"),
        (rubbish(values=[1.0, 2.0]), "its answer has 2 entries in values for 1 samples"),
        (rubbish(values=[float("nan")]), "its answer is not JSON"),
        (rubbish(values=[None]), "its answer calls a score valid that is no finite number"),
        (rubbish(judge="other"), "another judge answered ('other' instead of 'm:marks')"),
        (rubbish(id="other"), "its answer belongs to another request"),
    ],
)
def test_rubbish_is_masked_never_scored(score, cause):
    with answering(score) as url, ServiceReward(url, retries=1, backoff=0) as client:
        told = client(*samples((0, 1)))
    assert not told.valid.any()
    assert told.causes == {f"reward service {url}: {cause}": 1}


def test_the_stand_in_server_is_scored_when_nothing_is_wrong():
    with answering(rubbish()) as url, ServiceReward(url) as client:
        assert client(*samples((0, 1))).values.tolist() == [1.0]


def test_a_failing_try_is_tried_again_but_not_for_ever():
    calls = []

    def score(body):
        calls.append(body)
        return rubbish()(body) if len(calls) > 2 else (503, b"")

    with answering(score) as url, ServiceReward(url, retries=2, backoff=0.01) as client:
        assert client(*samples((0, 1))).valid.all()
        assert len(calls) == 3
        calls.clear()
        client.retries = 1
        assert not client(*samples((0, 1))).valid.any()
        assert len(calls) == 2
        assert calls[0] == calls[1]


def test_a_connection_that_breaks_off_is_tried_again():
    calls = []

    def score(body):
        calls.append(body)
        return rubbish()(body) if len(calls) > 1 else (None, b"")

    with answering(score) as url, ServiceReward(url, retries=1, backoff=0.01) as client:
        assert client(*samples((0, 1))).values.tolist() == [1.0]
    assert len(calls) == 2


def test_a_request_at_fault_is_not_tried_again():
    calls = []
    with (
        answering(lambda body: calls.append(body) or (422, b"{}")) as url,
        ServiceReward(url, retries=5, backoff=0) as client,
    ):
        assert not client(*samples((0, 1))).valid.any()
    assert len(calls) == 1


def test_a_prompt_that_cannot_be_sent_masks_its_request(client):
    media, _ = samples((0, 1))
    told = client(media, [Prompt(3, "a", metadata={"s": {1}})])
    assert "the metadata of prompt 3 cannot be sent" in next(iter(told.causes))


def test_a_service_that_is_restarted_goes_on():
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with running(Marks(), port=port):
        client = ServiceReward(url, retries=1, backoff=0.05)
        assert client(*samples((1, 1))).valid.all()
    down = client(*samples((1, 1), (2, 2)))
    assert not down.valid.any()
    assert list(down.causes.values()) == [2]
    assert all(url in cause for cause in down.causes)
    client.retries, client.backoff = 50, 0.1
    with ThreadPoolExecutor(1) as pool:
        during = pool.submit(client, *samples((3, 3)))
        time.sleep(0.3)
        with running(Marks(), port=port):
            assert during.result(10).values.tolist() == [771]
            assert client(*samples((4, 4))).values.tolist() == [1028]
    client.close()


def test_replicas_share_the_work_and_one_that_fails_is_left_out():
    judges = [Marks(batch_size=2, seconds=0.02) for _ in range(2)]
    media, prompts = samples(*((i, i) for i in range(16)))
    with contextlib.ExitStack() as first, running(judges[1]) as (b, _):
        a, _ = first.enter_context(running(judges[0]))
        client = ServiceReward([a, b], retries=2, backoff=0.02)
        assert client.batch_size == 4
        assert client(media, prompts).values.tolist() == [257 * i for i in range(16)]
        assert [len(judge.seen) for judge in judges] == [8, 8]
        first.close()
        assert client(media, prompts).values.tolist() == [257 * i for i in range(16)]
        assert len(judges[0].seen) == 8
        client.close()


def test_a_replica_that_is_down_at_the_start_does_not_stop_a_run(service):
    with ServiceReward([f"http://127.0.0.1:{free_port()}", service], backoff=0.02) as client:
        assert client(*samples(*((i, 1) for i in range(12)))).valid.all()


def test_replicas_of_different_judges_are_refused(service):
    with running(Marks(), judge="m:other") as (other, _):
        with pytest.raises(RewardError, match=f"{other} runs 'm:other', but the judge of {service} is 'm:marks'"):
            ServiceReward([service, other])
        with pytest.raises(RewardError, match="runs 'm:marks', but judge is 'm:wanted'"):
            ServiceReward(service, judge="m:wanted")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"urls": []}, "urls is empty"),
        ({"urls": "localhost:80"}, "url 'localhost:80' is no address"),
        ({"urls": "ftp://x"}, "url 'ftp://x' is no address"),
        ({"urls": 3}, "url 3 is no address"),
        ({"urls": "http://x:99999"}, "is no address"),
        ({"urls": "http://x/?token=a"}, "more than a path"),
        ({"urls": ["http://x", "http://x/"]}, "names one server twice"),
        ({"urls": "http://x", "timeout": 0}, "timeout=0"),
        ({"urls": "http://x", "retries": -1}, "retries=-1"),
        ({"urls": "http://x", "retries": True}, "retries=True"),
        ({"urls": "http://x", "backoff": "1"}, "backoff='1'"),
        ({"urls": "http://x", "batch_size": 0}, "batch_size=0"),
    ],
)
def test_an_option_that_cannot_be_is_refused(options, message):
    with pytest.raises(RewardError, match=message):
        ServiceReward(**options)


def test_a_password_in_a_url_is_refused_and_not_shown():
    with pytest.raises(RewardError, match="the url of x holds a password") as caught:
        ServiceReward("http://me:hunter2@x:80")
    assert "hunter2" not in str(caught.value)


# The process itself

SERVE = """
import sys
from dancegrpo.settings import RewardConfig
from dancegrpo.rewards.service import serve
serve("far", RewardConfig(judge="slow:score", options={"batch_size": 1}), port=int(sys.argv[1]), device="cpu",
      token="s3cret-token", batch_across_requests=False, on_ready=lambda url: print(url, flush=True))
"""
SLOW = """
import pathlib, time
def score(images, prompts):
    pathlib.Path("started").touch()
    time.sleep(0.4)
    return [float(prompt) for prompt in prompts]
"""


def test_a_stopped_server_finishes_what_it_accepted_and_tells_no_token(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text(SLOW)
    monkeypatch.setenv("REWARD_TOKEN", TOKEN)
    command = [sys.executable, "-c", SERVE, str(free_port())]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().strip()
        client = ServiceReward(url, token_env="REWARD_TOKEN", batch_size=2, retries=0)
        with ThreadPoolExecutor(1) as pool:
            told = pool.submit(client, torch.zeros(2, 1, 3, 2, 2), [Prompt(0, "1.5"), Prompt(1, "2.5")])
            until((tmp_path / "started").exists)
            process.send_signal(signal.SIGTERM)
            assert told.result(20).values.tolist() == [1.5, 2.5]
        out, err = process.communicate(timeout=20)
        assert process.returncode == 0
        assert TOKEN not in out + err
        assert not client(torch.zeros(1, 1, 3, 2, 2), [Prompt(0, "1")]).valid.any()
    finally:
        process.kill()
        process.wait()


def test_replicas_with_other_settings_are_other_judges_wherever_their_files_are():
    def named(**options):
        return identity(RewardConfig(judge="jpeg", options=options))

    assert named(incompressible=True) != named()
    assert named(weights="/a/x.pt", device="cuda:1", batch_size=4) == named(weights="/b/x.pt")
    assert identity(RewardConfig(judge="jpeg", threshold=0.5)) != named()
