"""The report: one self-contained HTML file that says what a run did, readable offline."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from dancegrpo.files import write_text
from dancegrpo.progress import duration
from dancegrpo.report.curves import (
    PHASES,
    Chart,
    health_charts,
    held_out_charts,
    other_seconds,
    reward_charts,
    show,
    time_charts,
)
from dancegrpo.report.findings import findings
from dancegrpo.report.folder import RunFolder, read_run
from dancegrpo.report.heldout import HeldOut, change, column_rows, interval, moment, read_held_out, task_rows, verdict
from dancegrpo.report.pictures import gallery
from dancegrpo.report.strips import GAP

FILE_NAME = "report.html"


@dataclass(frozen=True)
class Section:
    """A heading, a sentence and its charts."""

    anchor: str
    title: str
    about: str
    charts: list[Chart]


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run's folder, live, killed or finished, and return its path.

    Raises CheckpointError where the folder is no run, or cannot be written to.
    """
    run = read_run(Path(run_dir))
    target = run.path / FILE_NAME
    write_text(target, render(run))
    return target


def render(run: RunFolder) -> str:
    """The page as text: markup, style, script, data and pictures in one."""
    held_out = read_held_out(run)
    sections = chart_sections(run, held_out)
    return render_page(
        "page.html.j2",
        [chart for section in sections for chart in section.charts],
        run=run,
        verdict=verdict(run, held_out),
        facts=key_facts(run),
        held_out=held_out,
        tasks=task_rows(held_out) if held_out else [],
        columns=column_rows(run, held_out) if held_out else [],
        gallery=gallery(run),
        findings=findings(run, held_out),
        sections=sections,
        phases=phase_shares(run),
        setup=setup_facts(run),
        cost=cost_facts(run),
    )


def render_page(template: str, charts: list[Chart], **values: Any) -> str:
    """A template of this package's assets as one self-contained page: escaped, its script the only one that may run.

    charts: what the page draws, in the order in which the template numbers them. values: the template's own.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dancegrpo.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(show=show, duration=duration, moment=moment, interval=interval, change=change)
    script = _asset("page.js")
    return environment.get_template(template).render(
        **values,
        gap=GAP,
        style=_asset("page.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
        data=script_json({"charts": [chart.data() for chart in charts]}),
    )


def chart_sections(run: RunFolder, held_out: HeldOut | None) -> list[Section]:
    """The curves by theme; a theme without curves is left out."""
    sections = [
        Section("rewards", "Rewards", "What the judges said.", held_out_charts(held_out) + reward_charts(run)),
        Section("health", "Health", "Whether the optimisation is sound.", health_charts(run)),
        Section("time", "Time and memory", "Where the seconds went.", time_charts(run)),
    ]
    return [section for section in sections if section.charts]


def key_facts(run: RunFolder) -> list[tuple[str, str]]:
    """The few numbers at the top: label and value."""
    cost = dict(cost_facts(run))
    planned = run.setting("iterations")
    done = f"{run.iterations_done:,}" + (f" of {planned:,}" if isinstance(planned, int) else "")
    shown = ("Wall time", "Samples", "Per sample", "Peak memory")
    return [("Iterations", done), *((label, cost[label]) for label in shown if label in cost)]


def cost_facts(run: RunFolder) -> list[tuple[str, str]]:
    """What the run took: label and value, known ones only."""
    facts = []
    seconds = sum(record.get("seconds/total") or 0.0 for record in run.metrics)
    samples = sum(record.get("samples/total") or 0 for record in run.metrics)
    evaluating = sum(record.get("seconds") or 0.0 for record in run.evaluations)
    memory = max((record.get("memory/peak_mb") or 0.0 for record in run.metrics), default=0.0)
    wall = run.info.get("seconds") or seconds + evaluating
    if wall:
        facts.append(("Wall time", duration(wall)))
    if samples:
        facts.append(("Samples", f"{samples:,.0f}"))
        facts.append(("Per sample", show(seconds / samples, "seconds")))
    if evaluating:
        facts.append(("Evaluation", duration(evaluating)))
    if memory:
        facts.append(("Peak memory", show(memory, "megabytes")))
    machine = run.info.get("machine") or {}
    facts += [(label_of(key), str(value)) for key, value in machine.items()]
    facts += [(key, str(run.info[key])) for key in ("dancegrpo", "torch", "diffusers") if key in run.info]
    return facts


def setup_facts(run: RunFolder) -> list[tuple[str, str]]:
    """The settings people ask for first, and the numbers derived from them."""
    names = {
        "Model": "model.path",
        "Algorithm": "algorithm.name",
        "Prompts per iteration": "prompts.per_iteration",
        "Group size": "rollout.group_size",
        "Steps": "rollout.num_steps",
        "Noise level": "rollout.noise_level",
        "Updates per rollout": "update.updates_per_rollout",
        "Learning rate": "optimizer.learning_rate",
        "Clip range": "algorithm.clip_range",
        "Seed": "seed",
    }
    facts = [(label, str(value)) for label, name in names.items() if (value := run.setting(name)) is not None]
    derived = run.info.get("derived") or {}
    return facts + [(label_of(key), str(value)) for key, value in derived.items()]


def phase_shares(run: RunFolder) -> list[tuple[str, float, float]]:
    """Each phase's name, seconds over the whole run, and share of their sum; empty without timing."""
    seconds = {phase: sum(record.get(f"seconds/{phase}") or 0.0 for record in run.metrics) for phase in PHASES}
    seconds["other"] = sum(value or 0.0 for value in other_seconds(run.metrics))
    total = sum(seconds.values())
    return [(phase, value, value / total) for phase, value in seconds.items() if value > 0]


def label_of(key: str) -> str:
    """`cpu_threads` as "CPU threads"."""
    return str(key).replace("_", " ").capitalize().replace("Cpu", "CPU")


def script_json(value: Any) -> str:
    """JSON that is safe inside a script element: no character in it can end the element or open another."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _asset(name: str) -> str:
    return resources.files("dancegrpo.report").joinpath("assets", name).read_text(encoding="utf-8")
