"""Scoring while samples are still made: the same scores, and judges elsewhere start early."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dancegrpo.prompts import Prompt
from dancegrpo.rewards import Binary, Judges, Scores
from dancegrpo.rewards.scoring import runs_elsewhere


class Recorder:
    """A judge whose score is the sample's own number, and that remembers its batches and threads."""

    name, differentiable = "recorder", False

    def __init__(self, batch_size=None, remote=False):
        self.batch_size, self.remote = batch_size, remote
        self.batches, self.threads, self.asked = [], set(), threading.Event()

    def __call__(self, media, prompts):
        self.batches.append([int(prompt.text) for prompt in prompts])
        self.threads.add(threading.current_thread().name)
        self.asked.set()
        values = media[:, 0, 0, 0, 0].clone()
        return Scores(values, torch.ones_like(values, dtype=torch.bool))

    def to(self, device):
        return self


def samples(count):
    return (torch.arange(count) / 100)[:, None, None, None, None].expand(-1, 1, 3, 2, 2).clone()


def texts(count):
    return [Prompt(i, str(i)) for i in range(count)]


@settings(max_examples=40, deadline=None)
@given(
    pieces=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    batch_size=st.one_of(st.none(), st.integers(1, 7)),
    remote=st.booleans(),
)
def test_pieces_and_threads_change_neither_batches_nor_scores(pieces, batch_size, remote):
    total = sum(pieces)
    whole, pieced = Recorder(batch_size), Recorder(batch_size, remote)
    expected = Judges({"r": whole}).score(samples(total), texts(total))["r"]
    judges = Judges({"r": pieced})
    with judges.scoring(texts(total)) as scoring:
        for piece in samples(total).split(pieces):
            scoring.add(piece)
        found = judges.finish(scoring)["r"]
    assert found.values.equal(expected.values)
    assert found.values.tolist() == pytest.approx([i / 100 for i in range(total)])
    assert pieced.batches == whole.batches


def test_a_remote_judge_starts_before_the_last_sample_is_there():
    judge = Recorder(batch_size=2, remote=True)
    judges = Judges({"r": judge})
    with judges.scoring(texts(4)) as scoring:
        scoring.add(samples(4)[:3])
        assert judge.asked.wait(10)
        scoring.add(samples(4)[3:])
        judges.finish(scoring)
    assert judge.batches == [[0, 1], [2, 3]]
    assert threading.current_thread().name not in judge.threads


def test_a_judge_on_this_device_stays_on_this_thread():
    judge = Recorder(batch_size=2)
    Judges({"r": judge}).score(samples(4), texts(4))
    assert judge.threads == {threading.current_thread().name}


def test_two_remote_judges_work_side_by_side():
    meeting = threading.Barrier(2, timeout=10)

    class Waiting(Recorder):
        def __call__(self, media, prompts):
            meeting.wait()
            return super().__call__(media, prompts)

    scores = Judges({"a": Waiting(remote=True), "b": Waiting(remote=True)}).score(samples(3), texts(3))
    assert all(bool(verdict.valid.all()) for verdict in scores.values())


def test_a_judge_elsewhere_is_known_through_its_wrappers():
    local, pinned = Recorder(), Recorder()
    pinned.device = torch.device("meta")
    assert not runs_elsewhere(Binary(local, 0.5), torch.device("cpu"))
    assert runs_elsewhere(Binary(Recorder(remote=True), 0.5), torch.device("cpu"))
    assert runs_elsewhere(Binary(pinned, 0.5), torch.device("cpu"))


def test_samples_without_their_prompts_are_refused():
    judges = Judges({"r": Recorder()})
    with judges.scoring(texts(2)) as scoring:
        with pytest.raises(ValueError, match="3 samples came with 2 prompts"):
            scoring.add(samples(3))
        scoring.add(samples(1))
        with pytest.raises(ValueError, match="1 samples came with 2 prompts"):
            judges.finish(scoring)


def test_people_are_not_asked_at_evaluations():
    person = Recorder()
    person.in_evaluation = False
    judges = Judges({"person": person, "rule": Recorder()}, {"person": 1.0, "rule": 0.0}).for_evaluation()
    assert judges.score(samples(1), texts(1)).keys() == {"rule"}


def test_another_device_of_the_same_kind_is_elsewhere():
    judge = Recorder()
    judge.device = torch.device("cuda:1")
    assert runs_elsewhere(judge, torch.device("cuda:0"))
    assert not runs_elsewhere(judge, torch.device("cuda:1"))
    judge.device = torch.device("cuda")  # the first one
    assert not runs_elsewhere(judge, torch.device("cuda:0"))


def test_media_are_let_go_once_every_judge_has_had_them():
    judges = Judges({"a": Recorder(batch_size=2), "b": Recorder(batch_size=4)})
    with judges.scoring(texts(8)) as scoring:
        media = samples(4)
        kept = weakref.ref(media)
        scoring.add(media)
        del media
        assert kept() is None
        scoring.add(samples(8)[4:])
        assert judges.finish(scoring)["b"].values.tolist() == pytest.approx(
            [0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07]
        )


def test_an_exception_on_a_judges_thread_reaches_the_caller():
    class Interrupted(Recorder):
        def __call__(self, media, prompts):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Judges({"r": Interrupted(remote=True)}).score(samples(1), texts(1))


def test_calls_that_were_not_begun_are_dropped_when_the_caller_gives_up():
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Recorder):
        def __call__(self, media, prompts):
            begun.set()
            assert go_on.wait(20)
            return super().__call__(media, prompts)

    judge = Slow(batch_size=1, remote=True)
    with Judges({"r": judge}).scoring(texts(3)) as scoring:  # and left without asking for a result
        scoring.add(samples(3))
        assert begun.wait(20)
    go_on.set()
    for thread in threading.enumerate():
        if thread.name == "judge-r":
            thread.join(20)
    assert judge.batches == [[0]]
