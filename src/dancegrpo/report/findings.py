"""Health in plain words: what the numbers of a run say about whether it can be trusted."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Literal

from dancegrpo.health import alarms_of
from dancegrpo.report.curves import show
from dancegrpo.report.folder import RunFolder
from dancegrpo.report.heldout import HeldOut, change, column_title
from dancegrpo.statistics import is_pass_column

FLOAT32_REPLAY = 1e-5
"""Rounding alone stays below 1e-6 in float32; ten times that is another computation."""
MOST_ALARMS = 8
"""Alarms of the iterations that are told one by one; the first ones tell most."""

TOLD = {"Replay is off": "clip-range", "Updates skipped": "spike"}
"""Findings of the whole run that say what an alarm of one iteration says."""


@dataclass(frozen=True)
class Finding:
    """One observation. level: `ok`, `note` (by design, or worth knowing), `alarm` (look at it)."""

    level: Literal["ok", "note", "alarm"]
    title: str
    text: str


def findings(run: RunFolder, held_out: HeldOut | None) -> list[Finding]:
    """What a careful reader of this run would remark on, alarms first."""
    found = [
        *_ratio(run),
        *_replay(run),
        *_signal(run),
        *_losses(run),
        *_movement(run),
        *_hacking(run, held_out),
        *_files(run),
    ]
    told = {TOLD[finding.title] for finding in found if finding.level == "alarm" and finding.title in TOLD}
    found = [*_alarms(run, told), *found]
    return sorted(found, key=lambda finding: ("alarm", "note", "ok").index(finding.level))


def _column(run: RunFolder, key: str) -> list[float]:
    return [value for record in run.metrics if (value := record.get(key)) is not None]


def _alarms(run: RunFolder, told: set[str]) -> list[Finding]:
    """What the monitor said, or would have said, while the run went on; and what was done about it.

    told: alarms of which the whole run's numbers have spoken.
    """
    if run.setting("health.watch") == "none":
        return []
    alarms = [alarm for alarm in alarms_of(run.config, run.metrics) if alarm.name not in told]
    found = [
        Finding("alarm", f"{alarm.name.capitalize()} at iteration {alarm.iteration}", alarm.explanation)
        for alarm in alarms[:MOST_ALARMS]
    ]
    if len(alarms) > MOST_ALARMS:
        names = ", ".join(dict.fromkeys(alarm.name for alarm in alarms[MOST_ALARMS:]))
        found.append(Finding("alarm", f"{len(alarms) - MOST_ALARMS} more alarms", f"Of these kinds: {names}."))
    if run.metrics and (times := run.metrics[-1].get("health/rollbacks")):
        rate = run.metrics[-1].get("health/rate")
        text = f"{times:g} times, and went on with {show(rate)} of the learning rate that was asked for."
        found.append(Finding("note", "The run went back to an earlier state", text))
    return found


def _ratio(run: RunFolder) -> list[Finding]:
    found = []
    wrong = [r for r in run.metrics if r.get("train/ratio_first") not in (None, 1.0)]
    if wrong:
        text = (
            f"It was {wrong[0]['train/ratio_first']:.6g} at iteration {wrong[0]['iteration']}, "
            f"and off in {len(wrong)} iterations: rollout and trainer compute different things."
        )
        found.append(Finding("alarm", "The first ratio is not 1", text))
    if run.setting("update.updates_per_rollout") == 1:
        text = (
            "One update per rollout: the ratio is 1 by design and the clip is inactive. "
            "Gradient norm and weight change show whether it learns."
        )
        return [*found, Finding("note", "On-policy run", text)]
    clipped = _column(run, "train/clip_fraction")
    if clipped:
        recent = statistics.fmean(clipped[-20:])
        wide = recent > 0.8
        text = f"{show(recent, 'percent')} of the trained steps were clipped in the last iterations" + (
            ": lower the learning rate, or widen algorithm.clip_range." if wide else "."
        )
        found.append(Finding("alarm" if wide else "ok", "Clipping", text))
    return found


def _replay(run: RunFolder) -> list[Finding]:
    gaps = _column(run, "train/replay_difference")
    if not gaps:
        return []
    worst, dtype = max(gaps), run.setting("model.dtype", "float32")
    if dtype != "float32":
        return [Finding("note", "Replay", f"Rollout and trainer differ by at most {worst:.2g} in {dtype}.")]
    if worst > FLOAT32_REPLAY:
        text = f"Log-probabilities of rollout and trainer differ by up to {worst:.2g}, more than rounding explains."
        return [Finding("alarm", "Replay is off", text)]
    text = (
        f"Rollout and trainer agree on every log-probability to {worst:.2g}."
        if worst
        else "Rollout and trainer agree exactly."
    )
    return [Finding("ok", "Replay", text)]


def _signal(run: RunFolder) -> list[Finding]:
    recent = run.metrics[-20:]
    total = sum(r.get("groups/total") or 0 for r in recent)
    if not total:
        return []
    share = sum(r.get("groups/zero_spread") or 0 for r in recent) / total
    text = f"{show(share, 'percent')} of the prompts in the last iterations had samples that all scored the same"
    if share > 0.5:
        hint = ": harder or more varied prompts, or a graded judge, would teach more per rollout."
        return [Finding("alarm", "Most groups carry no signal", text + hint)]
    return [Finding("ok", "Groups carry signal", text + "; they are skipped.")]


def _losses(run: RunFolder) -> list[Finding]:
    found = []
    if skipped := sum(_column(run, "train/skipped_updates")):
        text = f"{skipped:g} updates had a gradient that was not finite, and were left out."
        found.append(Finding("alarm", "Updates skipped", text))
    masked, total = sum(_column(run, "samples/masked")), sum(_column(run, "samples/total"))
    if masked and total:
        text = f"{masked:,.0f} of {total:,.0f} samples ({masked / total:.1%}) were left out: a judge failed on them."
        found.append(Finding("alarm" if masked > 0.1 * total else "note", "Masked samples", text))
    return found


def _movement(run: RunFolder) -> list[Finding]:
    moved = _column(run, "train/weight_change")
    if not moved:
        return []
    if moved[-1] == 0:
        return [Finding("alarm", "The weights did not move", "Weight change is 0: nothing was learnt.")]
    return [Finding("ok", "The weights move", f"{moved[-1]:.2%} from where they started, relative to their size (L2).")]


def _hacking(run: RunFolder, held_out: HeldOut | None) -> list[Finding]:
    if held_out is None or held_out.comparison is None:
        return []
    gains = held_out.comparison.overall
    trained = {judge for judge in run.judges() if run.weight(judge)}
    rising = [column for column, gain in gains.items() if column in trained and gain.low > 0]
    falling = [
        column
        for column, gain in gains.items()
        if gain.high < 0 and column not in trained and (is_pass_column(column) or column in run.judges())
    ]
    if not (rising and falling):
        return []
    worst = falling[0]
    text = (
        f"{column_title(worst)} changed by {change(worst, gains[worst].gain)} while the trained score "
        f"({rising[0]}) rose: look at the pictures."
    )
    return [Finding("alarm", "Possible reward hacking", text)]


def _files(run: RunFolder) -> list[Finding]:
    if not run.unreadable:
        return []
    named = ", ".join(run.unreadable[:3]) + (" and others" if len(run.unreadable) > 3 else "")
    return [Finding("note", "Half-written files", f"Left out of this report: {named}.")]
