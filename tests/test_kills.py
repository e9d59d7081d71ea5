"""Runs that are killed again and again end as the one that never was: twenty times alone, and one rank of two."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

TIMED = ("seconds/", "memory/")
ITERATIONS = 60
pytestmark = pytest.mark.slow


@pytest.fixture
def recipe(tiny_flux_path: Path, tmp_path: Path) -> Path:
    (tmp_path / "train.txt").write_text("".join(f"a drawing of {n} dots\n" for n in range(7)))
    (tmp_path / "held.txt").write_text("one dot\ntwo dots\nthree dots\n")
    settings = {
        "name": "tiny",
        "iterations": ITERATIONS,
        "threads": 1,
        "model": {"path": str(tiny_flux_path), "height": 32, "width": 32, "max_sequence_length": 16},
        "prompts": {"train": str(tmp_path / "train.txt"), "evaluation": str(tmp_path / "held.txt"), "per_iteration": 2},
        "rollout": {"group_size": 4, "num_steps": 4, "noise_level": 0.7, "shift": 1.5, "batch_size": 4},
        "rewards": {"bright": {"judge": "test_trainer:brightness"}},
        "optimizer": {"learning_rate": 1e-3},
        "update": {"updates_per_rollout": 2},
        "ema": {"decay": 0.9},
        "evaluation": {"num_prompts": 3, "samples": 2, "every": 9},
        "checkpoint": {"every": 2, "keep": 2},
        "tracking": {"backend": "none"},
        "output": str(tmp_path / "runs"),
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(settings))
    return file


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def run(recipe: Path, out: Path, kills: int) -> dict[str, int]:
    worker = str(Path(__file__).parent / "kill_worker.py")
    command = [sys.executable, worker, str(recipe), str(out), str(kills), "7"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told.pop("status") == 0, done.stderr[-3000:]
    return told


def metrics(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(TIMED)} for row in rows]


def test_twenty_kills_change_nothing(recipe: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments, and inside of saves: metrics, weights, optimizer and averages to the last bit."""
    run(recipe, tmp_path / "whole", kills=0)
    told = run(recipe, tmp_path / "killed", kills=20)
    assert told["kills"] == 20
    assert told["inside_a_save"] >= 3
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert [row["iteration"] for row in metrics(killed)] == list(range(ITERATIONS))
    assert metrics(whole) == metrics(killed)
    kept = [sorted(path.name for path in (out / "checkpoints").iterdir()) for out in (whole, killed)]
    assert kept[0] == kept[1]
    for checkpoint in kept[0]:
        hashes = [
            json.loads((out / "checkpoints" / checkpoint / "manifest.json").read_text()) for out in (whole, killed)
        ]
        assert hashes[0]["sha256"] == hashes[1]["sha256"]
    for measured in (whole / "evaluations").iterdir():
        rows = [json.loads((out / "evaluations" / measured.name).read_text()) for out in (whole, killed)]
        assert rows[0]["columns"] == rows[1]["columns"]


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks in Linux' /proc")
@pytest.mark.parametrize("fsdp", [1, 2])
def test_one_of_two_ranks_is_killed_and_one_process_goes_on(recipe: Path, tmp_path: Path, fsdp: int) -> None:
    short = json.loads(recipe.read_text()) | {"iterations": 10, "parallel": {"fsdp": fsdp, "timeout": 60}}
    recipe.write_text(json.dumps(short))
    killed = tmp_path / "killed"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command = [*launcher, "-m", "dancegrpo", "train", str(recipe), "--out", str(killed)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while not (killed / "checkpoints" / "000004").is_dir():
            assert process.poll() is None, process.stderr.read().decode()[-3000:]
            time.sleep(0.01)
        time.sleep(random.Random(fsdp).uniform(0, 0.5))
        os.kill(children(process.pid)[1], signal.SIGKILL)
        process.communicate(timeout=300)
        assert process.returncode != 0
    assert len(metrics(killed)) < 10
    one = recipe.with_name("one.yaml")
    one.write_text(json.dumps(short | {"parallel": {}}))
    resume = [sys.executable, "-m", "dancegrpo", "train", "--resume", str(killed), "parallel.fsdp=1"]
    done = subprocess.run(resume, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    run(one, tmp_path / "whole", kills=0)
    rows = metrics(tmp_path / "whole"), metrics(killed)
    assert [row["iteration"] for row in rows[1]] == list(range(10))
    rewards = [[row["reward/bright/mean"] for row in each] for each in rows]
    assert rewards[1] == pytest.approx(rewards[0], rel=1e-3)
    weights = [load_file(out / "checkpoints/000010/weights.safetensors") for out in (tmp_path / "whole", killed)]
    norm = sum(float(w.double().square().sum()) for w in weights[0].values()) ** 0.5
    gap = sum(float((w - weights[1][n]).double().square().sum()) for n, w in weights[0].items()) ** 0.5
    assert gap <= 0.01 * rows[0][-1]["train/weight_change"] * norm
