"""What is kept of a run: a small JSON file per (study, arm, condition, seed), made from the run's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, JsonValue, ValidationError

from dancegrpo.errors import CheckpointError
from dancegrpo.files import write_text
from dancegrpo.report.folder import RunFolder, read_run
from dancegrpo.settings import Frozen
from dancegrpo.statistics import column_values
from dancegrpo.studies.plan import Job
from dancegrpo.studies.study import Study

Numbers = list[float | None]


class Estimate(Frozen):
    """A held-out column: mean, standard error of the mean (None with fewer than two prompts), prompts counted."""

    mean: float | None
    error: float | None
    n: int


class Evaluation(Frozen):
    """The held-out columns after `iteration` iterations."""

    iteration: int
    columns: dict[str, Estimate]


class Result(Frozen):
    """One finished run of a study, or one that ended in an error."""

    study: str
    arm: str
    condition: str | None
    seed: int
    key: str
    """What the run computes (`plan.config_key`)."""
    recipe: str
    settings: dict[str, JsonValue]
    """Those that differ from the recipe's, by dotted key."""
    tuned: dict[str, JsonValue]
    candidate: dict[str, JsonValue] | None
    commit: str | None
    versions: dict[str, str]
    machine: dict[str, JsonValue]
    seconds: float | None
    iterations: int
    samples: list[int]
    """Samples scored up to and with each iteration."""
    curves: dict[str, Numbers]
    """Training metric -> its value at each iteration."""
    evaluations: list[Evaluation]
    peak_memory_mb: float | None
    phases: dict[str, float] = Field(default_factory=dict)
    """Median seconds of an iteration's phases (`rollout`, `update`, ...), over the iterations that had them."""
    prompts: list[str] = Field(default_factory=list)
    """Of the picture beside it, from left to right."""
    error: str | None = None
    """The last line of a run that failed; then the measurements are empty."""

    def evaluation(self, iteration: int) -> Evaluation | None:
        """The one after `iteration` iterations; None where it was left out, as when a judge failed on most pictures."""
        return next((one for one in self.evaluations if one.iteration == iteration), None)

    def estimate(self, name: str, *, start: bool = False) -> Estimate | None:
        """A held-out column after the last iteration, or before the first; never one from between in its place."""
        found = self.evaluation(0 if start else self.iterations)
        return found.columns.get(name) if found else None

    def column(self, name: str, *, start: bool = False) -> float | None:
        """The mean of `estimate`."""
        found = self.estimate(name, start=start)
        return found.mean if found else None


def distill(job: Job, folder: Path, commit: str | None = None, metrics: tuple[str, ...] = ()) -> Result:
    """The result of a finished run.

    commit: of the code it ran. metrics: training metrics to keep beside every judge's mean reward and pass rate.

    Raises CheckpointError where the folder is no run.
    """
    run = read_run(folder)
    judged = {key for record in run.metrics for key in record if key.startswith("reward/")}
    kept = {key for key in judged if key.count("/") == 2 and key.endswith(("/mean", "/pass"))} | set(metrics)
    return Result(
        **_identity(job),
        commit=commit,
        versions={name: str(run.info[name]) for name in ("dancegrpo", "torch", "diffusers") if name in run.info},
        machine=run.info.get("machine") or {},
        seconds=run.info.get("seconds"),
        iterations=run.iterations_done,
        samples=_samples(run),
        curves={key: [_short(record.get(key)) for record in run.metrics] for key in sorted(kept)},
        evaluations=[_estimates(record) for record in run.evaluations],
        peak_memory_mb=_short(max((record.get("memory/peak_mb") or 0 for record in run.metrics), default=0) or None),
        phases=_phases(run),
        prompts=[str(prompt.get("text")) for prompt in run.prompts] if job.candidate is None else [],
    )


def failed(job: Job, error: str, commit: str | None) -> Result:
    """The record of a run that ended in an error."""
    return Result(
        **_identity(job),
        commit=commit,
        versions={},
        machine={},
        seconds=None,
        iterations=0,
        samples=[],
        curves={},
        evaluations=[],
        peak_memory_mb=None,
        error=error or "it ended without a word",
    )


def relabelled(result: Result, job: Job) -> Result:
    """The same run as the result of another study's job."""
    return result.model_copy(update=_identity(job))


def write_result(results: Path, job: Job, result: Result) -> None:
    """Writes it whole or not at all; one line per field, so that changes can be read."""
    fields = result.model_dump(mode="json").items()
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in fields)
    write_text(results / job.file, f"{{\n{lines}\n}}\n")


def read_results(results: Path, study: Study) -> dict[str, Result]:
    """All results of a study by their files, relative to `results`; {} before there is any.

    Raises CheckpointError, one line, at a file that is no result of this study.
    """
    folder, found = results / study.name, {}
    for file in sorted([*folder.glob("*.json"), *(folder / "tuning").glob("*.json")]):
        remedy = "move it away, or name another folder with --results"
        try:
            result = Result.model_validate(json.loads(file.read_text(encoding="utf-8")))
        except (ValidationError, ValueError) as error:
            raise CheckpointError(f"{file} is not a study's result: {remedy}") from error
        if result.study != study.name or result.arm not in study.arms or (result.condition not in study.places):
            of = f"study {result.study}, arm {result.arm}" + (f", {result.condition}" if result.condition else "")
            raise CheckpointError(f"{file} is a result of {of}, which study {study.name} does not have: {remedy}")
        found[str(file.relative_to(results).as_posix())] = result
    return found


def _identity(job: Job) -> dict[str, Any]:
    return {
        "study": job.study,
        "arm": job.arm,
        "condition": job.condition,
        "seed": job.seed,
        "key": job.key,
        "recipe": job.recipe,
        "settings": json.loads(json.dumps(job.changes())),
        "tuned": dict(job.tuned),
        "candidate": None if job.candidate is None else dict(job.candidate),
    }


def _samples(run: RunFolder) -> list[int]:
    planned = (run.info.get("derived") or {}).get("samples_per_iteration") or 0
    counts = [record.get("samples/total") for record in run.metrics]
    return [int(total) for total in np.cumsum([planned if count is None else count for count in counts])]


def _phases(run: RunFolder) -> dict[str, float]:
    names = sorted({key for record in run.metrics for key in record if key.startswith("seconds/")})
    known = {name: [record[name] for record in run.metrics if record.get(name) is not None] for name in names}
    return {name.removeprefix("seconds/"): float(f"{np.median(v):.4g}") for name, v in known.items() if v}


def _estimates(record: Mapping[str, Any]) -> Evaluation:
    columns = {}
    for name in record["columns"]:
        values, valid = column_values(record, name)
        known = values[valid]
        mean = float(known.mean()) if len(known) else None
        error = float(known.std(ddof=1) / len(known) ** 0.5) if len(known) > 1 else None
        columns[name] = Estimate(mean=mean, error=error, n=len(known))
    return Evaluation(iteration=int(record["iteration"]), columns=columns)


def _short(value: Any) -> float | None:
    """A number to six digits."""
    return None if value is None else float(f"{float(value):.6g}")
