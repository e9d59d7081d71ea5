"""The groups that people are asked about now, shared by the waiting judge and the page's server."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dancegrpo.rewards.encoding import to_png, to_webp
from dancegrpo.rewards.human.votes import Ballot, Mode, Votes, check_votes, group_key


@dataclass(frozen=True)
class Question:
    """One group: its prompt and what a person sees of each sample, (F, H, W, 3) uint8, with its fingerprint."""

    mode: Mode
    prompt: str
    samples: tuple[str, ...]
    frames: tuple[np.ndarray, ...]

    @property
    def key(self) -> str:
        """The group's `group_key`."""
        return group_key(self.mode, self.prompt, self.samples)

    def order(self) -> list[int]:
        """In which order the samples are shown: shuffled, always alike, so that no place in the group is favoured."""
        key = self.key
        draws = [hashlib.sha256(f"{key},{sample},{i}".encode()).digest() for i, sample in enumerate(self.samples)]
        return sorted(range(len(draws)), key=draws.__getitem__)

    def encode(self, index: int, fps: float) -> tuple[bytes, str]:
        """One sample for the browser, and its media type: PNG for a picture, animated WebP for a clip."""
        frames = self.frames[index]
        return (to_png(frames[0]), "image/png") if len(frames) == 1 else (to_webp(frames, fps), "image/webp")


class Questions:
    """What is being asked, and until when. All methods may be called from any thread."""

    def __init__(self, votes: Votes) -> None:
        self.votes = votes
        self._open: dict[str, Question] = {}
        self._deadline: float | None = None
        self._changed = threading.Condition()

    def ask(self, questions: Sequence[Question], wait: float | None) -> None:
        """Put the questions on the page and return when all are answered, or after `wait` seconds."""
        with self._changed:
            self._open = {question.key: question for question in questions}
            self._deadline = None if wait is None else time.monotonic() + wait
            try:
                while self._left() and (left := self._seconds_left()) > 0:
                    # In slices: on some systems Ctrl-C cannot interrupt a longer wait.
                    self._changed.wait(min(left, 1.0))
            finally:
                self._open, self._deadline = {}, None

    def get(self, key: str) -> Question | None:
        """An open question."""
        with self._changed:
            return self._open.get(key)

    def answer(self, key: str, votes: Any, *, skipped: bool = False) -> None:
        """Keep the votes on an open question, in the order of its samples; a later answer replaces an earlier one.

        Raises KeyError where the question is not open, ValueError for votes that do not fit, OSError when the disk
        refuses.
        """
        with self._changed:
            question = self._open[key]
            count = len(question.samples)
            cast = [None] * count if skipped else check_votes(question.mode, votes, count)
            self.votes.add(Ballot(question.mode, question.prompt, question.samples, tuple(cast), skipped))
            self._changed.notify_all()

    def state(self) -> dict[str, Any]:
        """What the page shows, as JSON values."""
        with self._changed:
            seconds = None if self._deadline is None else round(self._seconds_left(), 1)
            return {"seconds_left": seconds, "groups": [self._describe(q) for q in self._open.values()]}

    def _describe(self, question: Question) -> dict[str, Any]:
        ballot = self.votes.get(question.key)
        _, height, width, _ = question.frames[0].shape
        return {
            "key": question.key,
            "prompt": question.prompt,
            "order": question.order(),
            "clip": len(question.frames[0]) > 1,
            "width": width,
            "height": height,
            "answered": ballot is not None,
            "votes": None if ballot is None or ballot.skipped else ballot.votes_for(question.samples),
        }

    def _left(self) -> bool:
        return any(self.votes.get(key) is None for key in self._open)

    def _seconds_left(self) -> float:
        return 1e9 if self._deadline is None else max(0.0, self._deadline - time.monotonic())
