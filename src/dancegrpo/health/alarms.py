"""What is wrong with a run, in plain words: a monitor that sees one iteration after another.

Nothing here depends on time or chance: the same metrics give the same alarms, live, after a resume and in the report.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dancegrpo.health.history import START, WINDOW, History, Level, level
from dancegrpo.image_statistics import STATISTICS

CLEAR = 6
"""Iterations in a row without its cause after which an alarm is over, and may be raised again."""
WARM_UP = 8
"""Values of a metric that must be known before one of them can be called a spike."""
ERRORS = 4.0
"""Standard errors that a change since the first iterations must have to be called one; sound runs stay under 3."""
FROM_BEST = 5.0
"""The same of a fall from the best level, which of many levels is also the luckiest; sound runs stay under 3."""
RISE = 2.0
"""Standard errors by which a trained judge must have risen for a fall elsewhere to be called hacking."""
COLLAPSED = 0.5
"""A reward has collapsed this many standard deviations of the samples below its best level."""
UNIFORM = 0.15
"""Share of the best diversity within groups below which it has collapsed."""
FELL = 0.3
"""Standard deviations of the samples by which a held-out judge must fall beside a rising trained one."""
LOOKS = 4.0
"""Standard deviations of the first samples by which the looks of a mean picture must change to be called hacking."""
LATTICE = 0.3
"""Rise of `image/grid` that is called hacking, whatever its spread was: pictures without lattices have almost none."""
FOLLOWS = 0.9
"""Correlation within groups from which on a trained judge is said to pay for an image statistic and little else."""
SILENT = 0.9
"""Share of groups without spread from which on there is no signal."""
FLAT_AFTER = 90
"""Iterations before a reward can be called flat."""


@dataclass(frozen=True)
class Alarm:
    """Something a person should look at. text: what was seen, in numbers. cause: the likely one. remedy: what to do."""

    name: str
    iteration: int
    text: str
    cause: str
    remedy: str

    @property
    def sentence(self) -> str:
        """All of it in one line."""
        return f"{self.name} at iteration {self.iteration}: {self.explanation}"

    @property
    def explanation(self) -> str:
        """What was seen, why, and what to do, as sentences."""
        return f"{self.text[:1].upper()}{self.text[1:]}. Likely cause: {self.cause}. {self.remedy}."


Check = Callable[[History], str | None]


class Monitor:
    """Sees the metrics of one iteration after another and says what is wrong.

    An alarm is raised once; after `CLEAR` iterations without its cause it is over. settings: the run's, as a mapping
    (`RunConfig.model_dump()`, or its config.yaml read).
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._history = History(settings)
        self._quiet: dict[str, int] = {}  # iterations since its cause was last seen, of each alarm that stands

    @property
    def standing(self) -> tuple[str, ...]:
        """The alarms that were raised and are not over."""
        return tuple(self._quiet)

    def see(self, metrics: Mapping[str, Any]) -> list[Alarm]:
        """The alarms that this iteration raises. metrics: its line of metrics.jsonl, or the same before it is written.

        To go on with a run, show a new monitor the lines that are there.
        """
        self._history.add(metrics)
        if self._history.went_back:
            self._quiet.clear()  # what comes again after a rollback is told again
        raised = []
        for name, (check, cause, remedy) in CHECKS.items():
            text = check(self._history)
            if text is not None:
                if name not in self._quiet:
                    raised.append(
                        Alarm(name, int(metrics.get("iteration", self._history.seen - 1)), text, cause, remedy)
                    )
                self._quiet[name] = 0
            elif name in self._quiet:
                self._quiet[name] += 1
                if self._quiet[name] >= CLEAR:
                    del self._quiet[name]
        return raised


