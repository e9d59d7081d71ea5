"""Two or more runs on one self-contained page: settings, held-out scores, pictures and curves side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dancegrpo.config import diff_configs, load_config
from dancegrpo.errors import CheckpointError, ConfigError
from dancegrpo.files import write_text
from dancegrpo.report import cost_facts, render_page
from dancegrpo.report.curves import MISSING, Chart, has_values
from dancegrpo.report.folder import RunFolder, read_run
from dancegrpo.report.heldout import level, moment
from dancegrpo.report.overlay import COST, HEALTH, Axis, Metrics, Track, held_out_charts, metric_chart, reward_charts
from dancegrpo.report.pictures import Pair, Picture, newest_samples, side_by_side
from dancegrpo.report.standings import Cell, Standing, keys, match, standings
from dancegrpo.statistics import PairedGain, is_pass_column

LONGEST = 60
"""Characters of a setting's value that the table shows; the whole of it is in the cell's title."""


@dataclass(frozen=True)
class SettingRow:
    """A setting that is not alike in all runs, and its value in each (None: no such setting, or null)."""

    key: str
    values: list[Any]


@dataclass(frozen=True)
class Section:
    """Curves of one theme, by iteration and by samples scored."""

    anchor: str
    title: str
    about: str
    charts: list[Chart]
    by_samples: list[Chart]


@dataclass(frozen=True)
class Lineup:
    """The same prompts from the same noise in several runs: places in the list of runs, iterations done, a row each."""

    runs: list[int]
    iterations: list[int]
    pairs: list[Pair]

    @property
    def clip(self) -> Picture | None:
        """The first one that moves, if any does."""
        return next((frame for pair in self.pairs for frame in pair.frames if frame and frame.frames > 1), None)


@dataclass(frozen=True)
class Compared:
    """What `dancegrpo compare` found. page: the file it wrote. notes: what was left out, and why."""

    page: Path
    tracks: list[Track]
    settings: list[SettingRow]
    standings: list[Standing]
    notes: list[str]


def compare_runs(paths: Sequence[Path], out: Path) -> Compared:
    """Write the page of two or more runs, the first being the one that the others are measured against.

    Raises CheckpointError for fewer than two runs, a folder that is none, the same run given twice, runs that have
    nothing in common, and a page that cannot be written.
    """
    runs = read_runs(paths)
    labels = labels_of([run.path for run in runs])
    for run, label in zip(runs[1:], labels[1:], strict=True):
        require_common_ground(runs[0], labels[0], run, label)
    matched = match(runs, labels)
    tables, unpaired = standings(runs, labels, matched)
    settings, unread = setting_rows(runs, labels)
    lineup, undrawn = line_up(runs, labels)
    tracks = [Track(run, label, i, matched.evaluations[i]) for i, (run, label) in enumerate(zip(runs, labels))]
    uncounted = [f"{t.label} did not count its samples: it is not drawn by samples." for t in tracks if not t.scored]
    notes = [*matched.notes, *unpaired, *undrawn, *unread, *uncounted]
    compared = Compared(Path(out), tracks, settings, tables, notes)
    write_text(compared.page, render(compared, lineup))
    return compared


def read_runs(paths: Sequence[Path]) -> list[RunFolder]:
    """Two different runs or more. Raises CheckpointError for fewer, one given twice, and a folder that is no run."""
    folders = [Path(path).resolve() for path in paths]
    if len(folders) < 2:
        given = str(paths[0]) if folders else "nothing"
        raise CheckpointError(f"{given} alone has nothing to be compared with: give the folders of two runs or more.")
    for i, folder in enumerate(folders):
        if folder in folders[:i] and folder.is_dir():
            raise CheckpointError(
                f"{paths[folders.index(folder)]} and {paths[i]} are the same run: give each run once."
            )
    runs = []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except yaml.YAMLError as error:
            raise CheckpointError(f"{folder / 'config.yaml'} is no YAML: give the folder of a run.") from error
    return runs


def labels_of(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of their parents as it takes to tell them apart."""
    depth = 1
    while True:
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels) or depth > max(len(path.parts) for path in paths):
            return labels
        depth += 1


def require_common_ground(a: RunFolder, label_a: str, b: RunFolder, label_b: str) -> None:
    """Raises CheckpointError, naming both sides, where two runs share no held-out prompt and no training reward."""
    asked = [set(keys(run.evaluations[-1])) if run.evaluations else set() for run in (a, b)]
    rewards = [rewards_of(run) for run in (a, b)]
    if asked[0] & asked[1] or rewards[0] & rewards[1]:
        return
    sides = [
        f"{label} has {len(found):,} held-out prompts and the training rewards {', '.join(sorted(known)) or 'none'}"
        for label, found, known in zip((label_a, label_b), asked, rewards, strict=True)
    ]
    raise CheckpointError(
        f"cannot compare {label_a} with {label_b}: they share neither a held-out prompt nor a training reward "
        f"({'; '.join(sides)}); give runs that do."
    )


