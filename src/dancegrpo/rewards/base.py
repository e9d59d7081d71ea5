"""The judge's side of the contract: media and prompts in, a score and its validity out."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from dancegrpo.distributed import World
from dancegrpo.errors import DanceError, RewardError
from dancegrpo.prompts import Prompt
from dancegrpo.redaction import redact

NOT_FINITE = "the score is not a finite number"
"""Cause under which None, NaN and infinite scores are counted."""
_CAUSE_LENGTH = 200


@dataclass(frozen=True)
class Scores:
    """One judge's verdict on B samples.

    values: (B,) float32. valid: (B,) bool; where it is False the value means nothing (NaN here) and is never used.
    extra: further (B,) columns a judge reports for free (a pass/fail beside a graded score), by name.
    causes: why samples are not valid, and how many fell to each cause.
    """

    values: Tensor
    valid: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    causes: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.values)

    @staticmethod
    def failed(size: int, cause: str, device: torch.device | str = "cpu") -> Scores:
        """`size` samples that got no score, all for one cause."""
        values = torch.full((size,), torch.nan, device=device)
        return Scores(values, torch.zeros_like(values, dtype=torch.bool), causes={cause: size} if size else {})

    @staticmethod
    def cat(parts: Sequence[Scores]) -> Scores:
        """Consecutive batches as one; a column that a failed batch lacks is filled with NaN, False or 0."""
        if not parts:
            return Scores(torch.empty(0), torch.empty(0, dtype=torch.bool))
        causes: Counter[str] = Counter()
        for part in parts:
            causes.update(part.causes)
        columns = {name: column for part in parts for name, column in part.extra.items()}
        extra = {
            name: torch.cat([part.extra.get(name, _filler(column, len(part))) for part in parts])
            for name, column in columns.items()
        }
        values = torch.cat([part.values for part in parts])
        return Scores(values, torch.cat([part.valid for part in parts]), extra, dict(causes))

    def gathered(self, world: World) -> Scores:
        """The verdicts on all data ranks' samples, in their order, on the CPU; every rank must ask."""
        if world.size == 1:
            return self
        kinds = {name: kind for told in world.gather_json(_kinds(self.extra)) for name, kind in told.items()}
        extra = {}
        for name, kind in sorted(kinds.items()):
            column = self.extra.get(name, torch.full((len(self),), torch.nan if kind == "float32" else 0))
            extra[name] = world.gather(column.float()).to(getattr(torch, kind))
        causes: Counter[str] = Counter()
        for told in world.gather_json(dict(self.causes) if world.leads else {}):
            causes.update(told)
        valid = world.gather(self.valid.to(torch.uint8)).bool()
        return Scores(world.gather(self.values.float()), valid, extra, dict(causes))

    def mask(self, where: Tensor, cause: str) -> Scores:
        """These scores without the samples `where` (B,) bool; those that were valid until now are counted."""
        newly = int((where & self.valid).sum())
        valid = self.valid & ~where
        causes = Counter(self.causes) + Counter({cause: newly})
        return replace(self, values=torch.where(valid, self.values, torch.nan), valid=valid, causes=dict(causes))

    def to(self, device: torch.device | str) -> Scores:
        """The same scores on another device."""
        extra = {name: column.to(device) for name, column in self.extra.items()}
        return replace(self, values=self.values.to(device), valid=self.valid.to(device), extra=extra)


def _kinds(columns: Mapping[str, Tensor]) -> dict[str, str]:
    return {
        name: "float32" if c.is_floating_point() else str(c.dtype).removeprefix("torch.") for name, c in columns.items()
    }


def _filler(like: Tensor, size: int) -> Tensor:
    return like.new_full((size,), torch.nan if like.is_floating_point() else 0)


class Unasked:
    """Stands in for a judge on ranks whose samples another rank shows to it: a score of 0 each, which nobody reads.

    A judge that several ranks share is kept company all the same (`Placed.accompany`).
    """

    differentiable = False
    device = None

    def __init__(self, judge: Reward) -> None:
        self.name, self.batch_size = judge.name, judge.batch_size
        self.in_evaluation = getattr(judge, "in_evaluation", True)
        self.accompany = getattr(judge, "accompany", lambda: None)
        self._shared = judge if hasattr(judge, "accompany") else None

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """B samples -> B zeros."""
        self.accompany()
        zeros = torch.zeros(len(prompts), device=media.device)
        return Scores(zeros, torch.ones_like(zeros, dtype=torch.bool))

    def to(self, device: torch.device | str) -> Unasked:
        """Itself; a judge that answers for other ranks is moved."""
        if self._shared is not None:
            self._shared.to(device)
        return self


