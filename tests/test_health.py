"""What an iteration says of itself."""

from __future__ import annotations

import torch

from dancegrpo.algorithms import Advantage
from dancegrpo.health import Clock, restart_peak, reward_metrics
from dancegrpo.rewards import Scores


def test_a_nested_phase_is_not_counted_twice(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("dancegrpo.health.time.perf_counter", lambda: now[0])
    clock = Clock(torch.device("cpu"))
    with clock("rollout"):
        now[0] += 1.0
        for _ in range(2):
            with clock("decode"):
                now[0] += 0.25
        now[0] += 2.0
    assert clock.metrics() == {"seconds/rollout": 3.0, "seconds/decode": 0.5, "seconds/total": 3.5}


def test_the_peak_is_counted_anew_on_cuda_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    restart_peak(torch.device("cpu"))
    assert asked == []
    restart_peak(torch.device("cuda", 1))
    assert asked == [torch.device("cuda", 1)]


def test_a_judges_normalised_scores_leave_out_what_another_judge_failed_on():
    known, half = torch.ones(4, dtype=torch.bool), torch.tensor([True, True, False, False])
    scores = {"a": Scores(torch.arange(4.0), known), "b": Scores(torch.arange(4.0), half)}
    advantage = Advantage(
        value=torch.tensor([-1.0, 1.0, 0.0, 0.0]),
        weight=half.float(),
        valid=half,
        per_judge={"a": torch.tensor([-0.5, 1.5, 0.0, 0.0])},
        silent=torch.zeros(1, dtype=torch.bool),
    )
    metrics = reward_metrics(scores, advantage, torch.zeros(4, dtype=torch.int64))
    assert metrics["reward/a/normalized_mean"] == 0.5
    assert metrics["samples/masked"] == 2