def alarms_of(settings: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> list[Alarm]:
    """Every alarm of a run, in order. rows: of its metrics.jsonl."""
    monitor = Monitor(settings)
    return [alarm for row in rows for alarm in monitor.see(row)]


def _flat(history: History) -> str | None:
    if history.seen < FLAT_AFTER or not any(history.column("train/weight_change")):
        return None
    told = []
    for judge in history.trained:
        first, now = history.reward(judge, history.start), history.reward(judge, history.last(START))
        if first is None or now is None or not first.spread:
            return None
        noise = math.hypot(first.error, now.error)
        # With too few samples a rise worth having would drown in the noise: then nothing is said.
        if abs(now.mean - first.mean) > 2 * noise or 2 * noise > FELL * first.spread:
            return None
        told.append(f"{judge} was {first.mean:.4g} at first and is {now.mean:.4g}, noise {noise:.2g}")
    moved = history.column("train/weight_change")[-1]
    return (
        f"after {history.seen} iterations {'; '.join(told)}, while the weights moved by {moved:.2%}" if told else None
    )


def _collapse(history: History) -> str | None:
    blank = history.column("image/blank", 3)
    if len(blank) == 3 and min(blank) > 0.5:
        return f"{blank[-1]:.0%} of the pictures are of one colour or not finite"
    for judge in history.trained:
        best, now = history.best.get(judge), history.reward(judge, history.last(WINDOW))
        if best is None or now is None or now.above(best) > -FROM_BEST:
            continue
        if best.mean - now.mean > COLLAPSED * best.spread:
            return f"the reward of {judge} fell from {abs(best.mean):.4g} to {abs(now.mean):.4g}" + _errors(now, best)
    diverse, best_diverse = history.column("image/diversity"), history.most_diverse
    if len(diverse) == WINDOW and best_diverse is not None and best_diverse > 1e-3:
        found = statistics.median(diverse)
        if found < UNIFORM * best_diverse:
            return f"pictures of one prompt lie {found:.2g} apart, {best_diverse:.2g} at best: they are nearly the same"
    return None


def _hacking(history: History) -> str | None:
    if history.seen < 2 * WINDOW or not history.last(WINDOW):
        return None
    first, now = history.start[:WINDOW], history.last(WINDOW)
    rising = [
        (judge, a, b)
        for judge in history.trained
        if (b := _risen(history, judge)) and (a := history.reward(judge, first))
    ]
    if not rising:
        return None
    judge, before, after = rising[0]
    told = f"{judge} rose from {abs(before.mean):.4g} to {abs(after.mean):.4g}"
    for other in history.held_out:
        a, b = history.reward(other, first), history.reward(other, now)
        if a is not None and b is not None and b.above(a) < -ERRORS and a.mean - b.mean > FELL * a.spread:
            return f"{told}, while the held-out {other} fell from {a.mean:.4g} to {b.mean:.4g}" + _errors(b, a)
    return _passes(history, told) or _looks(history, told)


def _risen(history: History, judge: str) -> Level | None:
    """A trained judge's level now, where it is above its first beyond noise."""
    first, now = history.reward(judge, history.start[:WINDOW]), history.reward(judge, history.last(WINDOW))
    return now if first is not None and now is not None and now.above(first) > RISE else None


def _passes(history: History, told: str) -> str | None:
    """A judge's pass rate that falls while its own score, or another's, rises."""
    for name in history.trained:
        rates = [_rate(f"reward/{name}/pass", rows) for rows in (history.start[:WINDOW], history.last(WINDOW))]
        first, now = rates
        if first is not None and now is not None and now.above(first) < -ERRORS and first.mean - now.mean > 0.1:
            return f"{told}, while the pass rate of {name} fell from {first.mean:.0%} to {now.mean:.0%}"
    return None


def _rate(key: str, rows: Iterable[Mapping[str, float]]) -> Level | None:
    """A pass rate's level, by the spread that a share of that size has."""
    told = [{**row, "_spread": math.sqrt(row[key] * (1 - row[key]))} for row in rows if key in row]
    return level(key, "_spread", told)


def _looks(history: History, told: str) -> str | None:
    """An image statistic that left the range of the first pictures, or that is what the judge pays for."""
    first, now = history.start[:WINDOW], history.last(WINDOW)
    for name in STATISTICS:
        key, words = f"image/{name}", name.replace("_", " ")
        a, b = level(key, f"{key}/std", first), level(key, f"{key}/std", now)
        if a is None or b is None:
            continue
        paid, moved = history.column(f"{key}/reward"), f"{words} went from {a.mean:.3g} to {b.mean:.3g}"
        if len(paid) == WINDOW and abs(follows := statistics.median(paid)) > FOLLOWS:
            return f"{told}, while {moved}: within groups the score follows {words} (correlation {follows:+.2f})"
        far = LATTICE if name == "grid" else LOOKS * a.spread
        if a.spread and abs(b.mean - a.mean) > far and abs(b.above(a)) > ERRORS:
            shift = (b.mean - a.mean) / a.spread
            return f"{told}, while {moved}, {shift:+.1f} standard deviations of the first pictures"
    return None


def _no_signal(history: History) -> str | None:
    rows = history.last(WINDOW)
    groups = sum(row.get("groups/total", 0.0) for row in rows)
    silent = sum(row.get("groups/zero_spread", 0.0) for row in rows)
    if groups and silent >= SILENT * groups:
        return f"{silent:.0f} of the last {groups:.0f} groups had samples that all scored the same"
    norms = history.column("train/grad_norm")
    if len(norms) == WINDOW and not any(norms):
        return f"the gradient was 0 in the last {WINDOW} iterations"
    for judge in history.trained:
        spreads, means = (history.column(f"reward/{judge}/{what}") for what in ("group_std", "mean"))
        if len(spreads) < WINDOW or len(means) < WINDOW:
            return None
        if max(spreads) > 1e-5 * max(abs(mean) for mean in means):
            return None
    if not (rows and history.trained):
        return None
    return "the scores within groups differ by less than 1e-5 of their size: advantages are made of rounding"


def _clip_range(history: History) -> str | None:
    bound, said = history.clip_range / 10, None
    difference, rounding = history.column("train/replay_difference", 3), history.column("train/log_prob_rounding", 3)
    if len(difference) == 3 and min(difference) > bound:
        said = f"log-probs of rollout and training differ by {statistics.median(difference):.2g}"
    elif len(rounding) == 3 and min(rounding) > bound:
        said = f"the steps have so little noise that float32 knows log-probs only to {statistics.median(rounding):.2g}"
    return f"{said}, more than a tenth of algorithm.clip_range={history.clip_range:g}" if said else None


def _spike(history: History) -> str | None:
    for key, called, least in (
        ("train/grad_norm", "the gradient norm", 0.0),
        ("train/ratio_max_deviation", "the largest deviation of a ratio from 1", history.clip_range * 10),
        ("train/loss", "the loss", 1.0),
    ):
        known, now = [abs(v) for v in history.known(key)], history.column(key, 1)
        if len(known) < WARM_UP or not now:
            continue
        usual = statistics.median(known[-20:])
        if abs(now[0]) > max(history.spike * usual, least) and usual:
            return f"{called} was {abs(now[0]):.3g}, {abs(now[0]) / usual:.0f} times its median of {usual:.3g}"
    skipped = history.column("train/skipped_updates", 1)
    return (
        f"{skipped[0]:.0f} update(s) were left out: the gradient was not finite, or a spike" if any(skipped) else None
    )


def _errors(now: Level, before: Level) -> str:
    return f" ({abs(now.above(before)):.1f} standard errors)"


CHECKS: dict[str, tuple[Check, str, str]] = {
    "collapse": (
        _collapse,
        "updates that are too large, or too few samples per update",
        "Lower optimizer.learning_rate or optimizer.max_grad_norm, or raise prompts.per_iteration",
    ),
    "spike": (
        _spike,
        "a few extreme samples, or a learning rate at the edge",
        "Lower optimizer.max_grad_norm or optimizer.learning_rate if it comes again",
    ),
    "no-signal": (
        _no_signal,
        "a judge that cannot tell a prompt's samples apart, or prompts that always or never succeed",
        "Look at the raw scores; raise rollout.noise_level, change the prompts, or use a graded judge",
    ),
    "clip-range": (
        _clip_range,
        "arithmetic too coarse for the noise of the steps",
        "Raise rollout.noise_level, or algorithm.clip_range, or compute in float32",
    ),
    "hacking": (
        _hacking,
        "the trained judge pays for something else than what is wanted",
        "Look at the samples; add a second trained judge, set algorithm.kl_weight, or stop at an earlier checkpoint",
    ),
    "flat": (
        _flat,
        "a learning rate that is too low, or too few samples per update for this judge",
        "Raise optimizer.learning_rate or prompts.per_iteration, and look at reward/JUDGE/group_std",
    ),
}
"""Each alarm: how it is found, its likely cause, what to change; in the order in which they are told."""
