"""A run's folder: what is written where, and what may be read back."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dancegrpo.config import RunConfig, dump_config, load_config
from dancegrpo.errors import CheckpointError
from dancegrpo.files import write_json, write_text


@dataclass(frozen=True)
class RunFolder:
    """Paths and records of one run: config.yaml, run.json, metrics.jsonl, evaluations/, samples/, checkpoints/."""

    path: Path
    writes: bool = True
    """False on the processes of a run that leave writing to the first."""

    @classmethod
    def create(cls, config: RunConfig, out: Path | None = None) -> RunFolder:
        """A new folder: `out` where given (it must be empty), else the first free output/NAME-seedS[-N].

        Raises CheckpointError when it cannot be written or already holds something.
        """
        wanted = out or Path(config.output) / f"{config.name}-seed{config.seed}"
        try:
            folder = cls(_claim(wanted) if out is not None else _claim_first_free(wanted))
        except OSError as error:
            reason = error.strerror or error
            raise CheckpointError(
                f"cannot make the run folder {wanted}: {reason}; choose another with --out"
            ) from error
        folder.write_config(config)
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

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes from training in this folder; given up when this one ends, however it ends.

        Raises CheckpointError when another one holds it. Where the system has no such locks, there is none.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        with (self.path / ".lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CheckpointError(
                    f"another process trains in {self.path}: wait for its end, or stop it first"
                ) from error
            except OSError:  # some network file systems have no locks
                pass
            yield

    @property
    def config_file(self) -> Path:
        """The resolved settings."""
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        """One JSON object per iteration."""
        return self.path / "metrics.jsonl"

    def write_config(self, config: RunConfig) -> None:
        """The settings the run goes on with."""
        write_text(self.config_file, dump_config(config))

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
        if not self.writes:
            return
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
        self.write_info(
            started=started, status="running", verdict=None, machine=machine, derived=dict(derived), **libraries
        )

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """One line, flushed; a number that is not finite becomes null."""
        if not self.writes:
            return
        row = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in metrics.items()
        }
        size = self.metrics_file.stat().st_size if self.metrics_file.is_file() else 0
        try:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        except OSError as error:
            with suppress(OSError):  # no half line: what is added later would be unreadable with it
                os.truncate(self.metrics_file, size)
            raise CheckpointError(
                f"cannot write {self.metrics_file}: {error.strerror or error}; free space, then --resume"
            ) from error

    def evaluation_file(self, iteration: int) -> Path:
        """The held-out record after `iteration` iterations."""
        return self.path / "evaluations" / f"{iteration:06d}.json"

    def samples_folder(self, iteration: int) -> Path:
        """The fixed-seed pictures after `iteration` iterations."""
        return self.path / "samples" / f"{iteration:06d}"


def _claim(path: Path) -> Path:
    # What a kill left of a file that was never whole does not count.
    if path.exists() and (not path.is_dir() or any(held.suffix != ".partial" for held in path.iterdir())):
        raise CheckpointError(f"{path} is not an empty folder: name another with --out, or go on with --resume {path}")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _claim_first_free(path: Path) -> Path:
    """Makes path, or path-2, path-3, ...; two runs that start together never get the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    candidate, number = path, 2
    while True:
        try:
            candidate.mkdir()
        except FileExistsError:
            candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
        else:
            return candidate
