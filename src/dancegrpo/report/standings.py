"""The held-out side of a comparison of runs: the prompts that all of them measured, each run against the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dancegrpo.report.folder import Record, RunFolder
from dancegrpo.statistics import Comparison, PairedGain, Summary, compare, is_pass_column, summarize

Key = tuple[int, str]
SPEED_ONLY = ("batch_size", "device")
"""Options of a judge that leave its scores as they are."""
NEUTRAL = ("appearance",)
"""Judges of which neither more nor less is better."""


@dataclass(frozen=True)
class Matched:
    """Every run's evaluations, cut to the prompts that all of them share ([] = left out), and what was left out."""

    evaluations: list[list[Record]]
    notes: list[str]

    @property
    def first(self) -> int | None:
        """The run that the others are paired with: the first one that was measured."""
        return next((i for i, found in enumerate(self.evaluations) if found), None)


@dataclass(frozen=True)
class Cell:
    """A run's mean of a column, and its paired difference to the first run (None: the first itself, or not paired)."""

    mean: float | None
    gain: PairedGain | None = None


@dataclass(frozen=True)
class Row:
    """One column, or one task of a pass column: a cell for each run, None where it has no such column.

    neutral: whether neither more nor less of it is better.
    """

    column: str
    task: str | None
    cells: list[Cell | None]
    neutral: bool = False


@dataclass(frozen=True)
class Standing:
    """A table of the runs at one moment. iterations: of each run's evaluation, None where it has none."""

    title: str
    iterations: list[int | None]
    rows: list[Row]


def keys(evaluation: Record) -> list[Key]:
    """What identifies each row of an evaluation: the prompt's id and text."""
    return list(zip(evaluation["prompt_ids"], evaluation["texts"], strict=True))


def match(runs: Sequence[RunFolder], labels: Sequence[str]) -> Matched:
    """Cut every run's evaluations to the held-out prompts that all of them share.

    A run without any in common with the first one measured is left out, and named.
    """
    notes = [
        f"{label} has no held-out evaluation." for run, label in zip(runs, labels, strict=True) if not run.evaluations
    ]
    asked = [keys(run.evaluations[-1]) if run.evaluations else [] for run in runs]
    first = next((i for i, found in enumerate(asked) if found), None)
    if first is None:
        return Matched([[] for _ in runs], notes)
    if first:
        notes.append(f"Held-out differences are therefore against {labels[first]}.")
    shared = asked[first]
    for i, found in enumerate(asked):
        common = set(found) & set(asked[first])
        if found and not common:
            notes.append(f"{labels[i]} measured other held-out prompts than {labels[first]}, none in common: left out.")
            asked[i] = []
        elif found:
            shared = [key for key in shared if key in common]
    if not shared:  # each shares some with the first, but no prompt is shared by all
        notes.append("No held-out prompt is shared by all runs: compare fewer at a time.")
        return Matched([[] for _ in runs], notes)
    evaluations = []
    for run, label, found in zip(runs, labels, asked, strict=True):
        if found and found != shared:
            notes.append(
                f"{label} measured {len(found):,} held-out prompts, of which the {len(shared):,} that all runs "
                "share count; a prompt's starting noise follows from its place in the list, and so may differ."
            )
        cut = [_cut(evaluation, shared) for evaluation in run.evaluations] if found else []
        if None in cut:
            notes.append(f"{label} has evaluations of other held-out prompts than its last one: left out.")
        evaluations.append([record for record in cut if record is not None])
    return Matched(evaluations, notes)


def _cut(evaluation: Record, shared: list[Key]) -> Record | None:
    """An evaluation's rows for these prompts, in this order; None where it lacks one of them."""
    found = keys(evaluation)
    if found == shared:
        return evaluation
    place = {key: row for row, key in enumerate(found)}
    if not all(key in place for key in shared):
        return None
    rows = [place[key] for key in shared]

    def pick(values: list[Any]) -> list[Any]:
        return [values[row] for row in rows]

    lists = {name: pick(evaluation[name]) for name in ("prompt_ids", "texts", "tasks") if evaluation.get(name)}
    tables = {name: {k: pick(v) for k, v in evaluation.get(name, {}).items()} for name in ("columns", "valid")}
    return {**evaluation, **lists, **tables}


def standings(runs: Sequence[RunFolder], labels: Sequence[str], matched: Matched) -> tuple[list[Standing], list[str]]:
    """The runs at the last iteration that all of them measured, and at each one's last; and what was not paired."""
    if matched.first is None:
        return [], []
    measured = [{record["iteration"]: record for record in found} for found in matched.evaluations]
    common = set.intersection(*(set(found) for found in measured if found))
    newest = [max(found, default=None) for found in measured]
    tables: list[Standing] = []
    notes: list[str] = []
    if common and any(last not in (None, max(common)) for last in newest):
        picked = [found.get(max(common)) for found in measured]
        tables.append(_standing("At the last evaluation that all have", runs, labels, picked, notes))
    elif not common:
        notes.append("The runs were never measured after the same number of iterations: only their last are compared.")
    picked = [found[last] if last is not None else None for found, last in zip(measured, newest, strict=True)]
    tables.append(_standing("At each run's last evaluation", runs, labels, picked, notes))
    return tables, list(dict.fromkeys(notes))


