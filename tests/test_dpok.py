"""DPOK: the loss against torch.distributions, the anchor, the value network and its state."""

import json

import pytest
import torch

from dancegrpo.algorithms.dpok import _features
from dancegrpo.policies import Condition
from dancegrpo.rewards import Scores
from dancegrpo.update import Updater
from toy import Bright, gradients, items, normal_log_prob, nudge, toy_config, toy_learning, toy_setup

DPOK = "algorithm.dpok={reward_weight: 3.0, anchor_weight: 0.2}"


class Constant(Bright):
    """Gives every picture the same."""

    def __call__(self, media, prompts):
        return Scores(torch.full((len(media),), 3.0), super().__call__(media, prompts).valid)


def error_to_start(policy, trajectory, sample, slot):
    x_t, step = trajectory.x_t[sample, slot], trajectory.step[sample, slot]
    condition = trajectory.condition[trajectory.group[sample]]
    with torch.no_grad(), policy.reference():
        start = policy.predict(x_t, step, condition)
    return (policy.predict(x_t, step, condition) - start).pow(2).mean(1)


@pytest.mark.parametrize("family", ["flow", "diffusion"])
def test_the_loss_is_the_weighted_clamped_ratio_and_the_anchor(family):
    policy, algorithm = toy_setup(family, "dpok", DPOK, "algorithm.clip_range=0.01")
    trajectory, learning = toy_learning(algorithm, policy)
    nudge(policy, 0.01)
    learning.after_step(moved=True)
    sample, slot = items(12, trajectory.step.shape[1])
    x_t, step = trajectory.x_t[sample, slot], trajectory.step[sample, slot]
    with torch.no_grad():
        value = algorithm.value(x_t, step, trajectory.condition[trajectory.group[sample]])
    reward = policy.decode(trajectory.x0, trajectory.condition).flatten(1).mean(1)[sample]
    ratio = (normal_log_prob(policy, trajectory, sample, slot) - trajectory.log_prob[sample, slot]).exp()
    outside = (ratio - 1).abs() > 0.01
    assert outside.any()
    assert not outside.all()
    expected = -3.0 * (reward - value) * ratio.clamp(0.99, 1.01)
    expected = expected + 0.2 * error_to_start(policy, trajectory, sample, slot)
    torch.testing.assert_close(learning.loss(sample, slot), expected, atol=1e-5, rtol=1e-5)


def test_the_anchor_is_nothing_at_the_start():
    policy, algorithm = toy_setup("flow", "dpok", DPOK)
    _, free_algorithm = toy_setup("flow", "dpok", "algorithm.dpok={reward_weight: 3.0, anchor_weight: 0.0}")
    (_, anchored), (_, free) = (toy_learning(each, policy) for each in (algorithm, free_algorithm))
    a, b = gradients(policy, anchored), gradients(policy, free)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert anchored.metrics()["train/anchor_distance"] == 0.0


