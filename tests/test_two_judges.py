"""The shipped pipeline with two judges, one of them a service that is killed and started again during the run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from dancegrpo import load_config, train

SERVE = [sys.executable, "-m", "dancegrpo.cli", "serve-reward", "shapes", "options.mode=graded"]


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def service(port):
    """Starts the service, and again after a `kill`; whatever runs at the end is stopped."""
    started: list[subprocess.Popen] = []

    def start() -> subprocess.Popen:
        process = subprocess.Popen(
            [*SERVE, "--port", str(port)], stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        started.append(process)
        assert process.stdout.readline().strip() == f"http://127.0.0.1:{port}"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.slow
def test_a_run_outlives_its_service(service, port, tmp_path):
    first = service()
    config = load_config(
        "shapes-flux",
        [
            "iterations=8",
            "threads=1",
            "prompts.per_iteration=4",
            "rollout.group_size=8",
            "evaluation.num_prompts=24",
            "evaluation.samples=4",
            "tracking.backend=none",
            f"output={tmp_path}",
            "rewards.graded.judge=service",
            f"rewards.graded.options={{urls: ['http://127.0.0.1:{port}'], batch_size: 8, retries: 12, backoff: 0.25}}",
        ],
    )
    metrics_file = tmp_path / "shapes-flux-seed0" / "metrics.jsonl"
    restarted = threading.Event()

    def disturb() -> None:
        while not metrics_file.is_file() or len(metrics_file.read_text().splitlines()) < 3:
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
        first.wait()
        time.sleep(1.0)
        service()
        restarted.set()

    disturber = threading.Thread(target=disturb, daemon=True)
    disturber.start()
    result = train(config)
    disturber.join(timeout=60)
    assert restarted.is_set()
    rows = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    assert result.iterations == len(rows) == 8
    # Retries bridge the outage: every sample of every iteration has both scores.
    assert [row["reward/graded/masked"] for row in rows] == [0] * 8
    assert all(0 <= row["reward/graded/mean"] <= 1 for row in rows)
    assert all(row["reward/graded/mean"] >= row["reward/shapes/mean"] for row in rows)  # a pass is full credit
    report = result.report.read_text()
    assert "graded" in report
    assert "shapes" in report
