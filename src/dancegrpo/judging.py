"""Judges outside training: scores of files, and what judges there are."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dancegrpo.config import load_reward_config
from dancegrpo.errors import PromptError
from dancegrpo.media import find_media, read_media
from dancegrpo.prompts import Prompt, open_prompts
from dancegrpo.rewards import CATALOG, Judges, load_reward
from dancegrpo.rewards.weights import best_device

_BATCH = 32
"""Files at once, for judges that take any number."""
_HELD = 64
"""Files in memory at most while those of one shape are gathered into a batch."""


@dataclass(frozen=True)
class FileScore:
    """One file's verdict; `value` None where it has no score, and then `cause` says why."""

    file: Path
    prompt: str
    value: float | None
    extra: dict[str, float]
    cause: str | None


def score_files(
    judge: str,
    overrides: Sequence[str],
    media: Sequence[Path],
    *,
    prompts: str | None = None,
    column: str = "text",
    prompt: str | None = None,
) -> list[FileScore]:
    """Scores pictures and clips with one judge, in the order of the files.

    judge: as in a recipe. overrides: `key=value` of its settings, `options.batch_size=8`. media: files or folders.
    prompts: a prompt file with one prompt per medium, in the same order, its text in `column`; or `prompt`, one text
    for all; neither = "".
    Raises a DanceError where something of it cannot be.
    """
    files = find_media(media)
    asked = _prompts(prompts, column, prompt, len(files))
    config = load_reward_config(judge, overrides)
    judges = Judges({judge: load_reward(judge, config)}).to(best_device())
    size = judges.rewards[judge].batch_size or _BATCH
    scored: dict[int, FileScore] = {}
    waiting: dict[tuple[int, ...], dict[int, Tensor]] = {}  # files of one shape, until they fill a batch

    def flush(shape: tuple[int, ...]) -> None:
        held = waiting.pop(shape)
        told = _score(judges, list(held.values()), [asked[index] for index in held])
        for index, (value, extra, cause) in zip(held, told, strict=True):
            scored[index] = FileScore(files[index], asked[index].text, value, extra, cause)

    for index, file in enumerate(files):
        frames = read_media(file)
        shape = tuple(frames.shape)
        waiting.setdefault(shape, {})[index] = frames
        if len(waiting[shape]) == size:
            flush(shape)
        elif sum(map(len, waiting.values())) >= _HELD:
            flush(max(waiting, key=lambda shape: len(waiting[shape])))
    for shape in list(waiting):
        flush(shape)
    return [scored[index] for index in range(len(files))]


def _score(
    judges: Judges, frames: Sequence[Tensor], prompts: Sequence[Prompt]
) -> list[tuple[float | None, dict[str, float], str | None]]:
    (scores,) = judges.score(torch.stack(list(frames)), prompts).values()
    cause = " or ".join(scores.causes) or None  # a judge says how many fell to each, not which
    columns = {name: column.float().tolist() for name, column in scores.extra.items()}
    valid, values = scores.valid.tolist(), scores.values.tolist()
    return [
        (value, {name: column[i] for name, column in columns.items()}, None) if known else (None, {}, cause)
        for i, (known, value) in enumerate(zip(valid, values, strict=True))
    ]


def _prompts(source: str | None, column: str, text: str | None, count: int) -> list[Prompt]:
    if source is None:
        return [Prompt(index, text or "") for index in range(count)]
    if text is not None:
        raise PromptError(f"--prompt {text!r} and --prompts {source} were both given: give one of them.")
    found = open_prompts(source, column=column)
    if len(found) != count:
        raise PromptError(f"{source} has {len(found)} prompts for {count} files: give one prompt per file, in order.")
    return list(found)


def as_json(rows: Sequence[FileScore]) -> dict[str, Any]:
    """The scores as one JSON object."""
    listed = [
        {"file": str(r.file), "prompt": r.prompt, "score": r.value, "extra": r.extra, "cause": r.cause} for r in rows
    ]
    known = [row.value for row in rows if row.value is not None]
    return {"mean": sum(known) / len(known) if known else None, "scored": len(known), "files": listed}


def as_csv(rows: Sequence[FileScore]) -> str:
    """The scores as CSV with a header; an empty cell where there is no score."""
    extras = sorted({name for row in rows for name in row.extra})
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["file", "prompt", "score", *extras, "cause"])
    for row in rows:
        writer.writerow([row.file, row.prompt, row.value, *(row.extra.get(name) for name in extras), row.cause])
    return out.getvalue()


def as_table(rows: Sequence[FileScore]) -> str:
    """The scores as aligned text, with the mean below."""
    width = max(len(str(row.file)) for row in rows)
    lines = []
    for row in rows:
        extra = "".join(f"  {name} {value:.4g}" for name, value in sorted(row.extra.items()))
        told = f"{row.value:10.4f}{extra}" if row.value is not None else f"         -  {row.cause}"
        lines.append(f"{row.file!s:{width}}  {told}")
    known = [row.value for row in rows if row.value is not None]
    mean = f"{sum(known) / len(known):10.4f}" if known else "         -"
    return "\n".join([*lines, f"{f'mean of {len(known)} of {len(rows)}':{width}}  {mean}"])


# ------------------------------------------------------------------------------------------------------------ catalogue


@dataclass(frozen=True)
class JudgeInfo:
    """A shipped judge and what of its needs is here. weights: (what, present). extra: (group, installed) or None."""

    name: str
    takes: str
    measures: str
    weights: tuple[tuple[str, bool], ...]
    extra: tuple[str, bool] | None


def list_judges() -> list[JudgeInfo]:
    """Every shipped judge, in alphabetical order; looks at the local cache alone, never at the network."""
    found = []
    for name, entry in sorted(CATALOG.items()):
        weights = tuple((f"{repo}/{file}" if file else repo, _cached(repo, file)) for repo, file in entry.weights)
        extra = (entry.extra, _installed(entry.extra)) if entry.extra else None
        found.append(JudgeInfo(name, entry.takes, entry.measures, weights, extra))
    return found


def judges_table(judges: Sequence[JudgeInfo]) -> str:
    """The judges as aligned text; what is missing says so."""
    width, takes = (max(len(getattr(judge, field)) for judge in judges) for field in ("name", "takes"))
    lines = []
    for judge in judges:
        lines.append(f"{judge.name:{width}}  {judge.takes:{takes}}  {judge.measures}")
        needs = [f"{what} ({'here' if here else 'not here'})" for what, here in judge.weights]
        if judge.extra:
            group, here = judge.extra
            needs.append(f"pip install 'dancegrpo[{group}]' ({'installed' if here else 'not installed'})")
        if needs:
            lines.append(f"{'':{width}}  {'':{takes}}  needs {', '.join(needs)}")
    return "\n".join(lines)


def _cached(repository: str, file: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    # A repository counts as here where its config is: what is missing of it is fetched when it is loaded.
    return isinstance(try_to_load_from_cache(repository, file or "config.json"), str)


def _installed(extra: str) -> bool:
    """Whether every distribution of an optional group is installed."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in requires("dancegrpo") or []]
    names = [r.name for r in wanted if r.marker is not None and r.marker.evaluate({"extra": extra})]
    try:
        for name in names:
            version(name)
    except PackageNotFoundError:
        return False
    return bool(names)  # none: this installation is older than the group
