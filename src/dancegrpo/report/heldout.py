"""The held-out side of a report: first evaluation against last, as numbers and as a sentence."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dancegrpo.errors import PromptError
from dancegrpo.report.folder import RunFolder
from dancegrpo.statistics import Comparison, PairedGain, Rate, Summary, compare, is_pass_column, main_column, summarize

Tone = Literal["good", "bad", "flat", "open"]


@dataclass(frozen=True)
class Verdict:
    """What the run did, in one headline and one line; the tone colours it."""

    headline: str
    detail: str
    tone: Tone


@dataclass(frozen=True)
class TaskRow:
    """One line of the task table: pass rates of both evaluations and their gain (None with one evaluation only)."""

    task: str
    before: Rate | None
    after: Rate | None
    gain: PairedGain | None


@dataclass(frozen=True)
class ColumnRow:
    """One held-out column that is no pass verdict: its means and gain."""

    column: str
    before: float | None
    after: float | None
    gain: PairedGain | None
    trained: bool


@dataclass(frozen=True)
class HeldOut:
    """All evaluations of a run. `comparison` is None with fewer than two, or where they asked different prompts."""

    summaries: list[Summary]
    comparison: Comparison | None
    column: str | None
    problem: str = ""

    @property
    def first(self) -> Summary:
        """The earliest evaluation: before training, unless the run was started without one."""
        return self.summaries[0]

    @property
    def last(self) -> Summary:
        """The newest evaluation."""
        return self.summaries[-1]

    @property
    def gain(self) -> PairedGain | None:
        """The paired gain of the column that stands for the run."""
        return self.comparison.overall.get(self.column) if self.comparison and self.column else None


def read_held_out(run: RunFolder) -> HeldOut | None:
    """Summaries and comparison of a run's evaluations; None where there is none."""
    if not run.evaluations:
        return None
    summaries = [summarize(evaluation) for evaluation in run.evaluations]
    comparison, problem = None, ""
    if len(run.evaluations) > 1:
        try:
            comparison = compare(run.evaluations[0], run.evaluations[-1])
        except PromptError as error:
            problem = f"First and last evaluation cannot be paired: {error}"
    trained = [judge for judge in run.judges() if run.weight(judge)]
    return HeldOut(summaries, comparison, main_column(summaries[-1].means, trained), problem)


def verdict(run: RunFolder, held_out: HeldOut | None) -> Verdict:
    """The run in plain words: held-out gain where it was measured, the training reward's change otherwise."""
    if held_out is None or held_out.column is None:
        return _reward_verdict(run)
    column, gain = held_out.column, held_out.gain
    name = column_title(column)
    if gain is None or held_out.comparison is None:
        mean = held_out.last.means[column]
        detail = held_out.problem or "One evaluation so far: the gain shows once there is a second one."
        return Verdict(f"{name} {moment(held_out.last.iteration)}: {level(column, mean)}", detail, "open")
    ends = f"{level(column, gain.before)} to {level(column, gain.after)}"
    headline = f"{name} rose from {ends}" if gain.low > 0 else f"{name} fell from {ends}"
    if not gain.is_clear:
        headline = f"{name} shows no clear change: {ends}"
    tone: Tone = "good" if gain.low > 0 else "bad" if gain.high < 0 else "flat"
    return Verdict(headline, _gain_detail(run, held_out, held_out.comparison, column), tone)


def _gain_detail(run: RunFolder, held_out: HeldOut, comparison: Comparison, column: str) -> str:
    gain = comparison.overall[column]
    sentences = [
        f"{change(column, gain.gain)} (95% interval {interval(column, gain)}) "
        f"on {gain.n:,} held-out prompts, same starting noise before and after."
    ]
    tasks = comparison.tasks[column]
    if tasks:
        sentences.append(f"Better in {sum(g.gain > 0 for g in tasks.values())} of {len(tasks)} tasks.")
    if left_out := comparison.left_out[column]:
        sentences.append(f"{left_out:,} prompts are left out: a judge failed on them.")
    if not run.finished:
        total = run.setting("iterations")
        sentences.append(f"Measured after {held_out.last.iteration} of {total} iterations.")
    return " ".join(sentences)