def rewards_of(run: RunFolder) -> set[str]:
    """The judges whose training reward the run recorded."""
    return {j for j in run.judges() if has_values([record.get(f"reward/{j}/mean") for record in run.metrics])}


def setting_rows(runs: Sequence[RunFolder], labels: Sequence[str]) -> tuple[list[SettingRow], list[str]]:
    """The settings that differ between any two runs, in the recipe's order; and why there are none to show.

    The runs' names are no setting of what is computed, and stand in the table of runs.
    """
    configs = []
    for run, label in zip(runs, labels, strict=True):
        try:
            configs.append(load_config(run.path / "config.yaml"))
        except ConfigError as error:
            return [], [f"The settings are not compared: those of {label} cannot be read ({error})"]
    found = dict.fromkeys(key for other in configs[1:] for key in diff_configs(configs[0], other) if key != "name")
    # A group that only some runs have (a judge, `model.lora`) stands for the settings in it.
    outermost = [key for key in found if not any(key.startswith(f"{group}.") for group in found)]
    dumped = [config.model_dump(mode="json") for config in configs]
    order = list(dumped[0])
    outermost.sort(key=lambda key: order.index(key.split(".")[0]))
    return [SettingRow(key, [_value(settings, key) for settings in dumped]) for key in outermost], []


def _value(settings: Any, key: str) -> Any:
    """A setting by its dotted key, None where there is none; names within it may hold dots themselves."""
    if not isinstance(settings, Mapping):
        return None
    if key in settings:
        return settings[key]
    group = next((name for name in settings if key.startswith(f"{name}.")), None)
    return None if group is None else _value(settings[group], key.removeprefix(f"{group}."))


def line_up(runs: Sequence[RunFolder], labels: Sequence[str]) -> tuple[Lineup | None, list[str]]:
    """The newest samples of the runs that drew the same prompts from the same noise; and which did not, and why."""
    notes: list[str] = []
    drawn: dict[int, tuple[int, dict[int, Path]]] = {}
    for i, run in enumerate(runs):
        newest = newest_samples(run)
        if newest is None:
            notes.append(f"{labels[i]} has drawn no samples.")
        elif drawn and (unlike := _drawn_otherwise(runs[min(drawn)], run)):
            notes.append(f"The samples of {labels[i]} are left out: {unlike}, other than {labels[min(drawn)]}.")
        else:
            drawn[i] = newest
    if len(drawn) < 2:
        return None, notes if drawn else []
    texts = [[prompt.get("text") for prompt in runs[i].prompts] for i in drawn]
    shared = [place for place, asked in enumerate(zip(*texts)) if len(set(asked)) == 1]
    if not shared:
        return None, [*notes, "No pictures: no sample prompt is the same in all runs."]
    most = max(len(asked) for asked in texts)
    if len(shared) < most:
        notes.append(f"Pictures of {len(shared)} of {most} sample prompts: the others are not the same in all runs.")
    steps = {labels[i]: runs[i].setting("rollout.num_steps") for i in drawn}
    if len(set(steps.values())) > 1:
        told = ", ".join(f"{label} {count}" for label, count in steps.items())
        notes.append(f"The samples took different numbers of steps from the same noise: {told}.")
    pairs = side_by_side([(runs[i], files) for i, (_, files) in drawn.items()], shared)
    return Lineup(list(drawn), [number for number, _ in drawn.values()], pairs) if pairs else None, notes


def _drawn_otherwise(a: RunFolder, b: RunFolder) -> str:
    """Which setting gives two runs' samples other starting noise, and its value in b; "" where none does."""
    names = ("evaluation.seed", "model.height", "model.width", "model.num_frames")
    return next((f"{name}={b.setting(name)}" for name in names if a.setting(name) != b.setting(name)), "")


def sections_of(tracks: Sequence[Track]) -> list[Section]:
    """The curves by theme; a theme without curves is left out."""

    def rewards(axis: Axis) -> list[Chart]:
        return held_out_charts(tracks, axis) + reward_charts(tracks, axis)

    def metrics(chosen: Metrics, axis: Axis) -> list[Chart]:
        return [
            chart
            for title, about, key, options in chosen
            for chart in metric_chart(tracks, title, about, key, axis, **options)
        ]

    sections = [
        Section("rewards", "Rewards", "What the judges said.", rewards("iterations"), rewards("samples")),
        Section(
            "health",
            "Health",
            "Whether the optimisation is sound.",
            metrics(HEALTH, "iterations"),
            metrics(HEALTH, "samples"),
        ),
        Section("cost", "Time and memory", "What it took.", metrics(COST, "iterations"), metrics(COST, "samples")),
    ]
    return [section for section in sections if section.charts]