def _standing(
    title: str, runs: Sequence[RunFolder], labels: Sequence[str], picked: Sequence[Record | None], notes: list[str]
) -> Standing:
    first = next(i for i, record in enumerate(picked) if record)
    summaries = [summarize(record) if record else None for record in picked]
    pairs: list[Comparison | None] = [None] * len(runs)
    for i, record in enumerate(picked):
        if i != first and record:
            start = picked[first] or {}
            if unlike := sampled_otherwise(start, record):
                notes.append(
                    f"{labels[i]} was sampled otherwise than {labels[first]} ({unlike}): no paired differences."
                )
                continue
            wrong = {c: why for c in record["columns"] if (why := judged_otherwise(c, runs[first], runs[i]))}
            for judge, why in {column.split("/")[0]: why for column, why in wrong.items()}.items():
                notes.append(f"{judge} is not the same judge in {labels[first]} and {labels[i]} ({why}): not paired.")
            kept = {name: values for name, values in record["columns"].items() if name not in wrong}
            pair = pairs[i] = compare(start, {**record, "columns": kept})
            notes += [
                f"{labels[first]} and {labels[i]}: {number:,} prompts without a valid {column} are not paired."
                for column, number in pair.left_out.items()
                if number and not is_pass_column(column)
            ]
    iterations = [record["iteration"] if record else None for record in picked]
    twice = repeated([record for record in picked if record])
    found = {name for run in runs for name in run.judges() if is_neutral(run, name)}
    rows = [row for row in _rows(summaries, pairs) if row.column not in twice]
    return Standing(title, iterations, [replace(row, neutral=row.column.split("/")[0] in found) for row in rows])


def is_neutral(run: RunFolder, judge: str) -> bool:
    """Whether a run's judge says how pictures look, and not how good they are."""
    return ((run.config.get("rewards") or {}).get(judge) or {}).get("judge") in NEUTRAL


def repeated(evaluations: Sequence[Record]) -> set[str]:
    """Judges whose score is, in all these evaluations, one of the columns that they report beside it.

    As `shapes` and `shapes/pass` where the rules' verdict is the score, or `appearance` and `appearance/saturation`.
    """
    known = [record["columns"] for record in evaluations]
    judges = {column for columns in known for column in columns if "/" not in column}
    return {judge for judge in judges if all(_extra_of(judge, columns) for columns in known if judge in columns)}


def _extra_of(judge: str, columns: Mapping[str, Any]) -> bool:
    return any(name.startswith(f"{judge}/") and values == columns[judge] for name, values in columns.items())


def _rows(summaries: Sequence[Summary | None], pairs: Sequence[Comparison | None]) -> list[Row]:
    rows = []
    for column in dict.fromkeys(name for summary in summaries if summary for name in summary.means):
        cells = [
            Cell(s.means[column], p.overall.get(column) if p else None) if s and column in s.means else None
            for s, p in zip(summaries, pairs, strict=True)
        ]
        rows.append(Row(column, None, cells))
        for task in sorted({task for s in summaries if s for task in s.tasks.get(column, {})}):
            of_task = []
            for s, p in zip(summaries, pairs, strict=True):
                rate = s.tasks.get(column, {}).get(task) if s else None
                of_task.append(Cell(rate.rate, p.tasks.get(column, {}).get(task) if p else None) if rate else None)
            rows.append(Row(column, task, of_task))
    return rows


def sampled_otherwise(a: Record, b: Record) -> str:
    """How the sampling of two evaluations differs, in words; "" where it does not."""
    one, other = a.get("sampling"), b.get("sampling")
    if one == other:
        return ""
    if not one or not other:
        return "only one of them says how"
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return ", ".join(f"{name.replace('_', ' ')} {one.get(name)} and {other.get(name)}" for name in names)


def judged_otherwise(column: str, a: RunFolder, b: RunFolder) -> str:
    """Which setting makes a column of the same name another quantity in two runs; "" where none does."""
    judge, _, extra = column.partition("/")
    one, other = ((run.config.get("rewards") or {}).get(judge) or {} for run in (a, b))
    # A threshold makes 0 and 1 of the score alone; what the judge reports beside it stays.
    for name in ("judge", "frames", "options", *([] if extra else ["threshold"])):
        values = [settings.get(name) for settings in (one, other)]
        if name == "options":
            values = [{k: v for k, v in (value or {}).items() if k not in SPEED_ONLY} for value in values]
        if values[0] != values[1]:
            return f"rewards.{judge}.{name} differs"
    return ""
