"""A vision-language model as judge: against a real server with a real (tiny, random) model, and against bad servers."""

from __future__ import annotations

import base64
import io
import json
import math
import threading
import time
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from dancegrpo.errors import RewardError
from dancegrpo.prompts import Prompt
from dancegrpo.rewards import load_reward
from dancegrpo.rewards.chat import Answer, ScoreError
from dancegrpo.rewards.vlm import VLMReward, score_answer
from dancegrpo.settings import RewardConfig
from tiny_vlm_server import VOCABULARY, TinyVLM, serve

PROMPTS = [Prompt(i, text) for i, text in enumerate(["a cat", "two dogs", "a {prompt}", "a red car", "x"])]
RUBRIC = "From 0 to 9, how well does this show: {prompt}?"


class Patience:
    """In place of the endpoint's event: waits for nothing, remembers for how long it should have."""

    def __init__(self):
        self.waited = []

    def wait(self, seconds):
        self.waited.append(seconds)
        return False

    def clear(self):
        pass


def media(count=5, frames=1, side=16):
    return torch.rand(count, frames, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def vlm():
    return TinyVLM()


@pytest.fixture(scope="module")
def server(vlm):
    with serve(vlm) as (url, bodies):
        yield url, bodies


def judge_of(server, **options):
    options = {"rubric": RUBRIC, "scale": [0, 9], "max_tokens": 1, **options}
    return VLMReward(server[0], "tiny", **options)


@torch.no_grad()
def expected(vlm, sample, text, digits=range(10)):
    """The expectation straight from the model's logits, the pictures never having been files."""
    pictures = [
        Image.fromarray((frame.permute(1, 2, 0) * 255).round().to(torch.uint8).contiguous().numpy()) for frame in sample
    ]
    logits = vlm.model(**vlm.inputs(pictures, RUBRIC.replace("{prompt}", text))).logits[0, -1]
    probabilities = logits[[vlm.digits[digit] for digit in digits]].double().softmax(0)
    return float(probabilities @ torch.tensor(list(digits), dtype=torch.float64))


def test_the_score_is_the_models_expectation_over_the_digits(vlm, server):
    samples = media()
    scores = judge_of(server, top_logprobs=len(VOCABULARY))(samples, PROMPTS)
    assert scores.valid.all()
    told = [expected(vlm, sample, prompt.text) for sample, prompt in zip(samples, PROMPTS)]
    np.testing.assert_allclose(scores.values.numpy(), told, rtol=1e-5)
    assert scores.values.std() > 0.1


def test_only_digits_of_the_scale_count_and_an_answer_outside_it_has_no_score(vlm, server):
    samples = media()
    scores = judge_of(server, scale=[1, 9], top_logprobs=len(VOCABULARY))(samples, PROMPTS)
    # The model answers 0, 9, 0, 0, 9.
    assert scores.valid.tolist() == [False, True, False, False, True]
    told = [expected(vlm, samples[i], PROMPTS[i].text, range(1, 10)) for i in (1, 4)]
    np.testing.assert_allclose(scores.values[scores.valid].numpy(), told, rtol=1e-5)
    assert scores.causes == {"the model's number is outside the scale 1 to 9": 3}


def test_a_clip_is_sent_as_evenly_spaced_frames(vlm, server):
    clips = media(2, frames=6)
    scores = judge_of(server, frames=3, top_logprobs=len(VOCABULARY))(clips, PROMPTS[:2])
    told = [expected(vlm, clip[[1, 3, 5]], prompt.text) for clip, prompt in zip(clips, PROMPTS)]
    np.testing.assert_allclose(scores.values.numpy(), told, rtol=1e-5)


def test_a_batch_scores_as_one_at_a_time_in_any_order(server):
    judge, samples = judge_of(server, concurrency=4), media()
    together = judge(samples, PROMPTS).values
    order = [3, 0, 4, 1, 2]
    assert torch.equal(judge(samples[order], [PROMPTS[i] for i in order]).values, together[order])
    assert torch.equal(torch.cat([judge(samples[i : i + 1], PROMPTS[i : i + 1]).values for i in range(5)]), together)


def test_bytes_and_floats_score_alike_and_media_stay_as_they_are(server):
    judge, levels = judge_of(server), (media() * 255).round().to(torch.uint8)
    floats = levels / 255
    before = floats.clone()
    assert torch.equal(judge(levels, PROMPTS).values, judge(floats, PROMPTS).values)
    assert torch.equal(floats, before)


def test_the_request_holds_the_exact_pixels_the_prompt_once_and_asks_for_no_chance(server):
    levels = (media(1) * 255).round().to(torch.uint8)
    judge = judge_of(server, request={"top_p": 1, "seed": None})
    judge(levels, [PROMPTS[2]])
    body = server[1][-1]
    picture, text = body["messages"][0]["content"]
    kind, _, data = picture["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    sent = np.array(Image.open(io.BytesIO(base64.b64decode(data))))
    assert np.array_equal(sent, levels[0, 0].permute(1, 2, 0).numpy())
    assert text["text"] == "From 0 to 9, how well does this show: a {prompt}?"
    assert (body["temperature"], body["logprobs"], body["top_logprobs"], body["top_p"]) == (0, True, 20, 1)
    assert "seed" not in body


def test_a_recipe_names_it_and_the_rubric_may_be_a_file(server, tmp_path):
    (tmp_path / "rubric.txt").write_text(RUBRIC)
    options = {"url": server[0] + "/", "model": "tiny", "rubric_file": str(tmp_path / "rubric.txt"), "scale": [0, 9]}
    judge = load_reward("taste", RewardConfig(judge="vlm", options={**options, "max_tokens": 1}))
    assert torch.equal(judge(media(), PROMPTS).values, judge_of(server)(media(), PROMPTS).values)
    assert judge.remote
    assert not judge.differentiable


def test_a_key_comes_from_the_environment_and_is_never_told(vlm, monkeypatch):
    with serve(vlm, key="sk-secret") as server:
        monkeypatch.setenv("TINY_KEY", "sk-secret")
        assert judge_of(server, api_key_env="TINY_KEY")(media(), PROMPTS).valid.all()
        monkeypatch.setenv("TINY_KEY", "sk-other")
        with pytest.raises(RewardError, match=r"chat/completions answered 401: .*bad key.*api_key_env") as caught:
            judge_of(server, api_key_env="TINY_KEY")
        assert "sk-other" not in str(caught.value)


def test_a_wrong_model_and_a_closed_port_fail_at_once_with_the_url(server):
    with pytest.raises(
        RewardError, match=rf"{server[0]}/chat/completions answered 404: .*'large' does not exist.*model"
    ):
        VLMReward(server[0], "large", rubric=RUBRIC)
    with pytest.raises(RewardError, match=r"http://127.0.0.1:1/v1/chat/completions cannot be reached: ConnectError"):
        VLMReward("http://127.0.0.1:1/v1", "tiny", rubric=RUBRIC, retries=0)


# What bad servers say.


def completion(text, logprobs=None):
    return {"choices": [{"message": {"content": text}, "logprobs": logprobs}]}


@contextmanager
def scripted(*replies):
    """A server that answers its n-th request by replies[n], the last one for ever: (status, headers, body, seconds)."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, headers, content, seconds = replies[min(len(seen), len(replies) - 1)]
            seen.append((time.monotonic(), body))
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                for i in range(10):  # drop by drop, so that no single read is slow
                    self.wfile.write(content[i * len(content) // 10 : (i + 1) * len(content) // 10])
                    time.sleep(seconds / 10)
            except OSError:
                pass

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


def ok(content, seconds=0.0):
    return 200, {}, content, seconds


def ask(url, **options):
    options = {"retries": 0, "preflight": False, **options}
    return VLMReward(url, "m", rubric="{prompt}? 1 to 5", **options)(media(1), PROMPTS[:1])


def cause(scores):
    assert not scores.valid.any()
    assert scores.values.isnan().all()
    assert sum(scores.causes.values()) == len(scores)
    return next(iter(scores.causes))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"<html>welcome", "something that is not JSON"),
        (b"[" * 100_000, "something that is not JSON"),
        ([1, 2], "no chat completion"),
        ({"choices": []}, "no chat completion"),
        ({"choices": [{"message": {"content": None}}]}, "answered without text"),
        (completion("4", {"content": [{"token": "4", "logprob": "high"}]}), "no chat completion"),
        (completion("4", {"content": [{"token": "4", "logprob": math.nan}]}), "no chat completion"),
        (completion("4", {"content": [{"token": "x", "logprob": -1.0}]}), "of other tokens"),
        (completion("4"), "left out the log-probabilities"),
        (completion("\ud800 4", {"content": [{"token": "4", "logprob": -1.0, "bytes": 10**12}]}), "of other tokens"),
    ],
)
def test_rubbish_is_no_score(content, told):
    with scripted(ok(content)) as (url, _):
        assert told in cause(ask(url))


def test_an_endless_answer_is_cut(monkeypatch):
    monkeypatch.setattr("dancegrpo.rewards.chat.LARGEST_ANSWER", 1000)
    with scripted(ok(b"x" * 2000)) as (url, _):
        assert "more than 1000 bytes" in cause(ask(url))


def test_a_slow_server_costs_the_timeout_even_if_it_drips():
    with scripted(ok(completion("4"), seconds=3.0)) as (url, _):
        started = time.monotonic()
        told = cause(ask(url, timeout=0.5))
        assert url in told
        assert "ReadTimeout" in told
        assert time.monotonic() - started < 1.5


def test_a_server_that_recovers_is_asked_again():
    four = {"content": [{"token": "4", "logprob": 0.0}]}
    with scripted((503, {}, b"loading", 0), ok(completion("4", four))) as (url, seen):
        assert ask(url, retries=2).values.tolist() == [4.0]
        assert len(seen) == 2
        assert seen[1][0] - seen[0][0] >= 0.5


def test_retries_end_and_the_last_trouble_is_told(monkeypatch):
    patience = Patience()
    monkeypatch.setattr("dancegrpo.rewards.chat.Event", lambda: patience)
    with scripted((500, {}, b"out of\nmemory", 0)) as (url, seen):
        assert cause(ask(url, retries=2)) == f"{url}/chat/completions answered 500: out of memory"
        assert len(seen) == 3
    assert patience.waited == [0.5, 1.0]


def test_a_refusal_is_not_repeated():
    with scripted((400, {}, b"no", 0)) as (url, seen):
        assert "answered 400: no" in cause(ask(url, retries=5))
        assert len(seen) == 1


@pytest.mark.parametrize(
    ("header", "waits"),
    [
        ("7", 7.0),
        ("100000", 60.0),
        (lambda: formatdate(time.time() + 20, usegmt=True), 20.0),
        ("soon", 0.5),
        ("-3", 0.5),
        ("nan", 0.5),
    ],
)
def test_retry_after_is_honoured_within_a_minute(monkeypatch, header, waits):
    patience = Patience()
    monkeypatch.setattr("dancegrpo.rewards.chat.Event", lambda: patience)
    header = header() if callable(header) else header
    with scripted((429, {"Retry-After": header}, b"slow down", 0)) as (url, _):
        judge = VLMReward(url, "m", rubric="{prompt}", retries=1, preflight=False)
        with pytest.raises(Exception, match="answered 429: slow down"):
            judge.endpoint.post({})
    # A date has whole seconds, and some pass before it is read.
    assert patience.waited == [pytest.approx(waits, abs=5.0 if waits == 20.0 else 0.0)]


def test_an_interrupt_ends_the_waiting_of_all_requests(monkeypatch):
    with scripted((503, {"Retry-After": "30"}, b"", 0)) as (url, seen):
        judge = VLMReward(url, "m", rubric="{prompt}", retries=5, preflight=False)

        def interrupted(self, *_):
            while not seen:
                time.sleep(0.01)
            raise KeyboardInterrupt

        monkeypatch.setattr("concurrent.futures.ThreadPoolExecutor.map", interrupted_map(interrupted))
        with pytest.raises(KeyboardInterrupt):
            judge(media(1), PROMPTS[:1])
        deadline = time.monotonic() + 5
        while any(thread.name.startswith("vlm") for thread in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def interrupted_map(interrupt):
    def run(self, function, *rows):
        for row in zip(*rows):
            self.submit(function, *row)
        interrupt(self)

    return run


def test_one_failure_does_not_touch_its_neighbours():
    good = ok(completion("2", {"content": [{"token": "2", "logprob": 0.0}]}))
    with scripted(good, ok(b"?"), good) as (url, _):
        judge = VLMReward(url, "m", rubric="{prompt}", concurrency=1, retries=0, preflight=False)
        scores = judge(media(3), PROMPTS[:3])
    assert scores.valid.tolist() == [True, False, True]
    assert sum(scores.causes.values()) == 1


# Servers without log-probabilities: found out once.


def test_without_log_probabilities_the_number_counts_and_a_warning_says_so(caplog):
    with scripted(ok(completion("Score: 4.5/5."))) as (url, seen):
        scores = ask(url, preflight=True)
    assert scores.values.tolist() == [4.5]
    assert "gets no log-probabilities" in caplog.text
    assert "logprobs" in seen[0][1]
    assert "logprobs" not in seen[1][1]


def test_a_server_that_refuses_to_give_them_is_asked_without(caplog):
    with scripted((400, {}, b"logprobs unknown", 0), ok(completion("3"))) as (url, seen):
        assert ask(url, preflight=True).values.tolist() == [3.0]
    assert "answered 400: logprobs unknown" in caplog.text
    assert ["logprobs" in body for _, body in seen] == [True, False, False]


# Reading answers.


def tokens(*entries):
    """(token, {alternative: probability}) -> an answer with the tokens' text."""
    listed = tuple(
        (word.encode(), {key.encode(): math.log(p) for key, p in others.items()}) for word, others in entries
    )
    return Answer("".join(word for word, _ in entries), listed)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (tokens(("4", {"4": 0.6, "2": 0.2, "9": 0.1, "the": 0.1})), (4 * 0.6 + 2 * 0.2) / 0.8),
        (tokens(("\n\n", {"\n\n": 1.0}), (" 4", {" 4": 0.5, "4": 0.1, "5": 0.4})), 4.4),
        (tokens(("Score", {}), (":", {}), ("3", {"3": 0.5, "1": 0.5}), ("/", {}), ("5", {"5": 1.0})), 2.0),
        (tokens(("**5**", {"**5**": 0.5, "**3**": 0.3, "**": 0.1, "4": 0.1})), (5 * 0.5 + 3 * 0.3) / 0.8),
        (tokens(("<think>2? 3?</think>", {}), ("\n", {}), ("1", {"1": 0.75, "3": 0.25})), 1.5),
        (tokens(("é: ", {}), ("2", {"2": 1.0}), ("<|im_end|>", {"<|im_end|>": 1.0})), 2.0),
        (tokens(("3", {"3": 1e-300, "1": 3e-300})), 1.5),
    ],
)
def test_the_expectation_is_taken_where_the_digit_stands(answer, score):
    assert score_answer(answer, (1, 5)) == pytest.approx(score, rel=1e-12)


