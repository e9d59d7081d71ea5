"""A run's folder, read for people: whatever a live, killed or finished run has left there."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dancegrpo.errors import CheckpointError

Record = dict[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """What is in a run's folder.

    metrics: one flat record per iteration, ascending, non-finite numbers as None. evaluations: ascending.
    samples: picture folders by iterations done. unreadable: lines or files that could not be parsed.
    """

    path: Path
    config: Record
    config_text: str
    info: Record
    metrics: list[Record]
    evaluations: list[Record]
    samples: dict[int, Path]
    prompts: list[Record]
    unreadable: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The folder's name, which tells runs of one recipe apart."""
        return self.path.name

    @property
    def iterations_done(self) -> int:
        """Iterations whose metrics were written."""
        return self.metrics[-1]["iteration"] + 1 if self.metrics else 0

    @property
    def finished(self) -> bool:
        """Whether the run went to its end."""
        return self.info.get("status") == "finished"

    def setting(self, dotted: str, default: Any = None) -> Any:
        """A value of the resolved config, by its dotted name."""
        value: Any = self.config
        for key in dotted.split("."):
            if not isinstance(value, dict) or key not in value:
                return default
            value = value[key]
        return value

    def weight(self, judge: str) -> float:
        """A judge's weight; 0 = only measured."""
        judges = self.config.get("rewards") or {}
        return float((judges.get(judge) or {}).get("weight", 1.0))

    def judges(self) -> list[str]:
        """Names of the run's judges: those of the config, then any others in the metrics."""
        named = list(self.config.get("rewards") or {})
        for record in self.metrics[:1]:
            for key in record:
                if key.startswith("reward/") and key.endswith("/mean"):
                    named.append(key.removeprefix("reward/").removesuffix("/mean"))
        return list(dict.fromkeys(named))


def read_run(path: Path) -> RunFolder:
    """Read a run's folder. Raises CheckpointError where it is none; half-written lines are left out and named."""
    config_file = path / "config.yaml"
    if not config_file.is_file():
        raise CheckpointError(f"{path} holds no config.yaml: give the folder of a run, such as runs/NAME-seed0.")
    text = config_file.read_text(encoding="utf-8", errors="replace")
    unreadable: list[str] = []
    config = yaml.safe_load(text)
    return RunFolder(
        path=path,
        config=config if isinstance(config, dict) else {},
        config_text=text,
        info=_read_json(path / "run.json", unreadable) or {},
        metrics=_read_metrics(path / "metrics.jsonl", unreadable),
        evaluations=_read_evaluations(path / "evaluations", unreadable),
        samples=_numbered(path / "samples"),
        prompts=_read_json(path / "samples" / "prompts.json", unreadable) or [],
        unreadable=tuple(unreadable),
    )


def _read_json(file: Path, unreadable: list[str]) -> Any:
    if not file.is_file():
        return None
    try:
        return _finite(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, OSError):
        unreadable.append(file.name)
        return None


def _read_metrics(file: Path, unreadable: list[str]) -> list[Record]:
    if not file.is_file():
        return []
    # A resumed run writes the iterations after its checkpoint again: the last line of an iteration counts.
    records: dict[int, Record] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = _finite(json.loads(line))
            records[int(record["iteration"])] = record
        except (ValueError, KeyError, TypeError):
            unreadable.append(f"{file.name} line {number}")
    return [records[iteration] for iteration in sorted(records)]


def _read_evaluations(folder: Path, unreadable: list[str]) -> list[Record]:
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    read = [record for file in files if (record := _read_json(file, unreadable)) is not None]
    return sorted(read, key=lambda record: int(record["iteration"]))


def _numbered(folder: Path) -> dict[int, Path]:
    found = [child for child in folder.iterdir() if child.name.isdigit()] if folder.is_dir() else []
    return {int(child.name): child for child in sorted(found, key=lambda child: int(child.name))}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value
