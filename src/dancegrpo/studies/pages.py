"""A study's page: one self-contained HTML file, made from its results alone; and its table as Markdown."""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from dancegrpo.errors import CheckpointError, DanceError
from dancegrpo.files import write_text
from dancegrpo.progress import duration
from dancegrpo.report import script_json
from dancegrpo.report.curves import MISSING, show
from dancegrpo.studies.plan import TUNING_SEED
from dancegrpo.studies.results import Result
from dancegrpo.studies.rows import shown_prompts
from dancegrpo.studies.study import Study, load_study, study_names
from dancegrpo.studies.summary import Evidence, Verdict, cell_note, cell_text, change_text, level

DEFAULT_OUT = Path("reproduce")
"""Folder of runs and results where the command names none."""
PICTURE_HEIGHT, ROW_WIDTH = 96, 860
"""Pixels up to which small pictures are enlarged, and the width of a row up to which they are."""


@dataclass(frozen=True)
class Row:
    """One arm's pictures: a data URI of equal pictures side by side. width, height: as shown, in pixels."""

    label: str
    source: str
    width: int
    height: int


@dataclass(frozen=True)
class Strip:
    """The rows of one condition, and the prompts from left to right."""

    title: str | None
    prompts: list[str]
    rows: list[Row]


@dataclass(frozen=True)
class Cost:
    """What one arm's runs took, on the average."""

    label: str
    runs: int
    iterations: str
    samples: str
    seconds: str
    phases: list[str]
    """Of one iteration: rollout (the sampler's steps), update, and the whole."""
    memory: str


def write_page(study: Study, results: Path, seeds: int = 3) -> Path:
    """Writes RESULTS/STUDY.html from the results and returns its path. seeds: for the command it tells.

    Raises CheckpointError where the folder holds what is no result, or cannot be written to.
    """
    target = results / f"{study.name}.html"
    write_text(target, render(study, results, seeds))
    return target


def render(study: Study, results: Path, seeds: int = 3) -> str:
    """The page as text."""
    evidence = Evidence(study, results)
    verdicts = evidence.verdicts()
    charts = evidence.charts()
    script = _report_asset("page.js")
    return (
        _environment()
        .get_template("study.html.j2")
        .render(
            study=study,
            evidence=evidence,
            tables={place: evidence.table(place) for place in study.places},
            verdicts=verdicts,
            counts=Counter(verdict.sign for verdict in verdicts),
            summary=summary_line(verdicts),
            rankings={place: ranked for place in study.places if (ranked := evidence.ranking(place))},
            against=[verdict for verdict in verdicts if verdict.sign == "does not hold"],
            undecided=[verdict for verdict in verdicts if verdict.sign == "undecided"],
            charts=charts,
            strips=[strip for place in study.places if (strip := _strip(evidence, place))],
            costs={place: costs(evidence, place) for place in study.places},
            facts=facts(evidence),
            command=command_of(study, results, max(seeds, len(evidence.seeds))),
            tuning_seed=TUNING_SEED,
            overlap=tuning_overlap(evidence),
            style=_report_asset("page.css") + _asset("study.css"),
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
            data=script_json({"charts": [chart.data() for chart in charts]}),
        )
    )


def command_of(study: Study, results: Path, seeds: int) -> str:
    """The command line that makes the page in this folder of results."""
    words = ["dancegrpo", "reproduce", study.source, "--seeds", str(seeds)]
    return shlex.join(words if results == DEFAULT_OUT else [*words, "--results", str(results)])


def tuning_overlap(evidence: Evidence) -> tuple[int, int] | None:
    """How many of the prompts that tuning is scored on are among the study's own, and how many those are.

    None where nothing was tuned, and where the prompts cannot be read.
    """
    study = evidence.study
    arm = next((name for name, tried in evidence.tuning.items() if tried), None)
    if arm is None:
        return None
    from dancegrpo.evaluate import held_out

    try:
        tried = evidence.plan.candidates(arm)[0]
        configs = (tried.config, evidence.plan.job(arm, study.places[0], 0, dict(tried.candidate or {})).config)
        tuned, studied = ({(prompt.id, prompt.text) for prompt in held_out(config)} for config in configs)
    except DanceError:
        return None
    return len(tuned & studied), len(tuned)