def test_thoughts_that_the_server_hides_are_skipped():
    answer = tokens(("4", {"4": 1.0}), (" or 5", {}), ("4", {"4": 0.5, "2": 0.5}))
    assert score_answer(Answer("4", answer.tokens), (1, 5)) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no number"),
        ("I cannot rate this.", "no number"),
        ("four", "no number"),
        ("٤", "no number"),
        ("4 or 5", "several numbers"),
        ("4/10", "several numbers"),
        ("0", "outside the scale"),
        ("-3", "outside the scale"),
        ("42", "outside the scale"),
        ("1e9", "several numbers"),
        ("<think>4 seems", "cut off within the model's thoughts"),
    ],
)
def test_an_answer_that_is_no_score_is_none(text, told):
    with pytest.raises(Exception, match=told):
        score_answer(Answer(text, None), (1, 5), expected=False)


@pytest.mark.parametrize(
    ("text", "score"), [("4", 4), (" 4.5 ", 4.5), ("4/5", 4), ("3 out of 5", 3), ("- 2", 2), ("+1", 1)]
)
def test_a_number_written_is_read(text, score):
    assert score_answer(Answer(text, None), (1, 5), expected=False) == score


def test_a_fraction_has_no_digit_to_take_the_expectation_at():
    with pytest.raises(Exception, match="not a single digit"):
        score_answer(tokens(("4", {"4": 1.0}), (".5", {".5": 1.0})), (1, 5))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rubric": None}, "needs one rubric"),
        ({"rubric_file": "x"}, "needs one rubric"),
        ({"rubric": None, "rubric_file": "missing.txt"}, "rubric_file='missing.txt' cannot be read"),
        ({"rubric": " "}, "rubric is empty"),
        ({"rubric": "How good is {caption}?"}, r"placeholder \{caption\}"),
        ({"scale": [1, 10]}, r"scale=\[1, 10\]"),
        ({"scale": [3, 3]}, r"scale=\[3, 3\]"),
        ({"scale": 5}, "scale=5"),
        ({"api_key_env": "NO_SUCH_VARIABLE"}, "'NO_SUCH_VARIABLE' of the vlm judge is not set"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"frames": 0}, "frames=0"),
        ({"retries": -1}, "retries=-1"),
        ({"timeout": 0}, "timeout=0"),
        ({"url": "localhost:8000"}, "no web address"),
        ({"url": "file:///etc/passwd"}, "no web address"),
        ({"url": "http://me:sk-1@host/v1"}, "api_key_env"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(options, told):
    given = {"url": "http://127.0.0.1:1/v1", "model": "m", "rubric": RUBRIC, "preflight": False, **options}
    with pytest.raises(RewardError, match=told) as caught:
        VLMReward(**given)
    assert "\n" not in str(caught.value)


def test_a_number_in_an_answer_that_was_cut_off_is_no_score():
    choice = {"message": {"content": "It shows 3 cats sitting on"}, "finish_reason": "length"}
    with pytest.raises(ScoreError, match="cut off"):
        score_answer(Answer.read({"choices": [choice]}), (1, 5), expected=False)
    choice["message"]["content"] = " 3"
    assert score_answer(Answer.read({"choices": [choice]}), (1, 5), expected=False) == 3


def test_a_key_that_no_header_carries_is_refused_without_being_told(monkeypatch):
    monkeypatch.setenv("VLM_KEY", "sk-abc\nsk-SECRET")
    with pytest.raises(RewardError, match="the key in VLM_KEY") as refused:
        VLMReward("http://127.0.0.1:9/v1", "tiny", rubric="{prompt}?", api_key_env="VLM_KEY", preflight=False)
    assert "sk-" not in str(refused.value)