@runtime_checkable
class Reward(Protocol):
    """A judge. Anything callable as `(media, prompts) -> Scores` with these three attributes and `to` will do.

    media: (B, F, 3, H, W) float in [0, 1], F = 1 for pictures; a judge must not write into it, others read it too.
    prompts: B prompts, one per sample. A sample that a judge cannot score is masked in `valid`, never given a number.
    """

    name: str
    differentiable: bool
    """Whether gradients flow from the scores back to the media."""
    batch_size: int | None
    """Largest batch the judge wants at once; None = as many as come."""
    # A judge that cannot take clips also says `pictures_only = True`: `load_reward` then shows it frames.

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score B samples."""
        ...

    def to(self, device: Any) -> Reward:
        """The judge with its weights on `device`; media may come from any device."""
        ...


class FunctionReward:
    """A user's plain function as a judge: `function(images, prompts) -> one number per image`.

    images: (B, 3, H, W) float32 in [0, 1] for pictures, (B, F, 3, H, W) for video, on the media's device and the
    function's own to write into. prompts: list of B strings. It returns a list, tensor or array of B numbers; None, NaN
    or infinity leaves that sample without a score. A result of another length or kind, or an exception, leaves the
    whole batch without one and is told in `Scores.causes`. No gradient flows.
    """

    differentiable = False

    def __init__(
        self, function: Callable[[Tensor, list[str]], Any], name: str = "function", batch_size: int | None = None
    ) -> None:
        self.function = function
        self.name = name
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score B samples: call the function, mask what is no number."""
        # A copy: a function that rescales its images in place must not change what the next judge sees.
        images = as_media(media).float().clone()
        images = images[:, 0] if images.shape[1] == 1 else images
        try:
            values = _numbers(self.function(images, [prompt.text for prompt in prompts]), len(media))
        except Exception as error:
            return Scores.failed(len(media), describe(error), media.device)
        values = values.to(media.device)
        return Scores(values, torch.ones_like(values, dtype=torch.bool)).mask(~values.isfinite(), NOT_FINITE)

    def to(self, device: Any) -> FunctionReward:
        """A function has no weights to move: it sees the media where they are."""
        return self


def _numbers(output: Any, size: int) -> Tensor:
    """A function's result as (size,) float32, NaN for None. Raises ValueError or TypeError for anything else."""
    if isinstance(output, Tensor):
        values = output.detach()
    elif isinstance(output, (str, bytes, Mapping)) or not hasattr(output, "__len__"):
        raise TypeError(f"returned {type(output).__name__}: return a list, tensor or array with one number per image")
    elif isinstance(output, np.ndarray) and output.dtype != object:
        values = torch.from_numpy(output)
    else:
        values = torch.tensor([torch.nan if value is None else float(value) for value in output])
    if values.shape not in ((size,), (size, 1)) or values.is_complex():
        raise ValueError(f"returned shape {tuple(values.shape)} for {size} images: return one number per image")
    return values.reshape(size).float()


def check_media(media: Tensor) -> None:
    """Raises RewardError for anything but (B, F, 3, H, W) of floats or uint8."""
    if media.ndim != 5 or media.shape[2] != 3:
        raise RewardError(
            f"media of shape {tuple(media.shape)} cannot be judged: give (B, F, 3, H, W), F = 1 for pictures."
        )
    if media.dtype != torch.uint8 and not media.is_floating_point():
        raise RewardError(f"media of type {media.dtype} cannot be judged: give floats in [0, 1] or uint8.")


def as_media(media: Tensor) -> Tensor:
    """Media (B, F, 3, H, W) as floats: uint8 k becomes k/255, float stays as it is.

    Raises RewardError as `check_media` does.
    """
    check_media(media)
    return media.float() / 255 if media.dtype == torch.uint8 else media


def as_pictures(media: Tensor) -> Tensor:
    """Media of one frame each (B, 1, 3, H, W) as pictures (B, 3, H, W), floats as by `as_media`.

    Raises RewardError for video: a recipe says by `frames` which frames such a judge sees.
    """
    media = as_media(media)
    if media.shape[1] != 1:
        raise RewardError(f"this judge takes pictures, not clips of {media.shape[1]} frames: wrap it in OverFrames.")
    return media[:, 0]


def describe(error: Exception) -> str:
    """An exception as one short line: its type, its first line, and where it was raised; ours as they are."""
    if isinstance(error, DanceError):  # redacted already
        return " ".join(str(error).split())[:_CAUSE_LENGTH]
    lines = redact(str(error)).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return text[:_CAUSE_LENGTH] + where