def ranking_line(evidence: Evidence) -> str:
    """`GRPO 0.59 (+0.14), Base 0.45`, for each condition."""
    main, study = evidence.study.main, evidence.study
    lines = []
    for place in study.places:
        told = [
            f"{study.arms[row.arm].label} {cell_text(main, row.cell)}"
            + (f" ({change_text(main, row.gain, None)})" if row.gain is not None else "")
            for row in evidence.ranking(place)
        ]
        if told:
            lines.append((f"{study.conditions[place].label}: " if place else "") + ", ".join(told))
    return "; ".join(lines)


def write_index(results: Path) -> Path:
    """Writes RESULTS/index.html, which links the pages that are there, and returns its path."""
    known = [load_study(name) for name in study_names() if (results / f"{name}.html").is_file()]
    shown = {study.name: study for study in known}
    others = sorted(page.stem for page in results.glob("*.html") if page.stem not in {*shown, "index"})
    found = {name: Evidence(study, results) for name, study in shown.items()}
    lines = {name: [ranking_line(each), summary_line(each.verdicts())] for name, each in found.items()}
    page = (
        _environment()
        .get_template("index.html.j2")
        .render(studies=known, others=others, lines=lines, style=_report_asset("page.css") + _asset("study.css"))
    )
    write_text(results / "index.html", page)
    return results / "index.html"


def summary_line(verdicts: Sequence[Verdict]) -> str:
    """`4 of 6 claims hold, 1 does not hold, 1 is undecided`."""
    counts = Counter(verdict.sign for verdict in verdicts)
    against, open_ = counts["does not hold"], counts["undecided"]
    parts = [f"{counts['holds']} of {len(verdicts)} claims hold here"]
    parts += [f"{against} {'does' if against == 1 else 'do'} not"] if against else []
    parts += [f"{open_} {'is' if open_ == 1 else 'are'} undecided"] if open_ else []
    return ", ".join(parts)


def markdown_table(study: Study, results: Path) -> str:
    """The study's table in Markdown: mean ± standard deviation over seeds, the paper's own numbers beside ours.

    One table for each condition. Raises CheckpointError where the folder holds no result of it, or what is none.
    """
    evidence = Evidence(study, results)
    if not evidence.runs:
        raise CheckpointError(
            f"{results} holds no results of study {study.name}: run it first, or name their folder with --results"
        )
    return "\n\n".join(_markdown(evidence, place) for place in study.places)


def markdown_tables(studies: Sequence[Study], results: Path) -> str:
    """The tables of several studies, each under its title; of several, those without results say so.

    Raises CheckpointError where none has any.
    """
    known = [study for study in studies if Evidence(study, results).runs]
    if studies and not known:
        markdown_table(studies[0], results)
    tables = [markdown_table(study, results) if study in known else "No results yet." for study in studies]
    return "\n\n".join(f"**{_plain(study.title)}**\n\n{told}" for study, told in zip(studies, tables, strict=True))


