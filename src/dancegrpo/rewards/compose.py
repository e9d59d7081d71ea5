"""Judges made of judges: on a device of its own, a picture judge that sees clips, a threshold, a limit on time."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor

from dancegrpo.errors import RewardError
from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import Reward, Scores

Frames = Literal["mean", "worst", "first"]


class _Wrapped:
    """A judge around another, in the same place."""

    reward: Reward

    @property
    def remote(self) -> bool:
        """Whether the judge inside waits on another machine or process."""
        return getattr(self.reward, "remote", False)

    @property
    def in_evaluation(self) -> bool:
        """Whether held-out evaluations ask it."""
        return getattr(self.reward, "in_evaluation", True)

    @property
    def device(self) -> Any:
        """Of the judge inside, None where it has none."""
        return getattr(self.reward, "device", None)

    def stop(self) -> None:
        """Tells the judge inside, where it listens, that nobody waits for it any more."""
        getattr(self.reward, "stop", lambda: None)()

    def to(self, device: Any) -> Self:
        """Moves the judge."""
        self.reward = self.reward.to(device)
        return self


class OnDevice(_Wrapped):
    """A judge on a device of its own: it stays there, media are brought to it and its scores back to them."""

    def __init__(self, reward: Reward, device: torch.device) -> None:
        self.place, self.reward = device, reward.to(device)
        self.name, self.differentiable, self.batch_size = reward.name, reward.differentiable, reward.batch_size

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.place

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score B samples, wherever they are."""
        return self.reward(media.to(self.place), prompts).to(media.device)

    def to(self, device: Any) -> Self:
        """Stays where it is."""
        return self


class OverFrames(_Wrapped):
    """A judge of pictures as a judge of clips, (B, F, 3, H, W) with any F.

    frames: `mean` of every frame's score, the `worst` frame's score, or the `first` frame alone. A clip with a frame
    that got no score has none itself: a mean over other frames than its neighbours' would not compare. The judge's
    batch size counts clips towards the panel, and frames towards the judge.
    """

    def __init__(self, reward: Reward, frames: Frames = "mean") -> None:
        if frames not in ("mean", "worst", "first"):
            raise RewardError(f"frames={frames!r} is unknown: use mean, worst or first.")
        self.reward, self.frames = reward, frames
        self.name, self.differentiable, self.batch_size = reward.name, reward.differentiable, reward.batch_size

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score B clips."""
        clips = media[:, :1] if self.frames == "first" else media
        count = clips.shape[1]
        pictures = clips.flatten(0, 1)[:, None]
        repeated = [prompt for prompt in prompts for _ in range(count)]
        size = self.reward.batch_size or len(pictures) or 1
        parts = [self.reward(pictures[i : i + size], repeated[i : i + size]) for i in range(0, len(pictures), size)]
        return self._by_clip(Scores.cat(parts), len(media), count) if count > 1 else Scores.cat(parts)

    def _by_clip(self, scores: Scores, clips: int, count: int) -> Scores:
        def reduce(column: Tensor) -> Tensor:
            frames = column.float().view(clips, count)
            return frames.amin(1) if self.frames == "worst" else frames.mean(1)

        valid = scores.valid.view(clips, count).all(dim=1)
        extra = {name: reduce(column) for name, column in scores.extra.items()}
        values = torch.where(valid, reduce(scores.values), torch.nan)
        # Causes were counted in frames; what is told is clips, each under the commonest cause.
        lost, common = int((~valid).sum()), Counter(scores.causes).most_common(1)
        causes = {f"a frame: {common[0][0]}": lost} if lost and common else {}
        return Scores(values, valid, extra, causes)


class Binary(_Wrapped):
    """A threshold over any judge: 1 where its score reaches `threshold`, else 0 (arXiv:2505.07818, binary rewards).

    `extra["raw"]` keeps what the judge said. No gradient flows.
    """

    differentiable = False

    def __init__(self, reward: Reward, threshold: float) -> None:
        self.reward, self.threshold = reward, threshold
        self.name, self.batch_size = reward.name, reward.batch_size

    @torch.no_grad()
    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score B samples."""
        told = self.reward(media, prompts)
        values = torch.where(told.valid, (told.values >= self.threshold).float(), torch.nan)
        return Scores(values, told.valid, {**told.extra, "raw": told.values}, told.causes)


class TimeLimit(_Wrapped):
    """A judge that may hang: a batch without an answer after `seconds` is masked.

    The call under way cannot be stopped, only left alone; until it ends, further batches are masked at once.
    """

    def __init__(self, reward: Reward, seconds: float) -> None:
        self.reward, self.seconds = reward, seconds
        self.name, self.differentiable, self.batch_size = reward.name, reward.differentiable, reward.batch_size
        self._hung: threading.Thread | None = None

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score B samples, or none of them."""
        if self._hung is not None and self._hung.is_alive():
            return Scores.failed(len(media), "the judge still works on an earlier batch", media.device)
        told: list[Scores | Exception] = []
        gradients = torch.is_grad_enabled()  # a new thread has them on

        def ask() -> None:
            try:
                with torch.set_grad_enabled(gradients):
                    told.append(self.reward(media, prompts))
            except Exception as error:
                told.append(error)

        thread = threading.Thread(target=ask, name=f"judge-{self.name}-timed", daemon=True)
        thread.start()
        thread.join(self.seconds)
        if not told:
            self._hung = thread
            return Scores.failed(len(media), f"no answer within {self.seconds:g} s", media.device)
        if isinstance(told[0], Exception):
            raise told[0]
        return told[0]
