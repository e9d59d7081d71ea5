"""Scoring while samples are still being made: judges that wait on something else than this device work meanwhile."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Self

import torch
from torch import Tensor

from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import Reward, Scores

Ask = Callable[[Reward, Tensor, Sequence[Prompt]], Scores]


class Scoring:
    """The scores of samples that arrive piece by piece, in order: `add` each piece, then take `result`.

    A judge's batches are cut at multiples of its batch size, counted from the first sample, however the samples arrive
    and wherever the judge runs: so overlapping changes no score. A judge is asked about a batch as soon as it is
    complete, and media are let go once every judge has had them; one without a batch size is asked at the end, about
    all. Judges that run elsewhere (a service, another device) have a thread of their own, so that the next samples are
    made meanwhile. Gradients are recorded where they were when this was made.

    prompts: of all samples, in order. ask: scores one batch by one judge; must not raise.
    """

    def __init__(self, rewards: Mapping[str, Reward], prompts: Sequence[Prompt], ask: Ask) -> None:
        self.rewards, self.prompts, self.ask = rewards, list(prompts), ask
        self._pieces: list[Tensor] = []
        self._dropped = 0  # samples before the first piece
        self.arrived = 0
        """Samples added so far."""
        self._asked = dict.fromkeys(rewards, 0)
        self._parts: dict[str, list[Scores | Future[Scores]]] = {name: [] for name in rewards}
        self._threads: dict[str, _Worker] = {}
        self._grad = torch.is_grad_enabled()  # a new thread would have gradients on, whatever the caller chose

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for name, thread in self._threads.items():
            thread.close()
            if kind is not None:
                getattr(self.rewards[name], "stop", lambda: None)()  # a judge between two tries need not make them

    def add(self, media: Tensor) -> None:
        """The next samples, (N, F, 3, H, W)."""
        if self.arrived + len(media) > len(self.prompts):
            raise ValueError(f"{self.arrived + len(media)} samples came with {len(self.prompts)} prompts.")
        self._pieces.append(media)
        self.arrived += len(media)
        self._advance(last=False)
        needed = min(self._asked.values(), default=self.arrived)
        while self._pieces and self._dropped + len(self._pieces[0]) <= needed:
            self._dropped += len(self._pieces.pop(0))

    def result(self) -> dict[str, Scores]:
        """Every judge's scores of all samples; waits for those still at work."""
        if self.arrived != len(self.prompts):
            raise ValueError(f"{self.arrived} samples came with {len(self.prompts)} prompts: give one each.")
        self._advance(last=True)
        self._pieces.clear()  # whoever still holds this while training must not hold the media with it
        return {
            name: Scores.cat([part if isinstance(part, Scores) else part.result() for part in parts])
            for name, parts in self._parts.items()
        }

    def _advance(self, *, last: bool) -> None:
        """Asks each judge about its complete batches, and at the end about what is left."""
        if not self._pieces:
            return
        device = self._pieces[0].device
        # Those elsewhere first: they work side by side while this thread asks the rest.
        for name in sorted(self.rewards, key=lambda name: not runs_elsewhere(self.rewards[name], device)):
            reward = self.rewards[name]
            size = reward.batch_size or len(self.prompts)
            while (first := self._asked[name]) < self.arrived and (last or first + size <= self.arrived):
                end = self._asked[name] = min(first + size, self.arrived)
                call = partial(self._ask, reward, self._samples(first, end), self.prompts[first:end])
                if runs_elsewhere(reward, device):
                    if name not in self._threads:
                        self._threads[name] = _Worker(f"judge-{name}")
                    self._parts[name].append(self._threads[name].submit(call))
                else:
                    self._parts[name].append(call())

    def _ask(self, reward: Reward, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        with torch.set_grad_enabled(self._grad):
            return self.ask(reward, media, prompts)

    def _samples(self, first: int, end: int) -> Tensor:
        """Samples first..end - 1, without a copy where one piece holds them all."""
        start, found = self._dropped, []
        for piece in self._pieces:
            low, high = max(first - start, 0), min(end - start, len(piece))
            if low < high:
                found.append(piece[low:high])
            start += len(piece)
        return found[0] if len(found) == 1 else torch.cat(found)


class _Worker:
    """One thread that works off calls in order. A daemon: an interrupted run does not wait for a slow judge."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Scores], Future[Scores]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def submit(self, call: Callable[[], Scores]) -> Future[Scores]:
        future: Future[Scores] = Future()
        self._calls.put((call, future))
        return future

    def close(self) -> None:
        """Ends the thread after the call under way; calls not begun are dropped."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._calls.get_nowait()
        self._calls.put(None)

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            call, future = item
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)


def runs_elsewhere(reward: Reward, device: torch.device) -> bool:
    """Whether a judge leaves `device` free while it works: it is `remote`, or sits on another device."""
    if getattr(reward, "remote", False):
        return True
    place = getattr(reward, "device", None)
    if not isinstance(place, torch.device):
        return False
    return place.type != device.type or (place.index or 0) != (device.index or 0)
