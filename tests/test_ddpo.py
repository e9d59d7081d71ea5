"""DDPO: the running baseline against plain Python, the surrogate against torch.distributions."""

import json
import statistics
from collections import deque

import pytest
import torch

from dancegrpo.prompts import Prompt
from dancegrpo.rewards import Scores
from toy import items, normal_log_prob, nudge, toy_learning, toy_setup

IDS = [[4, 9, 4], [9, 2, 7], [4, 4, 9], [2, 9, 4]]
"""Prompts of four rollouts: one twice in a rollout, most of them again later."""


class RunningBaseline:
    """The published per-prompt statistics (a deque for each prompt), number by number."""

    def __init__(self, size: int, least: int, deviation, eps: float) -> None:
        self.size, self.least, self.deviation, self.eps = size, least, deviation, eps
        self.known: dict[int, deque] = {}

    def advantages(self, ids: list[int], rewards: list[float]) -> list[float]:
        for name, reward in zip(ids, rewards, strict=True):
            self.known.setdefault(name, deque(maxlen=self.size)).append(reward)
        told = []
        for name, reward in zip(ids, rewards, strict=True):
            baseline = self.known[name] if len(self.known[name]) >= self.least else rewards
            told.append((reward - statistics.fmean(baseline)) / (self.deviation(baseline) + self.eps))
        return told


def rewards_of(rollout: int, count: int = 12) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(rollout)) + rollout


def advantage(algorithm, rollout: int, rewards=None, valid=None):
    rewards = rewards_of(rollout) if rewards is None else rewards
    valid = torch.ones(12, dtype=torch.bool) if valid is None else valid
    prompts = [Prompt(name, f"word {name}") for name in IDS[rollout]]
    return algorithm.advantage({"bright": Scores(rewards, valid)}, torch.arange(3).repeat_interleave(4), prompts)


@pytest.mark.parametrize(("estimator", "deviation"), [("unbiased", statistics.stdev), ("biased", statistics.pstdev)])
@pytest.mark.parametrize(("size", "least"), [(32, 16), (8, 6), (6, 4), (5, 1)])
def test_each_prompt_has_its_own_running_baseline(size, least, estimator, deviation):
    settings = {"buffer_size": size, "buffer_min": least}
    overrides = [f"algorithm.ddpo={settings}", f"advantage.estimator={estimator}", "advantage.eps=1e-6"]
    _, algorithm = toy_setup("flow", "ddpo", *overrides, "advantage.clamp=null")
    expected = RunningBaseline(size, least, deviation, 1e-6)
    for rollout, ids in enumerate(IDS):
        told = expected.advantages([name for name in ids for _ in range(4)], rewards_of(rollout).tolist())
        found = advantage(algorithm, rollout).value
        torch.testing.assert_close(found, torch.tensor(told), atol=1e-5, rtol=1e-5)


def test_advantages_are_clamped():
    _, algorithm = toy_setup("flow", "ddpo", "advantage.clamp=0.5")
    assert advantage(algorithm, 0).value.abs().max() == 0.5


def test_a_failed_sample_is_neither_remembered_nor_in_the_baseline():
    _, algorithm = toy_setup("flow", "ddpo", "algorithm.ddpo={buffer_size: 8, buffer_min: 3}")
    valid = torch.ones(12, dtype=torch.bool)
    valid[[0, 5]] = False
    rewards = rewards_of(0).where(valid, torch.nan)
    found = advantage(algorithm, 0, rewards, valid)
    assert found.weight.tolist() == valid.float().tolist()
    assert found.value[[0, 5]].tolist() == [0.0, 0.0]
    assert sorted(map(len, algorithm.state_dict()["rewards"]["bright"].values())) == [3, 7]
    nine = rewards[[4, 6, 7]].double()
    expected = (nine - nine.mean()) / nine.std()
    torch.testing.assert_close(found.value[[4, 6, 7]].double(), expected, atol=1e-5, rtol=1e-5)


