"""Scoring while samples are still being made: judges that wait on something else than this device work meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch
from torch import Tensor

from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import Reward, Scores

Ask = Callable[[Reward, Tensor, Sequence[Prompt]], Scores]


class Scoring:
    """The scores of samples that arrive piece by piece, in order: `add` each piece, then take `result`.

    A judge's batches are cut at multiples of its batch size, counted from the first sample, however the samples arrive
    and whenever the judge runs: so overlapping changes no score. Judges that run elsewhere (a service, another device)
    get a thread of their own and start on a batch as soon as it is complete, the others run when `result` is called.

    prompts: of all samples, in order. ask: scores one batch by one judge; must not raise.
    """

    def __init__(self, rewards: Mapping[str, Reward], prompts: Sequence[Prompt], ask: Ask) -> None:
        self.rewards, self.prompts, self.ask = rewards, list(prompts), ask
        self._pieces: list[Tensor] = []
        self._arrived = 0
        self._asked = dict.fromkeys(rewards, 0)
        self._pending: dict[str, list[Future[Scores]]] = {name: [] for name in rewards}
        self._threads: dict[str, ThreadPoolExecutor] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads.values():
            thread.shutdown(wait=False, cancel_futures=True)

    def add(self, media: Tensor) -> None:
        """The next samples, (N, F, 3, H, W)."""
        if self._arrived + len(media) > len(self.prompts):
            raise ValueError(f"{self._arrived + len(media)} samples came with {len(self.prompts)} prompts.")
        self._pieces.append(media)
        self._arrived += len(media)
        for name, reward in self.rewards.items():
            if reward.batch_size is not None and runs_elsewhere(reward, media.device):
                self._start(name, reward, reward.batch_size)

    def result(self) -> dict[str, Scores]:
        """Every judge's scores of all samples; waits for those still at work."""
        if self._arrived != len(self.prompts):
            raise ValueError(f"{self._arrived} samples came with {len(self.prompts)} prompts: give one each.")
        for name, reward in self.rewards.items():
            # First all that can work side by side, then, on this thread, the rest.
            if self._arrived and runs_elsewhere(reward, self._pieces[0].device):
                self._start(name, reward, reward.batch_size or self._arrived, last=True)
        scores = {}
        for name, reward in self.rewards.items():
            if self._pending[name]:
                scores[name] = Scores.cat([future.result() for future in self._pending[name]])
            else:
                scores[name] = self._ask_all(reward)
        return scores

    def _start(self, name: str, reward: Reward, size: int, *, last: bool = False) -> None:
        """Hands a judge's complete batches to its thread, and the incomplete one at the end."""
        thread = self._threads.setdefault(name, ThreadPoolExecutor(1, thread_name_prefix=f"judge-{name}"))
        while (first := self._asked[name]) < self._arrived and (last or first + size <= self._arrived):
            end = min(first + size, self._arrived)
            self._pending[name].append(
                thread.submit(self.ask, reward, self._samples(first, end), self.prompts[first:end])
            )
            self._asked[name] = end

    def _ask_all(self, reward: Reward) -> Scores:
        size = reward.batch_size or self._arrived or 1
        starts = range(0, self._arrived, size)
        parts = [
            self.ask(reward, self._samples(i, min(i + size, self._arrived)), self.prompts[i : i + size]) for i in starts
        ]
        return Scores.cat(parts)

    def _samples(self, first: int, end: int) -> Tensor:
        """Samples first..end - 1, without a copy where one piece holds them all."""
        start, found = 0, []
        for piece in self._pieces:
            low, high = max(first - start, 0), min(end - start, len(piece))
            if low < high:
                found.append(piece[low:high])
            start += len(piece)
        return found[0] if len(found) == 1 else torch.cat(found)


def runs_elsewhere(reward: Reward, device: torch.device) -> bool:
    """Whether a judge leaves `device` free while it works: it is `remote`, or sits on another device."""
    place = getattr(reward, "device", None)
    return getattr(reward, "remote", False) or (isinstance(place, torch.device) and place.type != device.type)