def test_the_anchors_gradient_is_that_of_the_mean_square():
    policy, _ = toy_setup("flow", "dpok", DPOK)
    trajectory, _ = toy_learning(toy_setup("flow", "dpok", DPOK)[1], policy)
    found = []
    for weight in (0.0, 100.0):
        _, algorithm = toy_setup("flow", "dpok", f"algorithm.dpok={{anchor_weight: {weight}}}")
        _, learning = toy_learning(algorithm, policy)
        with torch.no_grad():
            held = [p.clone() for p in policy.trainable().values()]
        nudge(policy, 0.05)
        learning.after_step(moved=True)
        found.append(gradients(policy, learning))
        sample, slot = items(12, trajectory.step.shape[1])
        distance = error_to_start(policy, trajectory, sample, slot).mean()
        expected = torch.autograd.grad(distance, list(policy.trainable().values()))
        with torch.no_grad():
            for parameter, before in zip(policy.trainable().values(), held, strict=True):
                parameter.copy_(before)
    for name, gradient in zip(found[0], expected, strict=True):
        torch.testing.assert_close((found[1][name] - found[0][name]) / 100, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("blind", [(), (0, 1, 4, 5, 8, 9)])
def test_the_value_network_learns_a_constant_reward_from_the_samples_that_have_one(blind):
    fast = "algorithm.dpok={value_steps: 50, value_learning_rate: 0.001}"
    policy, algorithm = toy_setup("diffusion", "dpok", fast)
    for iteration in range(8):
        trajectory, _ = toy_learning(algorithm, policy, iteration, Constant(blind))
    sample, slot = items(12, trajectory.step.shape[1])
    condition = trajectory.condition[trajectory.group[sample]]
    with torch.no_grad():
        value = algorithm.value(trajectory.x_t[sample, slot], trajectory.step[sample, slot], condition)
    known = ~torch.isin(sample, torch.tensor(blind, dtype=torch.int64))
    torch.testing.assert_close(value[known], torch.full_like(value[known], 3.0), atol=0.15, rtol=0)
    assert (value > 2).all()  # had a failed sample taught the value, it would be near 0


def test_the_value_network_sees_state_step_and_condition():
    policy, algorithm = toy_setup("flow", "dpok")
    trajectory, _ = toy_learning(algorithm, policy)
    x_t, step = trajectory.x_t[:1, 0], trajectory.step[:1, 0]

    def value(x, k, group):
        with torch.no_grad():
            return float(algorithm.value(x, k, trajectory.condition[[group]]))

    here = value(x_t, step, 0)
    assert value(x_t, step, 0) == here
    assert len({here, value(x_t + 0.5, step, 0), value(x_t, step + 1, 0), value(x_t, step, 1)}) == 4


def test_its_state_is_restored_to_the_last_bit():
    policy, algorithm = toy_setup("flow", "dpok")
    for iteration in range(2):
        toy_learning(algorithm, policy, iteration)
    _, resumed = toy_setup("flow", "dpok")
    tensors = {name: tensor.clone() for name, tensor in algorithm.tensors().items()}
    resumed.load_state_dict(json.loads(json.dumps(algorithm.state_dict())), tensors)
    assert resumed.tensors().keys() == tensors.keys()
    for each in (algorithm, resumed):
        toy_learning(each, policy, 2)
    left, right = algorithm.tensors(), resumed.tensors()
    assert any(name.startswith("exp_avg_sq") for name in left)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    _, elsewhere = toy_setup("flow", "dpok")
    elsewhere.load_state_dict({"rollouts": 7}, tensors)  # other draws than those that come next
    toy_learning(elsewhere, policy, 2)
    assert not torch.equal(left["weights.layers.0.weight"], elsewhere.tensors()["weights.layers.0.weight"])


def test_a_failed_sample_teaches_neither_the_policy_nor_the_value():
    policy, algorithm = toy_setup("flow", "dpok")
    _, learning = toy_learning(algorithm, policy, judge=Bright(blind=(2, 7)))
    (part,) = learning.parts
    assert sorted(part.sample.unique().tolist()) == [0, 1, 3, 4, 5, 6, 8, 9, 10, 11]
    assert part.total == 10 * 4
    assert all(tensor.isfinite().all() for tensor in algorithm.tensors().values())


def test_the_first_ratio_is_exactly_one():
    policy, algorithm = toy_setup("diffusion", "dpok", "update.updates_per_rollout=2")
    config = toy_config("dpok", "update.updates_per_rollout=2")
    metrics = Updater(policy, config).update(toy_learning(algorithm, policy)[1])
    assert metrics["train/ratio_first"] == 1.0
    assert metrics["train/ratio_max_deviation"] > 0
    assert metrics["train/updates"] == 2


def test_padding_does_not_change_what_a_condition_says():
    text = torch.randn(2, 3, 5)
    padded = torch.cat([text, torch.zeros(2, 4, 5)], dim=1)
    torch.testing.assert_close(_features(Condition({"t": padded})), text.mean(1))


def test_a_condition_of_latents_is_pooled_to_its_channels():
    image = torch.randn(2, 4, 3, 6, 6)
    torch.testing.assert_close(_features(Condition({"image": image})), image.mean((2, 3, 4)))
