"""The rule-based judge of moving-shapes clips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dancegrpo.errors import ConfigError, RewardError
from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import Scores, as_media
from dancegrpo.shapes.motion import judge_clips

Axis = Literal["vq", "mq", "ta", "id", "overall"]
_UNASKED = {"mq": "a still does not move", "id": "the prompt gives no first frame"}


class MotionReward:
    """Judges clips of the shapes world by rules: visual quality (`vq`), motion quality (`mq`), text alignment (`ta`),
    identity with the given first frame (`id`), or `overall`, the mean of those that a clip can be judged on.

    Media (B, 9, 3, 32, 32) in [0, 1], or (B, 1, 3, 32, 32) for stills; prompts carry a scene in their metadata. Scores
    are in [0, 1]. `extra` has the other axes, as far as any clip has them, and with `overall` also `pass`: 1 where all
    are right. A clip with a non-finite pixel, or which has no such axis, is not valid.
    Raises ConfigError on an unknown axis, RewardError where prompts or media are not of this world.
    """

    name = "motion"
    differentiable = False
    batch_size: int | None = 256
    device = torch.device("cpu")

    def __init__(self, axis: Axis = "overall") -> None:
        if axis not in ("vq", "mq", "ta", "id", "overall"):
            raise ConfigError(f"axis={axis!r} of the motion reward does not exist: use vq, mq, ta, id or overall.")
        self.axis = axis

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """media: (B, 9 or 1, 3, 32, 32), floats in [0, 1] or uint8, on any device."""
        try:
            verdict = judge_clips(as_media(media.detach()).float().cpu().numpy(), prompts)
        except (KeyError, TypeError) as missing:
            raise RewardError(
                f"a prompt's metadata holds no moving-shapes scene ({missing}): "
                "the motion reward only judges prompts of shapes-video, shapes-i2v and shapes-t2i."
            ) from missing
        except ValueError as wrong:
            raise RewardError(str(wrong)) from wrong
        columns = {"vq": verdict.vq, "mq": verdict.mq, "ta": verdict.ta, "id": verdict.identity}
        columns["overall"] = np.nanmean(np.stack(list(columns.values())), axis=0)
        values = torch.from_numpy(columns.pop(self.axis))
        extra = {name: torch.from_numpy(column) for name, column in columns.items() if not np.isnan(column).all()}
        if self.axis == "overall":  # beside one axis it would be taken for that axis's verdict
            extra["pass"] = torch.from_numpy(verdict.exact).float()
        valid = torch.from_numpy(verdict.valid)
        scores = Scores(values, torch.ones_like(valid), extra).mask(~valid, "the clip has pixels that are not finite")
        scores = scores.mask(values.isnan(), _UNASKED.get(self.axis, ""))
        return scores.to(media.device)

    def to(self, device: Any) -> MotionReward:
        """The judge has no weights: it works on the CPU wherever the media are, and answers there."""
        return self
