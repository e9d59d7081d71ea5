"""GRPO-Guard: the regulated ratio against torch.distributions, centred on fresh noise, on rectified flow alone."""

import pytest
import torch

from dancegrpo.errors import ConfigError
from dancegrpo.run_plan import RunPlan
from dancegrpo.update import Updater
from toy import gradients, items, normal_log_prob, nudge, toy_config, toy_learning, toy_setup

GUARD = "algorithm.guard=true"


def means(policy, trajectory, sample, slot):
    x_t, step = trajectory.x_t[sample, slot], trajectory.step[sample, slot]
    prediction = policy.predict(x_t, step, trajectory.condition[trajectory.group[sample]])
    return policy.dynamics.transition(x_t, prediction, step, trajectory.noise_level[sample, slot]).mean


def spread(policy, trajectory, sample, slot):
    """(std, |d sigma|) of each pair: std = eta sqrt(-d)."""
    step = trajectory.step[sample, slot]
    delta = policy.dynamics.sigmas[step] - policy.dynamics.sigmas[step + 1]
    return trajectory.noise_level[sample, slot] * delta.sqrt(), delta


def test_the_loss_is_the_surrogate_of_the_guarded_ratio_over_the_step():
    policy, algorithm = toy_setup("flow", "grpo", GUARD, "algorithm.clip_range=0.002")
    trajectory, learning = toy_learning(algorithm, policy)
    sample, slot = items(12, trajectory.step.shape[1])
    old_mean = means(policy, trajectory, sample, slot).detach()
    old = normal_log_prob(policy, trajectory, sample, slot).detach()
    nudge(policy, 0.01)
    learning.after_step(moved=True)
    std, delta = spread(policy, trajectory, sample, slot)
    shift = (means(policy, trajectory, sample, slot) - old_mean).square().mean(1) / (2 * std.square())
    ratio = ((normal_log_prob(policy, trajectory, sample, slot) - old + shift) * std).exp()
    outside = (ratio - 1).abs() > 0.002
    assert outside.any()
    assert not outside.all()
    a = learning.advantage.value[sample]
    expected = torch.maximum(-a * ratio, -a * ratio.clamp(0.998, 1.002)) / delta
    torch.testing.assert_close(learning.loss(sample, slot), expected, atol=1e-4, rtol=1e-5)


def test_on_policy_its_gradient_is_grpos_times_std_over_the_step():
    policy, algorithm = toy_setup("flow", "grpo", GUARD)
    trajectory, learning = toy_learning(algorithm, policy)
    sample, slot = learning.parts[0].sample, learning.parts[0].slot
    std, delta = spread(policy, trajectory, sample, slot)
    a = learning.advantage.value[sample]
    surrogate = (-a * std / delta * normal_log_prob(policy, trajectory, sample, slot)).mean()
    expected = torch.autograd.grad(surrogate, list(policy.trainable().values()))
    for found, gradient in zip(gradients(policy, learning).values(), expected, strict=True):
        torch.testing.assert_close(found, gradient, atol=1e-5, rtol=1e-4)


def test_its_log_ratio_is_centred_where_the_plain_one_is_not():
    """Over fresh noise around a mean that was moved; 1200 trajectories of 5 steps, martingale differences."""
    policy, algorithm = toy_setup("flow", "grpo", GUARD, "rollout.group_size=400", "rollout.timesteps.fraction=1.0")
    trajectory, learning = toy_learning(algorithm, policy)
    nudge(policy, 0.1)
    learning.after_step(moved=True)
    sample, slot = items(1200, 5)
    with torch.no_grad():
        learning.loss(sample, slot)
        plain = (normal_log_prob(policy, trajectory, sample, slot) - trajectory.log_prob[sample, slot]).double()
        std, _ = spread(policy, trajectory, sample, slot)
    guarded = torch.cat(learning._told["ratio"]).double().log()

    def errors(values):
        return float(values.mean() / (values.std() / len(values) ** 0.5))

    assert abs(errors(guarded)) < 3
    assert errors(plain * std) < -10


def test_the_second_update_is_held_to_the_rollouts_means():
    policy, algorithm = toy_setup("flow", "grpo", GUARD, "update.updates_per_rollout=2", "algorithm.clip_range=0.01")
    trajectory, learning = toy_learning(algorithm, policy)
    sample, slot = items(12, trajectory.step.shape[1])
    sampled = means(policy, trajectory, sample, slot).detach()
    torch.testing.assert_close(trajectory.mean[sample, slot], sampled, atol=1e-6, rtol=1e-6)
    metrics = Updater(policy, algorithm.config).update(learning)
    assert metrics["train/ratio_first"] == 1.0
    assert metrics["train/updates"] == 2
    std, _ = spread(policy, trajectory, sample, slot)
    with torch.no_grad():
        moved = (means(policy, trajectory, sample, slot) - sampled).square().mean(1) / (2 * std.square())
        change = normal_log_prob(policy, trajectory, sample, slot) - trajectory.log_prob[sample, slot]
        learning._told.clear()
        learning.loss(sample, slot)
    torch.testing.assert_close(learning._told["ratio"][0], ((change + moved) * std).exp(), atol=1e-5, rtol=0)


def test_means_are_kept_only_for_the_guard():
    policy, algorithm = toy_setup("flow", "grpo")
    assert toy_learning(algorithm, policy)[0].mean is None


def test_diffusion_is_refused_before_anything_is_drawn():
    policy, algorithm = toy_setup("diffusion", "grpo", GUARD)
    with pytest.raises(ConfigError, match=r"^algorithm\.guard=true is for rectified flow, toy is a diffusion model"):
        RunPlan(toy_config("grpo", GUARD), policy, algorithm).derived()