def test_equal_rewards_are_exactly_no_signal():
    _, algorithm = toy_setup("flow", "ddpo", "algorithm.ddpo={buffer_size: 7, buffer_min: 3}")
    for rollout in range(3):
        found = advantage(algorithm, rollout, torch.full((12,), 0.1))
        assert found.value.tolist() == [0.0] * 12
        assert found.silent.tolist() == [True] * 3


def test_a_baseline_spread_by_no_more_than_min_spread_is_no_signal():
    settings = ["algorithm.ddpo={buffer_size: 16, buffer_min: 4}", "advantage.min_spread=0.25"]
    rewards = torch.tensor([0.5, 0.75, 0.5, 0.75, 0.5, 0.75, 1.0, 0.5, 0.5, 0.75, 0.5, 0.75])
    found = advantage(toy_setup("flow", "ddpo", *settings)[1], 1, rewards)
    assert found.silent.tolist() == [True, False, True]


def test_what_it_remembers_survives_json():
    _, algorithm = toy_setup("flow", "ddpo", "algorithm.ddpo={buffer_size: 6, buffer_min: 4}")
    for rollout in range(2):
        advantage(algorithm, rollout)
    _, resumed = toy_setup("flow", "ddpo", "algorithm.ddpo={buffer_size: 6, buffer_min: 4}")
    resumed.load_state_dict(json.loads(json.dumps(algorithm.state_dict())), {})
    for rollout in (2, 3):
        assert torch.equal(advantage(resumed, rollout).value, advantage(algorithm, rollout).value)


@pytest.mark.parametrize("family", ["flow", "diffusion"])
def test_the_loss_is_the_clipped_surrogate(family):
    policy, algorithm = toy_setup(family, "ddpo", "algorithm.clip_range=0.01")
    trajectory, learning = toy_learning(algorithm, policy)
    nudge(policy, 0.01)
    learning.after_step(moved=True)
    sample, slot = items(12, trajectory.step.shape[1])
    ratio = (normal_log_prob(policy, trajectory, sample, slot) - trajectory.log_prob[sample, slot]).exp()
    outside = (ratio - 1).abs() > 0.01
    assert outside.any()
    assert not outside.all()
    a = learning.advantage.value[sample]
    expected = torch.maximum(-a * ratio, -a * ratio.clamp(0.99, 1.01))
    torch.testing.assert_close(learning.loss(sample, slot), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("updates", [1, 2])
def test_a_prompt_with_one_sample_is_trained_on_the_whole_rollouts_baseline(updates):
    alone = ["rollout.group_size=1", "prompts.per_iteration=4", f"update.updates_per_rollout={updates}"]
    policy, algorithm = toy_setup("flow", "ddpo", *alone)
    prompts = [Prompt(i, "word" * (i + 1)) for i in range(4)]
    _, learning = toy_learning(algorithm, policy, prompts=prompts)
    assert learning.advantage.weight.tolist() == [1.0] * 4
    assert (learning.advantage.value != 0).all()
    assert [len(part.sample.unique()) for part in learning.parts] == [4 // updates] * updates


def test_a_text_that_comes_again_under_another_id_is_one_prompt():
    algorithm = toy_setup("flow", "ddpo", "algorithm.ddpo={buffer_size: 8, buffer_min: 4}")[1]
    group, valid = torch.arange(4), torch.ones(4, dtype=torch.bool)
    for rollout in range(2):
        prompts = [Prompt(10 * rollout + i, "a red circle" if i < 2 else f"word {rollout} {i}") for i in range(4)]
        rewards = torch.tensor([0.2, 0.4, 5.0, 9.0]) + rollout
        found = algorithm.advantage({"bright": Scores(rewards, valid)}, group, prompts)
    own = torch.tensor([0.2, 0.4, 1.2, 1.4], dtype=torch.float64)
    expected = (torch.tensor([1.2, 1.4], dtype=torch.float64) - own.mean()) / own.std()
    torch.testing.assert_close(found.value[:2].double(), expected, atol=1e-5, rtol=1e-5)
