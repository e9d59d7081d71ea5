"""Trackers: the same metrics and pictures as the run's folder, sent to the dashboard of the user's choice."""

from __future__ import annotations

import contextlib
import io
import json
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from dancegrpo.errors import ConfigError
from dancegrpo.files import write_json
from dancegrpo.redaction import redact
from dancegrpo.settings import TrackingConfig

IDENTITY_FILE = "tracking.json"
"""In the run's folder: which tracker run this is, so that a resumed run goes on in it."""


class Tracker(Protocol):
    """Where metrics go besides the run's folder. No method raises: a dashboard's trouble is never the run's."""

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Record flat metrics ("reward/shapes/mean") of iteration `step`; None values are left out."""
        ...

    def log_images(self, name: str, paths: Sequence[Path], step: int) -> None:
        """Record picture files under one name."""
        ...

    def log_clips(self, name: str, paths: Sequence[Path], step: int) -> None:
        """Record mp4 files under one name."""
        ...

    def finish(self) -> None:
        """Flush and close."""
        ...


class NoTracker:
    """Records nothing."""

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Nothing."""

    def log_images(self, name: str, paths: Sequence[Path], step: int) -> None:
        """Nothing."""

    def log_clips(self, name: str, paths: Sequence[Path], step: int) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


class GuardedTracker:
    """A tracker whose failures become one warning; the run goes on, and later calls are still tried."""

    def __init__(self, inner: Tracker, backend: str) -> None:
        self._inner, self._backend, self._warned = inner, backend, False

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Record the metrics that have a value."""
        present = {name: value for name, value in metrics.items() if value is not None}
        self._attempt(lambda: self._inner.log(present, step))

    def log_images(self, name: str, paths: Sequence[Path], step: int) -> None:
        """Record picture files under one name."""
        self._attempt(lambda: self._inner.log_images(name, paths, step))

    def log_clips(self, name: str, paths: Sequence[Path], step: int) -> None:
        """Record mp4 files under one name."""
        self._attempt(lambda: self._inner.log_clips(name, paths, step))

    def finish(self) -> None:
        """Flush and close."""
        self._attempt(self._inner.finish)

    def _attempt(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever a third-party client or its network comes up with
            if not self._warned:
                self._warned = True
                _warn(self._backend, error)


class TrackioTracker:
    """trackio, local-first: metrics land in its own folder (TRACKIO_DIR) and need no network and no account."""

    def __init__(self, project: str, name: str, config: Mapping[str, Any], resume: bool) -> None:
        import trackio

        self._trackio = trackio
        # Its greetings would tear the live display; its hardware threads would take time from small machines.
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = trackio.init(
                project=project,
                name=name,
                config=dict(config),
                resume="allow" if resume else "never",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Queue the metrics; a background thread writes them."""
        self._run.log(dict(metrics), step=step)

    def log_images(self, name: str, paths: Sequence[Path], step: int) -> None:
        """Copy the pictures into trackio's folder."""
        pictures = {f"{name}/{path.stem}": self._trackio.Image(str(path)) for path in paths}
        self._run.log(pictures, step=step)

    def log_clips(self, name: str, paths: Sequence[Path], step: int) -> None:
        """Copy the clips into trackio's folder."""
        # From files: for arrays trackio needs an ffmpeg on the PATH.
        clips = {f"{name}/{path.stem}": self._trackio.Video(str(path), format="mp4") for path in paths}
        self._run.log(clips, step=step)

    def finish(self) -> None:
        """Wait until everything is written (30 s at most)."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._trackio.finish()


class WandbTracker:
    """Weights & Biases. Its mode (online, offline, disabled) and key are its own settings, WANDB_MODE and the like."""

    def __init__(self, project: str, name: str, config: Mapping[str, Any], identity: str, folder: Path) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=project,
            name=name,
            id=identity,
            resume="allow",
            config=dict(config),
            dir=str(folder),
            settings=wandb.Settings(silent=True),
        )
        # An axis of our own: wandb's step counter cannot go back to where a resumed run starts again.
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Send the metrics."""
        self._run.log({**metrics, "iteration": step})

    def log_images(self, name: str, paths: Sequence[Path], step: int) -> None:
        """Upload the pictures as one panel."""
        self._run.log({name: [self._wandb.Image(str(path)) for path in paths], "iteration": step})

    def log_clips(self, name: str, paths: Sequence[Path], step: int) -> None:
        """Upload the clips as one panel."""
        clips = [self._wandb.Video(str(path), format="mp4") for path in paths]
        self._run.log({name: clips, "iteration": step})

    def finish(self) -> None:
        """Wait for the upload."""
        self._run.finish()


