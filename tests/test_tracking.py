"""Trackers get what the run logged, and can never stop it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from dancegrpo.errors import ConfigError
from dancegrpo.media import save_image
from dancegrpo.settings import TrackingConfig
from dancegrpo.tracking import GuardedTracker, NoTracker, open_tracker
from dancegrpo.video import save_clip

TRACK = """
import sys
from pathlib import Path
from dancegrpo.settings import TrackingConfig
from dancegrpo.tracking import open_tracker
run, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
tracker = open_tracker(TrackingConfig(project="shapes"), run, "demo-seed0", {"seed": 0}, first)
for step in range(first, last):
    tracker.log({"reward/shapes/mean": 0.25 * step, "train/kl": None}, step)
tracker.log_images("samples", [run / "0.png"], last - 1)
tracker.log_clips("clips", [run / "0.mp4"], last - 1)
tracker.finish()
"""


def track(run: Path, first: int, last: int) -> str:
    """Run TRACK in a process of its own: trackio fixes its folder when it is imported."""
    environment = {**os.environ, "TRACKIO_DIR": str(run.parent / "trackio"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "error", "-c", TRACK, str(run), str(first), str(last)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def read_trackio(folder: Path) -> dict[str, list[dict[str, object]]]:
    """Every trackio run in the folder with its logs, read in a fresh process."""
    code = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as S;"
        "print(json.dumps({run: S.get_logs('shapes', run) for run in S.get_runs('shapes')}, default=str))"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    save_image(torch.rand(3, 8, 8), folder / "0.png")
    save_clip(torch.rand(3, 3, 8, 8), folder / "0.mp4", fps=8)
    return folder


def test_trackio_keeps_what_was_logged_and_a_resumed_run_goes_on_in_it(run: Path) -> None:
    assert track(run, 0, 2) == ""
    track(run, 2, 3)
    logs = read_trackio(run.parent / "trackio")
    [(name, rows)] = logs.items()
    assert name.startswith("demo-seed0-")
    metrics = {row["step"]: row["reward/shapes/mean"] for row in rows if "reward/shapes/mean" in row}
    assert metrics == {0: 0.0, 1: 0.25, 2: 0.5}
    assert not any("train/kl" in row for row in rows)
    assert [row["step"] for row in rows if "samples/0" in row] == [1, 2]
    clips = [row["clips/0"] for row in rows if "clips/0" in row]
    assert [clip["_type"] for clip in clips] == ["trackio.video"] * 2  # type: ignore[index]
    kept = {file.read_bytes() for file in (run.parent / "trackio").rglob("*.mp4")}
    assert kept == {(run / "0.mp4").read_bytes()}


def test_no_backend_tracks_nothing(run: Path) -> None:
    before = sorted(run.iterdir())
    tracker = open_tracker(TrackingConfig(backend="none"), run, "demo", {})
    tracker.log({"a": 1.0}, 0)
    tracker.finish()
    assert isinstance(tracker, NoTracker)
    assert sorted(run.iterdir()) == before


def test_a_missing_extra_names_its_installation(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dancegrpo.tracking.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install dancegrpo\[wandb\]"):
        open_tracker(TrackingConfig(backend="wandb"), run, "demo", {})


def test_a_tracker_that_fails_warns_once_and_keeps_being_tried() -> None:
    class Broken:
        calls = 0

        def log(self, metrics: object, step: int) -> None:
            self.calls += 1
            raise ConnectionError("refused")

        log_images = log_clips = finish = log

    inner = Broken()
    tracker = GuardedTracker(inner, "wandb")  # type: ignore[arg-type]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            tracker.log({"a": 1.0}, step)
    [warning] = caught
    assert "wandb failed (ConnectionError: refused); the run goes on" in str(warning.message)
    assert inner.calls == 3


WANDB_STAND_IN = """
calls = []
class Settings:
    def __init__(self, silent=False): pass
class Image:
    def __init__(self, path): self.path = path
class Video(Image):
    def __init__(self, path, format): self.path, self.format = path, format
class Run:
    def define_metric(self, name, step_metric=None): pass
    def log(self, row): calls.append(("log", row))
    def finish(self, exit_code=None): calls.append(("finish", {}))
def init(**arguments):
    if arguments["project"] == "unreachable": raise ConnectionError("no route")
    calls.append(("init", arguments))
    return Run()
"""


@pytest.fixture
def wandb_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(WANDB_STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)


@pytest.mark.usefixtures("wandb_stand_in")
def test_wandb_resumes_under_the_same_id_on_an_axis_of_iterations(run: Path) -> None:
    import wandb

    for step in (4, 5):
        tracker = open_tracker(TrackingConfig(backend="wandb"), run, "demo", {"seed": 1}, first_step=step)
        tracker.log({"reward/shapes/mean": 0.5, "train/kl": None}, step)
        tracker.finish()
    kinds = [kind for kind, _ in wandb.calls]
    assert kinds == ["init", "log", "finish"] * 2
    first, second = (arguments for kind, arguments in wandb.calls if kind == "init")
    assert first["id"] == second["id"]
    assert first["resume"] == "allow"
    assert wandb.calls[1] == ("log", {"reward/shapes/mean": 0.5, "iteration": 4})
    sys.modules.pop("wandb")


@pytest.mark.usefixtures("wandb_stand_in")
def test_wandb_gets_clips_as_mp4_files(run: Path) -> None:
    import wandb

    tracker = open_tracker(TrackingConfig(backend="wandb"), run, "demo", {})
    tracker.log_clips("clips", [run / "0.mp4"], 3)
    [(_, row)] = [call for call in wandb.calls if call[0] == "log"]
    assert row["iteration"] == 3
    assert [(clip.path, clip.format) for clip in row["clips"]] == [(str(run / "0.mp4"), "mp4")]
    sys.modules.pop("wandb")


@pytest.mark.usefixtures("wandb_stand_in")
def test_a_tracker_that_cannot_open_leaves_the_run_alone(run: Path) -> None:
    with pytest.warns(RuntimeWarning, match="no route"):
        tracker = open_tracker(TrackingConfig(backend="wandb", project="unreachable"), run, "demo", {})
    tracker.log({"a": 1.0}, 0)
    sys.modules.pop("wandb")


def test_tensorboard_hides_what_an_interrupted_run_wrote_beyond_its_checkpoint(run: Path) -> None:
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    for first, last, value in ((0, 4, 1.0), (2, 5, 2.0)):
        tracker = open_tracker(TrackingConfig(backend="tensorboard"), run, "demo", {"seed": 1}, first_step=first)
        for step in range(first, last):
            tracker.log({"train/loss": value, "train/kl": None}, step)
        tracker.log_images("samples", [run / "0.png"], last)
        tracker.log_clips("clips", [run / "0.mp4"], last)
        tracker.finish()
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(0, 1), (1, 1), (2, 2), (3, 2), (4, 2)]
    assert events.Tags()["images"] == ["samples/0"]
    told = events.Tensors("clips/0/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "plays no clips" in told
    assert "0.mp4" in told