def _markdown(evidence: Evidence, place: str | None) -> str:
    study, table = evidence.study, evidence.table(place)
    told = study.published_in(place)
    heads = [head for label in study.columns.values() for head in ([f"{label}, paper", "ours"] if told else [label])]
    lines = [f"{_plain(study.conditions[place].label)}:", ""] if place else []
    lines += [f"| | {' | '.join(map(_plain, heads))} |", "|---" * (1 + len(heads)) + "|"]
    for arm, cells in table.items():
        row = []
        for column, cell in cells.items():
            text = cell_text(column, cell)
            published = told.get(arm, {}).get(column)
            row += [MISSING if published is None else level(column, published)] if told else []
            row.append(f"**{text}**" if cell and cell.best else text)
        lines.append(f"| {_plain(study.arms[arm].label)} | {' | '.join(row)} |")
    return "\n".join(lines)


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def costs(evidence: Evidence, place: str | None) -> list[Cost]:
    """Seconds, samples and memory of each trained arm, means over its runs."""
    rows = []
    for arm in evidence.study.trained:
        runs = list(evidence.of(arm, place).values())
        if not runs:
            continue
        seconds = [run.seconds for run in runs if run.seconds]
        memory = [run.peak_memory_mb for run in runs if run.peak_memory_mb]
        rows.append(
            Cost(
                evidence.study.arms[arm].label,
                len(runs),
                f"{round(np.mean([run.iterations for run in runs])):,}",
                f"{round(np.mean([run.samples[-1] if run.samples else 0 for run in runs])):,}",
                duration(float(np.mean(seconds))) if seconds else MISSING,
                [_phase(runs, phase) for phase in ("rollout", "update", "total")],
                show(max(memory), "megabytes") if memory else MISSING,
            )
        )
    return rows


def _phase(runs: Sequence[Result], phase: str) -> str:
    known = [run.phases[phase] for run in runs if phase in run.phases]
    return show(float(np.mean(known)), "seconds") if known else MISSING


def facts(evidence: Evidence) -> list[tuple[str, str]]:
    """Where the numbers come from: label and value, known ones only."""
    runs = evidence.runs
    found = [
        ("Seeds", ", ".join(map(str, evidence.seeds))),
        ("Code", "; ".join(evidence.commits)),
        ("Machine", _listed({_machine(run.machine) for run in runs})),
        *(
            (name, _listed({run.versions.get(name, "") for run in runs}))
            for name in ("dancegrpo", "torch", "diffusers")
        ),
        ("Seconds in all", duration(sum(run.seconds or 0 for run in runs))),
    ]
    return [(label, value) for label, value in found if value]


def _machine(machine: dict[str, Any]) -> str:
    threads = machine.get("cpu_threads")
    words = [str(machine[key]) for key in ("device", "platform") if key in machine]
    return ", ".join([*words, f"{threads} CPU thread{'s' if threads != 1 else ''} per run"] if threads else words)


def _listed(values: set[str]) -> str:
    return "; ".join(sorted(values - {""}))


def _strip(evidence: Evidence, place: str | None) -> Strip | None:
    """Seed 0's pictures of each arm that has them."""
    study, rows, prompts, clips = evidence.study, list[Row](), list[str](), False
    for arm, chosen in study.arms.items():
        run = evidence.of(arm, place).get(0)
        if run is None:
            continue
        owner = study.trained[0] if chosen.base else arm
        name = f"{owner}.{place}" if place else owner
        file = evidence.results / study.name / f"{name}.seed0{'.start' if chosen.base else ''}.webp"
        if (row := _row(chosen.label, file)) is not None:
            rows.append(row)
            prompts = prompts or run.prompts
            clips = _is_clip(run)
    if not rows:
        return None
    title = study.conditions[place].label if place else None
    return Strip(title, shown_prompts(prompts, clips), rows)


def _is_clip(run: Any) -> bool:
    frames = run.settings.get("model.num_frames")
    if frames is None:
        from dancegrpo.config import load_config

        frames = load_config(run.recipe).model.num_frames
    return bool(frames > 1)


def _row(label: str, file: Path) -> Row | None:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            size = image.size
    except (OSError, UnidentifiedImageError):
        return None
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    scale = max(1.0, min(PICTURE_HEIGHT / size[1], ROW_WIDTH / size[0]))
    return Row(label, f"data:image/webp;base64,{data}", round(scale * size[0]), round(scale * size[1]))


def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dancegrpo.studies", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(show=show, cell=cell_text, note=cell_note, change=change_text, level=level)
    return environment


def _report_asset(name: str) -> str:
    return resources.files("dancegrpo.report").joinpath("assets", name).read_text(encoding="utf-8")


def _asset(name: str) -> str:
    return resources.files("dancegrpo.studies").joinpath("assets", name).read_text(encoding="utf-8")