def render(compared: Compared, lineup: Lineup | None) -> str:
    """The page as text."""
    sections = sections_of(compared.tracks)
    return render_page(
        "compare.html.j2",
        [chart for section in sections for chart in (*section.charts, *section.by_samples)],
        tracks=compared.tracks,
        rows=[run_facts(track) for track in compared.tracks],
        settings=[(row.key, [(shorten(v), text_of(v)) for v in row.values]) for row in compared.settings],
        settings_read=not any(note.startswith("The settings are not compared") for note in compared.notes),
        standings=compared.standings,
        lineup=lineup,
        sections=sections,
        notes=compared.notes,
        level=level,
        difference=difference,
    )


def run_facts(track: Track) -> dict[str, str]:
    """A run's row: its label left out, what it was and how far it got."""
    run, cost = track.run, dict(cost_facts(track.run))
    planned = run.setting("iterations")
    return {
        "folder": str(run.path),
        "name": str(run.setting("name", MISSING)),
        "iterations": f"{run.iterations_done:,}" + (f" of {planned:,}" if isinstance(planned, int) else ""),
        "samples": cost.get("Samples", MISSING),
        "wall time": cost.get("Wall time", MISSING),
        "status": str(run.info.get("status", "unknown")),
    }


def text_of(value: Any) -> str:
    """A setting's value as YAML would write it on one line."""
    if value is None or isinstance(value, bool):
        return {None: MISSING, True: "true", False: "false"}[value]
    if isinstance(value, Mapping | list):
        return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True).strip()
    return str(value)


def shorten(value: Any) -> str:
    """The value cut to what a table cell holds."""
    text = text_of(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def as_table(compared: Compared) -> str:
    """For a terminal: the runs, their newest held-out means against the first one's, what was left out, the page."""
    labels = [track.label for track in compared.tracks]
    width = max(map(len, labels))
    lines = []
    for track in compared.tracks:
        facts = run_facts(track)
        told = [f"{facts['iterations']} iterations", f"{facts['samples']} samples", facts["wall time"], facts["status"]]
        lines.append(f"{track.label:{width}}  {', '.join(told)}")
    if compared.standings:
        newest = compared.standings[-1]
        for row in (row for row in newest.rows if row.task is None):
            lines += ["", row.column]
            for label, iterations, cell in zip(labels, newest.iterations, row.cells, strict=True):
                if cell and iterations is not None:
                    lines.append(f"{label:{width}}  {_told(row.column, cell)}, {moment(iterations)}")
    if compared.notes:
        lines += ["", *compared.notes]
    return "\n".join([*lines, "", f"page: {compared.page}"])


def _told(column: str, cell: Cell) -> str:
    gain = cell.gain
    if gain is None:
        return level(column, cell.mean)
    amount, span = difference(column, gain)
    return f"{level(column, cell.mean)} ({amount}, {span}, n = {gain.n})"


def difference(column: str, gain: PairedGain) -> tuple[str, str]:
    """A difference and its interval, to the same digits: three of the larger of the difference and the half width."""
    if is_pass_column(column):
        return f"{100 * gain.gain:+.1f} points", f"{100 * gain.low:+.1f} to {100 * gain.high:+.1f}"
    size = max(abs(gain.gain), (gain.high - gain.low) / 2)
    places = max(0, 2 - math.floor(math.log10(size))) if size else 0
    amount, low, high = (f"{value:+.{places}f}" for value in (gain.gain, gain.low, gain.high))
    return amount, f"{low} to {high}"


def as_json(compared: Compared) -> dict[str, Any]:
    """The same as one JSON-able object, values whole, tasks included; differences are against the first run."""
    labels = [track.label for track in compared.tracks]
    return {
        "page": str(compared.page),
        "runs": [_run(track) for track in compared.tracks],
        "settings": {row.key: dict(zip(labels, row.values, strict=True)) for row in compared.settings},
        "held_out": [
            {
                "title": standing.title,
                "iterations": dict(zip(labels, standing.iterations, strict=True)),
                "rows": [
                    {"column": row.column, "task": row.task, "runs": _cells(labels, row.cells)} for row in standing.rows
                ],
            }
            for standing in compared.standings
        ],
        "left_out": compared.notes,
    }


def _run(track: Track) -> dict[str, Any]:
    run = track.run
    return {
        "name": track.label,
        "folder": str(run.path),
        "recipe": run.setting("name"),
        "iterations": run.iterations_done,
        "samples": track.scored[-1] if track.scored else None,
        "seconds": run.info.get("seconds"),
        "status": run.info.get("status", "unknown"),
    }


def _cells(labels: Sequence[str], cells: Sequence[Cell | None]) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for label, cell in zip(labels, cells, strict=True):
        if cell is not None:
            gain = cell.gain
            paired = {"gain": gain.gain, "low": gain.low, "high": gain.high, "n": gain.n} if gain else {}
            told[label] = {"mean": cell.mean, **paired}
    return told