def _reward_verdict(run: RunFolder) -> Verdict:
    judges = [judge for judge in run.judges() if run.weight(judge)]
    for judge in judges:
        values = [value for record in run.metrics if (value := record.get(f"reward/{judge}/mean")) is not None]
        if len(values) > 1:
            return _trend_verdict(judge, values)
        if values:
            headline = f"One iteration: training reward ({judge}) {values[0]:.3g}"
            return Verdict(headline, "One point is too few to see a change, and nothing was held out.", "open")
    return Verdict("Nothing trained yet", "The run has not finished an iteration with a valid reward.", "open")


def _trend_verdict(judge: str, values: Sequence[float]) -> Verdict:
    share = max(1, min(20, len(values) // 5))
    first, last = values[:share], values[-share:]
    before, after = statistics.fmean(first), statistics.fmean(last)
    spread = (_variance(first) + _variance(last)) / share
    clear = share > 1 and abs(after - before) > 2 * spread**0.5
    moved = "rose" if after > before else "fell"
    ends = f"{before:.3g} to {after:.3g}"
    headline = f"Training reward ({judge}) {moved} from {ends}"
    if not clear:
        headline = f"Training reward ({judge}) shows no clear change: {ends}"
    plural = "iterations" if share > 1 else "iteration"
    detail = (
        f"Mean of the first and the last {share} {plural} of {len(values)}. Nothing was held out, "
        "so this says how the run did on what it trained on, and no more."
    )
    tone: Tone = "flat" if not clear else "good" if after > before else "bad"
    return Verdict(headline, detail, tone)


def _variance(values: Sequence[float]) -> float:
    return statistics.variance(values) if len(values) > 1 else 0.0


def task_rows(held_out: HeldOut) -> list[TaskRow]:
    """The task table of the run's pass column, "all prompts" first; empty where the run has no such column."""
    column = held_out.column
    if column is None or not is_pass_column(column):
        return []
    gains = held_out.comparison.tasks.get(column, {}) if held_out.comparison else {}
    single = len(held_out.summaries) == 1
    first = {} if single else held_out.first.tasks.get(column, {})
    last = held_out.last.tasks.get(column, {})
    start = None if single else held_out.first.passes.get(column)
    rows = [TaskRow("all prompts", start, held_out.last.passes.get(column), held_out.gain)]
    return rows + [TaskRow(task, first.get(task), last.get(task), gains.get(task)) for task in sorted({*first, *last})]


def column_rows(run: RunFolder, held_out: HeldOut) -> list[ColumnRow]:
    """Held-out means of every column but the pass verdict that has a table of its own."""
    gains = held_out.comparison.overall if held_out.comparison else {}
    before = held_out.first.means if len(held_out.summaries) > 1 else {}
    return [
        ColumnRow(
            column,
            before.get(column),
            held_out.last.means[column],
            gains.get(column),
            trained=column in run.judges() and run.weight(column) != 0,
        )
        for column in held_out.last.means
        if not (is_pass_column(column) and column == held_out.column)
    ]


def column_title(column: str) -> str:
    """How a column is called at the start of a sentence."""
    return "Held-out pass rate" if is_pass_column(column) else f"Held-out score ({column})"


def level(column: str, value: float | None) -> str:
    """A column's value for people: a percentage for pass rates."""
    if value is None:
        return "none"
    return f"{value:.1%}" if is_pass_column(column) else f"{value:.3g}"


def change(column: str, value: float) -> str:
    """A column's difference for people: percentage points for pass rates."""
    return f"{100 * value:+.1f} points" if is_pass_column(column) else f"{value:+.3g}"


def interval(column: str, gain: PairedGain) -> str:
    """A gain's interval for people, without its unit."""
    if is_pass_column(column):
        return f"{100 * gain.low:+.1f} to {100 * gain.high:+.1f}"
    return f"{gain.low:+.3g} to {gain.high:+.3g}"


def moment(iterations: int) -> str:
    """When an evaluation or a picture was made."""
    if iterations == 0:
        return "before training"
    return f"after {iterations:,} iteration" + ("s" if iterations > 1 else "")
