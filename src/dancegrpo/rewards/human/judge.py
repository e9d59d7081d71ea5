"""The judge: asks people about groups on a page, or reads what they voted from a file (arXiv:2505.07818)."""

from __future__ import annotations

import logging
import math
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dancegrpo.errors import RewardError
from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import Scores, as_media
from dancegrpo.rewards.encoding import to_bytes
from dancegrpo.rewards.human.questions import Question, Questions
from dancegrpo.rewards.human.server import Server
from dancegrpo.rewards.human.votes import MODES, Mode, Votes, fingerprint, scores_of

ALONE = "a group of one sample cannot be ranked"
SKIPPED = "a person skipped the group"
UNVOTED = "the sample got no vote"

_log = logging.getLogger(__name__)


class HumanReward:
    """What people say about the samples of a group, compared with one another: scores in [0, 1].

    A group is a run of consecutive samples with one prompt id. mode: `rank` (of n ranked samples the r-th from 0
    scores (n-1-r)/(n-1), ties share their mean) or `thumbs` (up 1, down 0). wait: seconds to wait for votes, per call;
    the samples of groups that nobody answered by then have no score; None = wait for all. port: of the page on
    loopback, 0 = any free one. votes: path of the JSON-lines file that keeps every vote as it is cast; a question
    whose answer is in it, of the same prompt about the same media, is not asked again. serve: False = no page, votes
    come from the file alone. per_page: samples shown at once. fps: at which clips are shown.
    Raises RewardError for options that cannot be, a taken port, or a file of votes that cannot be used.
    """

    name = "human"
    differentiable = False
    batch_size: int | None = None
    """None: a group must come whole."""
    in_evaluation = False
    """Held-out evaluations go without: nobody votes on a thousand pictures, and they come one per prompt."""

    def __init__(
        self,
        mode: Mode = "rank",
        wait: float | None = None,
        port: int = 0,
        votes: str | Path = "votes.jsonl",
        serve: bool = True,
        per_page: int = 12,
        fps: float = 8.0,
    ) -> None:
        if mode not in MODES:
            raise RewardError(f"mode={mode!r} of the human judge is unknown: use {' or '.join(MODES)}.")
        if wait is not None and not 0 <= wait < math.inf:
            raise RewardError(f"wait={wait} of the human judge is no time: give seconds, or null to wait for all.")
        if not fps > 0 or per_page < 1:
            raise RewardError(f"fps={fps} and per_page={per_page} of the human judge must both be above 0.")
        self.mode, self.wait, self.votes_file = mode, wait, Path(votes).expanduser()
        self.votes = Votes(self.votes_file, writable=serve)
        self.questions = Questions(self.votes)
        self.server: Server | None = None
        if serve:
            self.server = Server(self.questions, mode=mode, per_page=per_page, fps=fps, port=port)
            # As a warning, which Python prints on standard error even where nobody configured logging.
            _log.warning("the human judge asks for votes at %s", self.server.url)

    @torch.no_grad()
    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score B samples: find or ask for each group's votes."""
        media = as_media(media)
        groups = [self._question(media[first:last], prompts[first]) for first, last in group_bounds(prompts)]
        asked = [group for group in groups if self._can_be_asked(group) and self.votes.get(group.key) is None]
        if asked and self.server is not None:
            with interruptible():
                self.questions.ask(asked, self.wait)
        return Scores.cat([self._scores(group) for group in groups]).to(media.device)

    def to(self, device: Any) -> HumanReward:
        """People stay where they are."""
        return self

    def close(self) -> None:
        """Take the page down."""
        if self.server is not None:
            self.server.close()

    def _question(self, samples: Tensor, prompt: Prompt) -> Question:
        frames = tuple(to_bytes(sample) for sample in samples)
        return Question(self.mode, prompt.text, tuple(fingerprint(shown) for shown in frames), frames)

    def _can_be_asked(self, question: Question) -> bool:
        return self.mode == "thumbs" or len(question.samples) > 1

    def _scores(self, question: Question) -> Scores:
        size, ballot = len(question.samples), self.votes.get(question.key)
        if not self._can_be_asked(question):
            return Scores.failed(size, ALONE)
        if ballot is None:
            waited = f"nobody voted within {self.wait:g} s" if self.wait is not None else "nobody voted"
            return Scores.failed(size, waited if self.server else f"no vote in {self.votes_file}")
        if ballot.skipped:
            return Scores.failed(size, SKIPPED)
        told = scores_of(self.mode, ballot.votes_for(question.samples))
        values = torch.tensor([torch.nan if score is None else score for score in told])
        return Scores(values, torch.ones(size, dtype=torch.bool)).mask(values.isnan(), UNVOTED)


def group_bounds(prompts: Sequence[Prompt]) -> list[tuple[int, int]]:
    """First and past-the-last sample of each group: runs of consecutive samples with one prompt id."""
    bounds, first = [], 0
    for _, run in groupby(prompts, key=lambda prompt: prompt.id):
        last = first + len(list(run))
        bounds.append((first, last))
        first = last
    return bounds


@contextmanager
def interruptible() -> Iterator[None]:
    """While a person is waited for, Ctrl-C and SIGTERM interrupt at once.

    A run's own handlers let the iteration finish first, which may be never here; every vote is on the disk already.
    """

    def interrupt(number: int, _: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
