"""People as judges: what votes mean, that none is lost, and who may cast them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import threading
import time

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import rankdata

from dancegrpo.errors import RewardError
from dancegrpo.prompts import Prompt
from dancegrpo.rewards import Judges, load_reward
from dancegrpo.rewards.human import HumanReward, fingerprint, group_key
from dancegrpo.rewards.human.votes import Ballot, Votes, scores_of
from dancegrpo.settings import RewardConfig

WEB = httpx.Client(timeout=30)
HOSTILE = "</h1><script>alert(1)</script>\"'&{{7*7}}\u202e"


def media(count, frames=1, seed=0):
    return torch.randint(0, 256, (count, frames, 3, 8, 8), generator=torch.Generator().manual_seed(seed)) / 255


def prompts_of(*sizes, first=0):
    return [Prompt(first + i, f"prompt {first + i}") for i, size in enumerate(sizes) for _ in range(size)]


@pytest.fixture
def opened():
    """Builds judges; takes their pages down afterwards."""
    judges = []

    def build(*args, **options):
        judges.append(HumanReward(*args, **options))
        return judges[-1]

    yield build
    for judge in judges:
        judge.close()


class Voter:
    """A person, as far as the server can tell: answers each open group by `vote(group)` until the judge is done."""

    def __init__(self, judge, vote):
        self.judge, self.vote, self.asked = judge, vote, []

    def during(self, samples, prompts):
        done = []
        thread = threading.Thread(target=lambda: done.append(self.judge(samples, prompts)), daemon=True)
        thread.start()
        while thread.is_alive():
            for group in WEB.get(self.judge.server.url + "state").json()["groups"]:
                if group["key"] not in self.asked and (body := self.vote(group)) is not None:
                    self.asked.append(group["key"])
                    WEB.post(self.judge.server.url + "vote", json={"group": group["key"], **body})
            time.sleep(0.01)
        return done[0]


# Scores.


def test_ranks_are_spread_evenly_from_one_to_zero():
    assert scores_of("rank", [2, 0, 1]) == [0.0, 1.0, 0.5]


def test_ties_share_the_mean_of_their_places():
    assert scores_of("rank", [0, 0, 2, 3]) == pytest.approx([2.5 / 3, 2.5 / 3, 1 / 3, 0])


def test_those_left_out_have_no_score_and_do_not_count():
    assert scores_of("rank", [None, 3, 0, None, 1]) == [None, 0.0, 1.0, None, 0.5]


def test_a_lone_rank_compares_with_nothing():
    assert scores_of("rank", [0, None]) == [None, None]


def test_thumbs_are_one_and_zero():
    assert scores_of("thumbs", [1, 0, None]) == [1.0, 0.0, None]


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=10))
def test_any_ranking_agrees_with_scipys_ranks(places):
    expected = (len(places) - rankdata(places)) / (len(places) - 1)
    np.testing.assert_allclose(scores_of("rank", places), expected, atol=1e-12)


# The page's side.


def test_votes_become_scores_in_the_order_of_the_samples(opened, tmp_path):
    judge = opened(votes=tmp_path / "votes.jsonl")
    votes = {"prompt 0": [1, 0, 2], "prompt 1": [0, 1, None, 2]}
    scores = Voter(judge, lambda group: {"votes": votes[group["prompt"]]}).during(media(7), prompts_of(3, 4))
    assert scores.values[scores.valid].tolist() == [0.5, 1.0, 0.0, 1.0, 0.5, 0.0]
    assert scores.valid.tolist() == [True] * 5 + [False, True]
    assert scores.causes == {"the sample got no vote": 1}


def test_a_skipped_group_has_no_scores(opened, tmp_path):
    judge = opened("thumbs", votes=tmp_path / "v.jsonl")
    scores = Voter(judge, lambda group: {"skipped": True}).during(media(2), prompts_of(2))
    assert not scores.valid.any()
    assert scores.causes == {"a person skipped the group": 2}


def test_the_run_goes_on_with_the_groups_that_are_answered(opened, tmp_path):
    judge = opened("thumbs", wait=3, votes=tmp_path / "v.jsonl")
    voter = Voter(judge, lambda group: {"votes": [1, 0]} if group["prompt"] == "prompt 1" else None)
    scores = voter.during(media(4), prompts_of(2, 2))
    assert scores.valid.tolist() == [False, False, True, True]
    assert scores.values[2:].tolist() == [1.0, 0.0]
    assert scores.causes == {"nobody voted within 3 s": 2}


def test_a_group_of_one_is_not_asked_to_be_ranked(opened, tmp_path):
    judge = opened(votes=tmp_path / "v.jsonl")
    assert judge(media(2), prompts_of(1, 1)).causes == {"a group of one sample cannot be ranked": 2}


def test_samples_come_as_exact_pictures_and_clips_as_moving_ones(opened, tmp_path):
    judge, found = opened("thumbs", votes=tmp_path / "v.jsonl"), []

    def look(group):
        found.append(WEB.get(f"{judge.server.url}media/{group['key']}/1"))
        return {"votes": [1, 1]}

    for frames in (1, 3):
        Voter(judge, look).during(media(2, frames), prompts_of(2))
    for answer, frames, kind in zip(found, (1, 3), ("image/png", "image/webp")):
        assert answer.headers["content-type"] == kind
        image = Image.open(io.BytesIO(answer.content))
        assert getattr(image, "n_frames", 1) == frames
        for i in range(frames):
            image.seek(i)
            shown = np.array(image.convert("RGB"))
            expected = (media(2, frames)[1, i].permute(1, 2, 0) * 255).round().byte().numpy()
            assert np.array_equal(shown, expected)


def test_a_group_is_shuffled_but_always_alike(opened, tmp_path):
    orders = []
    for name in ("a", "b"):
        judge = opened("thumbs", votes=tmp_path / name)
        Voter(judge, lambda group: orders.append(group["order"]) or {"skipped": True}).during(media(9), prompts_of(9))
    assert orders[0] == orders[1] != list(range(9))
    assert sorted(orders[0]) == list(range(9))


def test_a_hostile_prompt_reaches_the_page_as_data_only(opened, tmp_path):
    judge, seen = opened("thumbs", votes=tmp_path / "v.jsonl"), []

    def look(group):
        seen.append(group["prompt"])
        page = WEB.get(judge.server.url)
        assert HOSTILE not in page.text
        assert "script-src 'self'" in page.headers["content-security-policy"]
        assert "unsafe" not in page.headers["content-security-policy"]
        return {"votes": [1]}

    assert Voter(judge, look).during(media(1), [Prompt(0, HOSTILE)]).valid.all()
    assert seen == [HOSTILE]
    assert json.loads((tmp_path / "v.jsonl").read_text())["prompt"] == HOSTILE


@pytest.mark.parametrize("path", ["", "state", "page.js", "page.css", "media/x/0", "vote"])
def test_without_the_token_nothing_is_served(opened, tmp_path, path):
    judge = opened(votes=tmp_path / "v.jsonl")
    root = judge.server.url.replace(judge.server.token, "guess")
    answer = WEB.post(root + path, json={}) if path == "vote" else WEB.get(root + path)
    assert answer.status_code == 403
    assert "wrong token" in answer.text
    assert WEB.get(judge.server.url.split(judge.server.token)[0]).status_code == 404
    assert WEB.get(judge.server.url).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (b"?", 400, "no vote"),
        (b"[" * 20_000, 400, "no vote"),
        (b"[]", 400, "no vote"),
        (b"x" * 70_000, 413, "at most"),
        ({"group": "elsewhere", "votes": [0, 1, 2]}, 409, "not waiting"),
        ({"votes": None}, 400, "list of 3"),
        ({"votes": [0, 1]}, 400, "list of 3"),
        ({"votes": [0, 1, 3]}, 400, "from 0 to 2"),
        ({"votes": [0, 1, -1]}, 400, "from 0 to 2"),
        ({"votes": [0, 1, True]}, 400, "from 0 to 2"),
        ({"votes": [0, 1.0, 2]}, 400, "from 0 to 2"),
        ({"votes": [0, None, None]}, 400, "give at least 2"),
        ({"votes": [0, "1", 2], "skipped": "yes"}, 400, "from 0 to 2"),
    ],
)
def test_a_vote_that_does_not_fit_is_refused_and_not_kept(opened, tmp_path, body, status, told):
    judge, answers = opened(votes=tmp_path / "v.jsonl"), []

    def misvote(group):
        sent = json.dumps({"group": group["key"], **body}).encode() if isinstance(body, dict) else body
        answers.append(WEB.post(judge.server.url + "vote", content=sent))
        assert (tmp_path / "v.jsonl").read_text() == ""
        return {"votes": [0, 1, 2]}

    assert Voter(judge, misvote).during(media(3), prompts_of(3)).valid.all()
    assert answers[0].status_code == status
    assert told in answers[0].json()["error"]


def test_a_full_disk_is_told_and_the_question_stays_open(opened, tmp_path, monkeypatch):
    judge, answers = opened("thumbs", votes=tmp_path / "v.jsonl"), []

    def vote(group):
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda handle, data: len(data) - 1)
            answers.append(WEB.post(judge.server.url + "vote", json={"group": group["key"], "votes": [1]}))
        return {"votes": [0]}

    # httpx and the event loop write through sockets, not os.write.
    assert Voter(judge, vote).during(media(1), prompts_of(1)).values.tolist() == [0.0]
    assert answers[0].status_code == 507
    assert "could not be kept: No space left" in answers[0].json()["error"]


def test_the_page_is_announced_once_and_listens_on_loopback_alone(opened, tmp_path, caplog):
    judge = opened(votes=tmp_path / "v.jsonl")
    assert caplog.text.count(judge.server.url) == 1
    assert judge.server.url.startswith("http://127.0.0.1:")


# The file.


def test_a_vote_is_on_the_disk_when_it_is_answered(opened, tmp_path):
    judge, lines = opened("thumbs", votes=tmp_path / "deep" / "v.jsonl"), []

    def vote(group):
        lines.append((tmp_path / "deep" / "v.jsonl").read_text().count("\n"))
        return {"votes": [1]}

    Voter(judge, vote).during(media(3), prompts_of(1, 1, 1))
    assert lines == [0, 1, 2]


def test_a_resumed_run_does_not_ask_again_about_the_same_media(opened, tmp_path):
    samples, prompts, path = media(3), prompts_of(3), tmp_path / "v.jsonl"
    first = Voter(opened(votes=path), lambda group: {"votes": [2, 0, 1]}).during(samples, prompts)
    again = opened(votes=path, wait=0)
    assert torch.equal(again(samples, prompts).values, first.values)
    # Whatever ids the prompts have now, and in whatever order the samples come.
    assert again(samples[[1, 2, 0]], prompts_of(3, first=0)).values.tolist() == [1.0, 0.5, 0.0]
    assert again((samples * 255).round().to(torch.uint8), prompts).values.tolist() == first.values.tolist()
    changed = samples.clone()
    changed[0, 0, 0, 0, 0] = 1 - changed[0, 0, 0, 0, 0]
    assert not again(changed, prompts).valid.any()
    assert not again(samples, [Prompt(0, "other")] * 3).valid.any()
    assert not opened("thumbs", votes=path, wait=0)(samples, prompts).valid.any()


def test_media_stay_as_they_are(opened, tmp_path):
    samples = media(2)
    Voter(opened(votes=tmp_path / "v"), lambda group: {"votes": [0, 1]}).during(samples, prompts_of(2))
    assert torch.equal(samples, media(2))


def test_votes_are_read_from_a_file_without_a_page(tmp_path):
    samples, path = media(5), tmp_path / "v.jsonl"
    known = [fingerprint(sample) for sample in samples]
    rows = [
        {"mode": "thumbs", "prompt": "prompt 0", "media": known[:2], "votes": [0, 0]},
        {"mode": "thumbs", "prompt": "prompt 0", "media": [known[1], known[0]], "votes": [1, None]},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    judge = load_reward(
        "people", RewardConfig(judge="human", options={"serve": False, "votes": str(path), "mode": "thumbs"})
    )
    scores = judge(samples, prompts_of(2, 3))
    assert scores.valid.tolist() == [False, True, False, False, False]
    assert scores.values[1] == 1.0
    assert scores.causes == {"the sample got no vote": 1, f"no vote in {path}": 3}
    assert judge.server is None


def test_a_fingerprint_is_what_the_documentation_says():
    levels = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5)
    pixels = levels.permute(0, 2, 3, 1).contiguous().numpy()
    expected = hashlib.sha256(b"2,4,5," + pixels.tobytes()).hexdigest()
    assert fingerprint(levels) == fingerprint(levels / 255) == fingerprint(pixels) == expected
    asked = hashlib.sha256(b'["rank","\\u00e9",["a","b"]]').hexdigest()
    assert group_key("rank", "é", ["b", "a"]) == asked


def test_equal_samples_keep_their_own_votes():
    ballot = Ballot("rank", "p", ("a", "b", "a"), (0, 2, 1))
    assert ballot.votes_for(("a", "a", "b")) == [0, 1, 2]


def test_the_half_line_of_a_crash_is_dropped_and_the_file_goes_on(tmp_path, caplog):
    path, ballots = tmp_path / "v.jsonl", [Ballot("thumbs", f"{i}", ("a",), (1,)) for i in range(3)]
    votes = Votes(path, writable=True)
    for ballot in ballots[:2]:
        votes.add(ballot)
    path.write_bytes(path.read_bytes()[:-30])
    torn = Votes(path, writable=True)
    assert set(torn.ballots) == {ballots[0].key}
    assert "half a line" in caplog.text
    torn.add(ballots[2])
    assert set(Votes(path, writable=False).ballots) == {ballots[0].key, ballots[2].key}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("?", "line 2 is no ballot"),
        ("[1]", "mode one of rank, thumbs"),
        ('{"mode": "stars"}', "mode one of rank, thumbs"),
        ('{"mode": "rank", "prompt": 1}', "prompt must be a text"),
        ('{"mode": "rank", "prompt": "p", "media": []}', "list of fingerprints"),
        ('{"mode": "rank", "prompt": "p", "media": ["a", "b"], "votes": [0, 2]}', "from 0 to 1"),
        ('{"mode": "rank", "prompt": "p", "media": ["a", "b"], "votes": [0, 1], "group": "x"}', "group is not the key"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(tmp_path, line, told):
    (tmp_path / "v.jsonl").write_text(
        '{"mode": "thumbs", "prompt": "p", "media": ["a"], "votes": [1]}\n' + line + "\n\n"
    )
    with pytest.raises(RewardError, match=told) as caught:
        HumanReward(serve=False, votes=tmp_path / "v.jsonl")
    assert "line 2" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mode": "stars"}, "mode='stars'.*rank or thumbs"),
        ({"wait": -1}, "wait=-1"),
        ({"per_page": 0}, "per_page=0"),
        ({"fps": 0}, "fps=0"),
        ({"serve": False, "votes": "missing.jsonl"}, "missing.jsonl.*No such file.*name a file with votes"),
        ({"votes": "/proc/nowhere/v.jsonl"}, "cannot be opened"),
        ({"port": 70000}, "port=70000"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(options, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RewardError, match=told) as caught:
        HumanReward(**options)
    assert "\n" not in str(caught.value)


def test_a_port_in_use_is_refused(opened, tmp_path):
    port = int(opened(votes=tmp_path / "a").server.url.split(":")[2].split("/")[0])
    with pytest.raises(RewardError, match=f"port={port} of the human judge cannot be had"):
        HumanReward(port=port, votes=tmp_path / "b")


# In a run.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_waiting_at_once_and_gives_the_handlers_back(opened, tmp_path, number):
    judge, asked = opened(votes=tmp_path / "v.jsonl"), []
    before = signal.signal(number, lambda *_: asked.append("finish the iteration first"))
    mine = signal.getsignal(number)
    try:
        timer = threading.Timer(0.3, os.kill, (os.getpid(), number))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            Judges({"people": judge}).score(media(2), prompts_of(2))
        assert signal.getsignal(number) is mine
        assert asked == []
    finally:
        timer.cancel()
        signal.signal(number, before)
    assert WEB.get(judge.server.url + "state").json()["groups"] == []


def test_it_says_that_it_is_no_judge_for_evaluations():
    assert not HumanReward.in_evaluation
    assert HumanReward.batch_size is None
    assert not HumanReward.differentiable


def test_no_samples_need_no_person(opened, tmp_path):
    assert len(opened(votes=tmp_path / "v")(media(0), [])) == 0


@pytest.mark.parametrize("content", [b"a red cat", b'{"key": 1}', b'{"group": "x", "mode": "rank", "votes": [9]}'])
def test_a_file_that_is_no_torn_vote_is_refused_and_stays_as_it_was(tmp_path, content):
    file = tmp_path / "mine.txt"
    file.write_bytes(content)
    with pytest.raises(RewardError, match="line 1 is no ballot"):
        HumanReward(votes=file)
    assert file.read_bytes() == content


def test_people_are_given_finite_time_and_by_their_own_option(tmp_path):
    with pytest.raises(RewardError, match="wait=inf"):
        HumanReward(votes=tmp_path / "v.jsonl", wait=float("inf"))
    options = {"votes": str(tmp_path / "v.jsonl"), "serve": False}
    with pytest.raises(RewardError, match=r"by options\.wait"):
        load_reward("people", RewardConfig(judge="human", timeout=5, options=options | {"serve": True}))
