"""A run's folder: what is written where, and what may be read back."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dancegrpo.checkpoint import write_atomically, write_json
from dancegrpo.config import RunConfig, dump_config, load_config
from dancegrpo.errors import CheckpointError


@dataclass(frozen=True)
class RunFolder:
    """Paths and records of one run: config.yaml, run.json, metrics.jsonl, evaluations/, samples/, checkpoints/."""

    path: Path

    @classmethod
    def create(cls, config: RunConfig, out: Path | None = None) -> RunFolder:
        """A new folder: `out` where given (it must be empty), else the first free output/NAME-seedS[-N].

        Raises CheckpointError when it cannot be written or already holds something.
        """
        path = out or _first_free(Path(config.output) / f"{config.name}-seed{config.seed}")
        try:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise CheckpointError(
                    f"{path} is not an empty folder: name another with --out, or go on with --resume {path}"
                )
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"cannot make the run folder {path}: {error.strerror or error}; choose another with --out"
            ) from error
        folder = cls(path)
        write_atomically(folder.config_file, lambda partial: partial.write_text(dump_config(config), encoding="utf-8"))
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run. Raises CheckpointError when there is none."""
        folder = cls(path)
        if not folder.config_file.is_file():
            raise CheckpointError(
                f"{path} is not a run folder (it has no config.yaml): name the folder that `train` printed"
            )
        return folder

    @property
    def config_file(self) -> Path:
        """The resolved settings."""
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        """One JSON object per iteration."""
        return self.path / "metrics.jsonl"

    def config(self) -> RunConfig:
        """The settings the run was started with."""
        return load_config(self.config_file)

    def info(self) -> dict[str, Any]:
        """run.json, or {} before it is written."""
        file = self.path / "run.json"
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except ValueError:
            return {}

    def write_info(self, **values: Any) -> None:
        """Merges values into run.json."""
        write_json(self.path / "run.json", {**self.info(), **values})

    def describe_machine(self, device: str, threads: int, derived: Mapping[str, Any]) -> None:
        """Records versions, machine and derived numbers at the start of a run."""
        libraries = {name: version(name) for name in ("dancegrpo", "torch", "diffusers")}
        started = self.info().get("started", datetime.now(UTC).isoformat(timespec="seconds"))
        machine = {
            "device": device,
            "cpu_threads": threads,
            "platform": platform.platform(),
            "python": platform.python_version(),
        }
        self.write_info(started=started, status="running", machine=machine, derived=dict(derived), **libraries)

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """One line, flushed."""
        try:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self.metrics_file}: {error.strerror or error}; free space, then --resume"
            ) from error

    def evaluation_file(self, iteration: int) -> Path:
        """The held-out record after `iteration` iterations."""
        return self.path / "evaluations" / f"{iteration:06d}.json"

    def samples_folder(self, iteration: int) -> Path:
        """The fixed-seed pictures after `iteration` iterations."""
        return self.path / "samples" / f"{iteration:06d}"


def _first_free(path: Path) -> Path:
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate
