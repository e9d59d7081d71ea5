"""The judges of a run, asked together: batched, guarded, and held to a share of valid scores."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dancegrpo.errors import DeadJudgeError, RewardError
from dancegrpo.prompts import Prompt
from dancegrpo.redaction import redact
from dancegrpo.rewards.base import NOT_FINITE, Reward, Scores, Unasked, as_media, check_media, describe
from dancegrpo.rewards.scoring import Scoring

MIN_VALID_FRACTION = 0.5
"""Share of an iteration's samples that every trained judge must have scored, or the run stops."""
BAD_MEDIA = "the picture has values outside [0, 1] or not finite"
"""Cause under which samples with broken pixels are counted."""

_TOLD_CAUSES = 8
"""Different causes that are logged per judge: a judge whose every failure reads differently must not fill the log."""

_log = logging.getLogger(__name__)


class Judges:
    """The panel: every judge of a run by the name the user gave it, and the weight of its advantage.

    weights: by the same names; 0 = measured, never trained on. None = 1 for all.
    Raises RewardError for weights of other judges, or a judge whose batch size is less than 1.
    """

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float] | None = None) -> None:
        self.rewards = dict(rewards)
        self.weights = dict.fromkeys(rewards, 1.0) if weights is None else dict(weights)
        if self.rewards.keys() != self.weights.keys():
            odd = ", ".join(sorted(self.rewards.keys() ^ self.weights.keys()))
            raise RewardError(f"judges and weights differ in {odd}: give each judge one weight.")
        for name, reward in self.rewards.items():
            if reward.batch_size is not None and reward.batch_size < 1:
                raise RewardError(f"judge {name!r} has batch_size={reward.batch_size}: use 1 or more, or none.")
        self._warned: dict[str, set[str]] = {}

    @property
    def trained(self) -> tuple[str, ...]:
        """The judges that are trained on."""
        return tuple(name for name, weight in self.weights.items() if weight)

    def to(self, device: Any) -> Judges:
        """Move every judge; returns this panel."""
        self.rewards = {name: reward.to(device) for name, reward in self.rewards.items()}
        return self

    def for_evaluation(self) -> Judges:
        """The judges that a held-out evaluation asks: all but those that say `in_evaluation = False` (people)."""
        asked = {name: reward for name, reward in self.rewards.items() if getattr(reward, "in_evaluation", True)}
        panel = Judges(asked, {name: self.weights[name] for name in asked})
        panel._warned = self._warned  # what was told once is not told again
        return panel

    def unasked(self, *, but_trained: bool) -> Judges:
        """A panel of the same names that asks nobody; but_trained: whether those trained on stay as they are."""
        kept = self.trained if but_trained else ()
        return Judges({n: judge if n in kept else Unasked(judge) for n, judge in self.rewards.items()}, self.weights)

    def score(self, media: Tensor, prompts: Sequence[Prompt]) -> dict[str, Scores]:
        """Every judge's scores for B samples, on the media's device, in the order given.

        media: (B, F, 3, H, W) float in [0, 1], or uint8. prompts: one per sample. Each judge sees batches of its own
        size; a batch it fails on is masked and counted, and the first failure of each judge is logged. A sample with a
        pixel that is not finite or outside [0, 1] is masked for all of them.
        Raises RewardError for media of another shape or type, ValueError where media and prompts differ in number.
        """
        with self.scoring(prompts) as scoring:
            check_media(media)
            scoring.add(media)
            return self.finish(scoring)

    def scoring(self, prompts: Sequence[Prompt]) -> Scoring:
        """To score samples while others are still made: `add` them in order, then `finish`; as `score` otherwise."""
        return Scoring(self.rewards, prompts, _ask)

    def finish(self, scoring: Scoring) -> dict[str, Scores]:
        """The scores of all that was added."""
        scores = scoring.result()
        self._warn(scores)
        return scores

    def accompany(self) -> None:
        """What a rank does while another, that has one batch more, asks `score`: its judges may be placed here."""
        for reward in self.rewards.values():
            getattr(reward, "accompany", lambda: None)()

    def require_valid(self, scores: Mapping[str, Scores]) -> None:
        """Refuse to train on an iteration that too few samples of came through.

        scores: of all samples of the iteration. Raises DeadJudgeError naming the judge that failed most, its count
        and its main cause where fewer than `MIN_VALID_FRACTION` of the samples are valid for all trained judges.
        """
        if not self.trained:
            return
        known = torch.stack([scores[name].valid for name in self.trained]).all(dim=0)
        total, valid = len(known), int(known.sum())
        if valid < MIN_VALID_FRACTION * total:
            worst = min(self.trained, key=lambda name: int(scores[name].valid.sum()))
            of_all = "" if len(self.trained) == 1 else f" (all trained judges together {valid})"
            raise DeadJudgeError(
                f"judge {worst!r} scored {int(scores[worst].valid.sum())} of {total} samples{of_all}, and training "
                f"needs {MIN_VALID_FRACTION:.0%}: mend the judge or its input ({_main_cause(scores[worst])})."
            )

    def _warn(self, scores: Mapping[str, Scores]) -> None:
        """Logs each judge's causes the first time they turn up, and at most a handful of them."""
        for name, verdict in scores.items():
            told = self._warned.setdefault(name, set())
            for cause, count in verdict.causes.items():
                if cause not in told and len(told) < _TOLD_CAUSES:
                    told.add(cause)
                    _log.warning("judge %r: %d of %d samples have no score: %s", name, count, len(verdict), cause)


def _ask(reward: Reward, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
    """One batch's scores; broken pixels never reach the judge."""
    media = as_media(media)
    # A comparison with NaN is False, so this finds broken numbers too.
    broken = ~((media >= 0) & (media <= 1)).flatten(1).all(1)
    if broken.any():
        # Blank rather than removed: the batch keeps its shape, and no judge meets a NaN.
        media = torch.where(broken.view(-1, 1, 1, 1, 1), 0.0, media)
    return _guarded(reward, media, prompts).mask(broken, BAD_MEDIA)


def _guarded(reward: Reward, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
    """One batch's scores; whatever goes wrong in the judge masks the batch. Interrupts pass through."""
    try:
        return _checked(reward(media, prompts), len(media)).to(media.device)
    except Exception as error:
        return Scores.failed(len(media), describe(error), media.device)


def _checked(scores: Any, size: int) -> Scores:
    if not isinstance(scores, Scores):
        raise TypeError(f"the judge returned {type(scores).__name__}: it must return Scores")
    columns = {"values": scores.values, "valid": scores.valid, **scores.extra}
    for name, column in columns.items():
        if column.shape != (size,):
            raise ValueError(f"the judge returned {name} of shape {tuple(column.shape)} for {size} samples")
    valid = scores.valid.bool()
    unexplained = int((~valid).sum()) - sum(scores.causes.values())
    causes = {**scores.causes, "the judge gave no cause": unexplained} if unexplained > 0 else scores.causes
    told = Counter[str]()
    for cause, count in causes.items():
        told[redact(cause)] += count
    clean = Scores(scores.values.float(), valid, scores.extra, dict(told))
    return clean.mask(~clean.values.isfinite(), NOT_FINITE)


def _main_cause(scores: Scores) -> str:
    return max(scores.causes, key=lambda cause: scores.causes[cause], default="no cause given")
