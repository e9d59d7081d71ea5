"""The alarms and the looks of a run in its report, and on the live display."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dancegrpo.progress import health
from dancegrpo.report.curves import health_charts
from dancegrpo.report.findings import findings
from dancegrpo.report.folder import read_run
from fake_run import FakeRun

Row = dict[str, Any]


def written(root: Path, change: Callable[[Row], Row]) -> Path:
    """A fake run's folder with its metrics changed."""
    folder = FakeRun(evaluations=(), pictures=()).write(root)
    file = folder / "metrics.jsonl"
    rows = [change(json.loads(line)) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def spiking(row: Row) -> Row:
    return {**row, "train/grad_norm": 1e3} if row["iteration"] == 40 else row


def told(folder: Path) -> list[tuple[str, str]]:
    return [(found.level, found.title) for found in findings(read_run(folder), None)]


def test_an_alarm_stands_in_the_findings_with_its_iteration(tmp_path):
    assert ("alarm", "Spike at iteration 40") in told(written(tmp_path, spiking))


def test_a_run_that_was_not_to_be_watched_has_no_alarms(tmp_path):
    folder = written(tmp_path, spiking)
    file = folder / "config.yaml"
    file.write_text(file.read_text().replace("watch: rollback", "watch: none"))
    assert not any(title.startswith("Spike") for _, title in told(folder))


def test_a_rollback_is_told(tmp_path):
    folder = written(tmp_path, lambda row: {**row, "health/rollbacks": 2, "health/rate": 0.25})
    text = next(found.text for found in findings(read_run(folder), None) if "earlier state" in found.title)
    assert text == "2 times, and went on with 0.25 of the learning rate that was asked for."


def test_image_statistics_are_drawn_with_their_spread(tmp_path):
    looks = {"image/grid": 0.1, "image/grid/std": 0.3, "image/diversity": 0.2, "image/blank": 0.0}
    charts = {chart.title: chart for chart in health_charts(read_run(written(tmp_path, lambda row: row | looks)))}
    (series,) = charts["Lattice patterns"].series
    assert (series.values[0], series.low[0], series.high[0]) == (0.1, 0.0, 0.4)
    assert "Diversity within groups" in charts
    assert "Blank pictures" not in charts


def test_the_display_counts_alarms_and_rollbacks_where_there_are_some():
    assert health({"health/alarms": 2, "health/rollbacks": 1}) == {"alarms": "2", "rollbacks": "1"}
    assert health({"health/alarms": 0, "health/rollbacks": 0}) == {}