class TensorBoardTracker:
    """TensorBoard event files in the run's folder, under `tensorboard/`."""

    def __init__(self, folder: Path, config: Mapping[str, Any], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run wrote beyond its last checkpoint is hidden, and written again.
        purge = first_step if folder.exists() else None
        self._writer = SummaryWriter(str(folder), purge_step=purge)
        self._writer.add_text("config", f"```json\n{json.dumps(dict(config), indent=2, default=str)}\n```", first_step)

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Write one scalar per metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_images(self, name: str, paths: Sequence[Path], step: int) -> None:
        """Write the pictures into the event file."""
        import numpy as np
        from PIL import Image

        for path in paths:
            with Image.open(path) as image:
                self._writer.add_image(f"{name}/{path.stem}", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def log_clips(self, name: str, paths: Sequence[Path], step: int) -> None:
        """Write where the clips are: TensorBoard plays none without moviepy, which it does not mention."""
        for path in paths:
            told = f"TensorBoard plays no clips: see the strips of frames under its images, or play `{path}`."
            self._writer.add_text(f"{name}/{path.stem}", told, step)

    def finish(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


def open_tracker(
    config: TrackingConfig,
    run_dir: Path,
    run_name: str,
    config_dict: Mapping[str, Any],
    first_step: int = 0,
) -> Tracker:
    """The tracker a run asked for; in a folder that was tracked before, the same tracker run goes on.

    run_dir: the run's folder, which exists. first_step: the iteration that is logged first (not 0 after a resume).
    Raises ConfigError where the backend's package is missing. Any other failure warns, and nothing is tracked.
    """
    backend = config.backend
    if backend == "none":
        return NoTracker()
    _require_installed(backend)
    try:
        return GuardedTracker(_open(config, run_dir, run_name, config_dict, first_step), backend)
    except Exception as error:
        _warn(backend, error)
        return NoTracker()


def _open(
    config: TrackingConfig, run_dir: Path, run_name: str, config_dict: Mapping[str, Any], first_step: int
) -> Tracker:
    if config.backend == "tensorboard":
        return TensorBoardTracker(run_dir / "tensorboard", config_dict, first_step)
    identity, known = _identity(run_dir, config.backend, run_name)
    if config.backend == "wandb":
        return WandbTracker(config.project, run_name, config_dict, identity, run_dir)
    return TrackioTracker(config.project, identity, config_dict, resume=known)


def _identity(run_dir: Path, backend: str, run_name: str) -> tuple[str, bool]:
    """This run's id at the backend, and whether it was there before; unique, since folders elsewhere share names."""
    file = run_dir / IDENTITY_FILE
    identities: dict[str, str] = {}
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        identities = json.loads(file.read_text(encoding="utf-8"))
    if backend in identities:
        return identities[backend], True
    # wandb knows runs by ids (with few characters allowed), trackio by names that people read.
    started = f"{run_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    identities[backend] = uuid.uuid4().hex if backend == "wandb" else started
    write_json(file, identities)
    return identities[backend], False


def _require_installed(backend: str) -> None:
    if find_spec(backend) is not None:
        return
    install = "pip install trackio" if backend == "trackio" else f"pip install dancegrpo[{backend}]"
    raise ConfigError(
        f"tracking.backend={backend} needs a package that is not installed: {install}, or set tracking.backend=none."
    )


def _warn(backend: str, error: Exception) -> None:
    told = redact(str(error))
    warnings.warn(
        f"{backend} failed ({type(error).__name__}: {told}); the run goes on, its metrics are in metrics.jsonl.",
        RuntimeWarning,
        stacklevel=3,
    )
