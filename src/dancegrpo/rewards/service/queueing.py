"""The line in front of a judge: samples of several requests are packed into its batches by one worker thread."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

import torch

from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import Reward, Scores, describe
from dancegrpo.rewards.panel import Judges
from dancegrpo.rewards.service.wire import Request


@dataclass(eq=False)
class Job:
    """One request in the line. taken: how many of its samples a batch has taken. parts: their scores, in order."""

    request: Request
    future: Future[Scores] = field(default_factory=Future)
    taken: int = 0
    parts: list[Scores] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Samples that no batch has taken."""
        return len(self.request.media) - self.taken

    def fits(self, other: Job) -> bool:
        """Whether samples of both can stand in one tensor."""
        a, b = self.request.media, other.request.media
        return a.shape[1:] == b.shape[1:] and a.dtype == b.dtype


Piece = tuple[Job, int, int]
"""A job and the samples first..end - 1 of it."""


class Line:
    """One judge and the requests that wait for it.

    batch_size: samples per batch when requests are packed together; None = each request is scored on its own, as
    `Judges` in one process would. wait: seconds a batch that is not full waits for further requests.
    """

    def __init__(self, name: str, reward: Reward, *, batch_size: int | None, wait: float) -> None:
        self.name, self.batch_size, self.wait = name, batch_size, wait
        self.judges = Judges({name: reward})
        self.batches = self.failures = self.samples = 0
        self.seconds = 0.0
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        # A daemon: a judge that hangs must not keep a stopped server alive.
        self._thread = threading.Thread(target=self._work, name="judge", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Future[Scores]:
        """Puts a request in the line; cancelling the future takes what is not being scored out again."""
        job = Job(request)
        if not job.left:
            job.future.set_result(Scores.cat([]))
            return job.future
        with self._changed:
            if self._closing:
                raise RuntimeError("the line is closed")
            self._jobs.append(job)
            self._changed.notify()
        return job.future

    @property
    def ready(self) -> bool:
        """Whether requests get scored."""
        return self._thread.is_alive() and not self._closing

    def waiting(self) -> tuple[int, int]:
        """Requests and samples that no batch has taken."""
        with self._changed:
            return len(self._jobs), sum(job.left for job in self._jobs)

    def close(self, timeout: float | None = None) -> None:
        """Lets the running batch finish; requests still in the line are cancelled."""
        with self._changed:
            self._closing = True
            for job in self._jobs:
                job.future.cancel()
            self._jobs.clear()
            self._changed.notify()
        self._thread.join(timeout)

    def _work(self) -> None:
        while pieces := self._next():
            start = time.perf_counter()
            # Grad mode belongs to a thread: a new one would record graphs nobody asks for.
            with torch.no_grad():
                try:
                    told = self._score(pieces)
                except Exception as error:
                    told = [Scores.failed(end - first, describe(error)) for _, first, end in pieces]
            self.seconds += time.perf_counter() - start
            for (job, _, _), scores in zip(pieces, told):
                self._deliver(job, scores)

    def _next(self) -> list[Piece]:
        """The next batch; empty when the line is closed. Waits for the first request, then briefly for more."""
        pieces: list[Piece] = []
        while not pieces:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closing)
                if self.batch_size and self.wait:
                    self._changed.wait_for(lambda: self._closing or self._full(), self.wait)
                if self._closing:
                    return []
                pieces = self._take()
        return pieces

    def _full(self) -> bool:
        fitting = sum(job.left for job in self._jobs if job.fits(self._jobs[0]))
        return fitting >= (self.batch_size or 0)

    def _take(self) -> list[Piece]:
        """Samples for one batch, first come, first served; requests of another size keep their place."""
        while self._jobs and self._jobs[0].future.cancelled():
            self._jobs.popleft()
        pieces: list[Piece] = []
        room = self.batch_size or (self._jobs[0].left if self._jobs else 0)
        for job in [job for job in self._jobs if not job.future.cancelled() and job.fits(self._jobs[0])]:
            if not self.batch_size and pieces:
                break
            count = min(room, job.left)
            pieces.append((job, job.taken, job.taken + count))
            job.taken += count
            room -= count
            if not room:
                break
        self._jobs = deque(job for job in self._jobs if job.left and not job.future.cancelled())
        return pieces

    def _score(self, pieces: Sequence[Piece]) -> list[Scores]:
        """The scores of each piece, in the pieces' order."""
        if len(pieces) == 1:
            return [self._ask(*pieces[0])]
        media = torch.cat([job.request.media[first:end] for job, first, end in pieces])
        prompts = [prompt for job, first, end in pieces for prompt in job.request.prompts[first:end]]
        scores = self._judge(media, prompts)
        if not scores.valid.any():
            # Perhaps one request broke the batch: the others must not pay for it.
            return [self._ask(*piece) for piece in pieces]
        ends = torch.tensor([end - first for _, first, end in pieces]).cumsum(0).tolist()
        return [_part(scores, start, end) for start, end in zip([0, *ends], ends)]

    def _ask(self, job: Job, first: int, end: int) -> Scores:
        return self._judge(job.request.media[first:end], job.request.prompts[first:end])

    def _judge(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> Scores:
        self.batches += 1
        return self.judges.score(media, prompts)[self.name].to("cpu")

    def _deliver(self, job: Job, scores: Scores) -> None:
        self.samples += len(scores)
        self.failures += int((~scores.valid).sum())
        job.parts.append(scores)
        if sum(len(part) for part in job.parts) == len(job.request.media):
            # The client may have left in the meantime.
            with contextlib.suppress(InvalidStateError):
                job.future.set_result(Scores.cat(job.parts))


def _part(scores: Scores, start: int, end: int) -> Scores:
    """One request's samples of a batch. A batch counts causes, not samples: where there are several, all are told."""
    valid = scores.valid[start:end]
    lost = int((~valid).sum())
    cause = " or ".join(sorted(scores.causes))
    extra = {name: column[start:end] for name, column in scores.extra.items()}
    return Scores(scores.values[start:end], valid, extra, {cause: lost} if lost else {})
