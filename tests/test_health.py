"""What an iteration says of itself."""

from __future__ import annotations

import pytest
import torch

from dancegrpo.algorithms import Advantage
from dancegrpo.config import load_config
from dancegrpo.health import Clock, Looks, log_prob_rounding, restart_peak, reward_metrics
from dancegrpo.health.metrics import correlation, diversity
from dancegrpo.image_statistics import STATISTICS
from dancegrpo.rewards import Scores
from dancegrpo.sde import FlowDynamics, flow_sigmas


def test_a_nested_phase_is_not_counted_twice(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("dancegrpo.health.metrics.time.perf_counter", lambda: now[0])
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


def advantage(value: torch.Tensor, valid: torch.Tensor) -> Advantage:
    return Advantage(value, valid.float(), valid, {}, torch.zeros(1, dtype=torch.bool))


def pictures(count: int = 6) -> torch.Tensor:
    return torch.rand(count, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_image_statistics_are_means_over_samples_however_they_arrive():
    media, group = pictures(), torch.tensor([0, 0, 0, 1, 1, 1])
    whole, parts = Looks(), Looks()
    whole.add(media)
    for part in media.split([1, 3, 2]):
        parts.add(part)
    found = whole.metrics(group)
    assert found == pytest.approx(parts.metrics(group), abs=1e-7)
    for name, statistic in STATISTICS.items():
        column = statistic(media).double()
        assert found[f"image/{name}"] == pytest.approx(float(column.mean()), abs=1e-7)
        assert found[f"image/{name}/std"] == pytest.approx(float(column.std()), abs=1e-7)


def test_bytes_are_measured_as_fractions():
    media, group = (pictures() * 255).round().to(torch.uint8), torch.zeros(6, dtype=torch.int64)
    of_bytes, of_floats = Looks(), Looks()
    of_bytes.add(media)
    of_floats.add(media.float() / 255)
    assert of_bytes.metrics(group) == of_floats.metrics(group)


def test_masked_samples_are_left_out():
    media, group = pictures(), torch.zeros(6, dtype=torch.int64)
    media[4:] = 0.0
    valid = torch.tensor([True, True, True, True, False, False])
    looks = Looks()
    looks.add(media)
    found = looks.metrics(group, advantage(torch.arange(6.0), valid))
    known = Looks()
    known.add(media[:4])
    expected = known.metrics(group[:4], advantage(torch.arange(4.0), valid[:4]))
    assert found["image/blank"] == pytest.approx(2 / 6)
    assert {**found, "image/blank": 0.0} == pytest.approx(expected)


def test_black_and_broken_pictures_are_blank_and_break_nothing():
    media, group = pictures(), torch.zeros(6, dtype=torch.int64)
    media[0] = 0.0
    media[1] = 1.0
    media[2, 0, 0, 3, 3] = torch.nan
    looks = Looks()
    looks.add(media)
    found = looks.metrics(group)
    assert found["image/blank"] == pytest.approx(0.5)
    assert all(value is not None and value == value for value in found.values())


def test_no_samples_have_no_looks():
    assert Looks().metrics(torch.zeros(0, dtype=torch.int64)) == {}


def test_diversity_is_the_mean_distance_over_pairs_then_over_groups():
    grey = torch.tensor([0.0, 0.0, 0.6, 0.2, 1.0])[:, None].expand(5, 192)
    group = torch.tensor([0, 0, 0, 1, 1])
    every = torch.ones(5, dtype=torch.bool)
    assert diversity(grey, group, every) == pytest.approx(((0.0 + 0.6 + 0.6) / 3 + 0.8) / 2)
    assert diversity(grey, group, torch.tensor([True, True, False, True, False])) == 0.0
    assert diversity(grey, torch.arange(5), every) is None


def test_diversity_ignores_what_eight_pixels_do_not_show():
    looks = Looks()
    fine = torch.arange(16) % 2 * 1.0
    stripes = torch.stack([fine, 1 - fine]).view(2, 1, 1, 1, 16).expand(2, 1, 3, 16, 16)
    looks.add(stripes)
    assert looks.metrics(torch.zeros(2, dtype=torch.int64))["image/diversity"] == pytest.approx(0.0, abs=1e-7)


def test_correlation_is_pearsons_within_groups():
    a = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 60.0])
    b = torch.tensor([2.0, 4.0, 6.0, 5.0, 4.0, 0.0])
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    expected = (1.0 + float(torch.corrcoef(torch.stack([a[3:], b[3:]]))[0, 1])) / 2
    assert correlation(a, b, group) == pytest.approx(expected, abs=1e-6)


def test_a_group_in_which_nothing_differs_correlates_with_nothing():
    a, group = torch.arange(6.0), torch.tensor([0, 0, 0, 1, 1, 1])
    assert correlation(a, torch.full((6,), 0.3), group) is None
    assert correlation(a, torch.tensor([1.0, 2.0, 3.0, 4.0, 4.0, 4.0]), group) == pytest.approx(1.0)


@pytest.mark.parametrize("noise", [0.7, 0.007])
def test_a_log_prob_is_known_to_rounding_over_the_least_noise(noise):
    config = load_config("shapes-flux", [f"rollout.noise_level={noise}", "rollout.timesteps.stochastic=all"])
    sigmas = flow_sigmas(6, 1.5)
    std = noise * (sigmas[:2] - sigmas[1:3]).sqrt().min()
    expected = 2.0**-24 / float(std)
    assert log_prob_rounding(config, FlowDynamics(sigmas)) == pytest.approx(expected, rel=1e-5)


def test_algorithms_without_a_ratio_have_no_log_prob_to_round():
    config = load_config("shapes-flux", ["algorithm.name=nft"])
    assert log_prob_rounding(config, FlowDynamics(flow_sigmas(6, 1.5))) is None
