"""DiffusionNFT: the closed form, its gradient at the sampling policy, and how that policy follows."""

import pytest
import torch

from dancegrpo.algorithms.forward import forward_noise
from dancegrpo.sampling import rollout
from dancegrpo.sde import FlowDynamics
from dancegrpo.update import Updater
from toy import WORDS, Bright, items, nudge, toy_learning, toy_setup


def noised(policy, learning, trajectory, sample, slot):
    """x_t, step, condition of every item, and (a, b) with x0 predicted = a x_t - b prediction."""
    noise = forward_noise(policy, sample, slot, seed=0, iteration=0)
    step, x0 = learning.step[sample, slot], trajectory.x0[sample]
    condition = trajectory.condition[trajectory.group[sample]]
    if isinstance(policy.dynamics, FlowDynamics):
        sigma = policy.dynamics.sigmas[step][:, None]
        return (1 - sigma) * x0 + sigma * noise, step, condition, torch.ones_like(sigma), sigma
    alpha_bar = policy.dynamics.alpha_bar[step][:, None]
    signal, rest = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    return signal * x0 + rest * noise, step, condition, 1 / signal, rest / signal


@pytest.mark.parametrize("family", ["flow", "diffusion"])
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_the_loss_is_the_closed_form(family, beta):
    policy, algorithm = toy_setup(family, "nft", f"algorithm.nft.beta={beta}", "advantage.clamp=2")
    (trajectory, _), learning = toy_learning(algorithm, policy)
    nudge(policy, 0.1)
    sample, slot = items(12, 4)
    x_t, step, condition, a, b = noised(policy, learning, trajectory, sample, slot)
    v = policy.predict(x_t, step, condition)
    with torch.no_grad(), policy.use_weights(algorithm.old):
        v_old = policy.predict(x_t, step, condition)
    r = (learning.advantage.value[sample] / 2).clamp(-1, 1) / 2 + 0.5
    x0, expected = trajectory.x0[sample], 0.0
    for weight, side in ((r, beta * v + (1 - beta) * v_old), (1 - r, (1 + beta) * v_old - beta * v)):
        difference = a * x_t - b * side - x0
        own = difference.detach().abs().mean(1)
        expected = expected + weight * difference.square().mean(1) / own / beta
    found = learning.loss(sample, slot)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = list(policy.trainable().values())
    for one, other in zip(
        torch.autograd.grad(found.mean(), weights), torch.autograd.grad(expected.mean(), weights), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["flow", "diffusion"])
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_at_the_sampling_policy_the_gradient_weighs_towards_and_away_by_2r_minus_1(family, beta):
    """There both sides predict the same x0', so with x0' = a x_t - b v the derivative of the loss by v is
    (2r - 1) * 2 (x0' - x0) * (-b) / (S mean|x0' - x0|), whatever beta: a pull at r = 1, a push at r = 0."""
    policy, algorithm = toy_setup(family, "nft", f"algorithm.nft.beta={beta}")
    (trajectory, _), learning = toy_learning(algorithm, policy)
    sample, slot = items(12, 4)
    x_t, step, condition, a, b = noised(policy, learning, trajectory, sample, slot)
    v = policy.predict(x_t, step, condition)
    difference = (a * x_t - b * v - trajectory.x0[sample]).detach()
    r = (learning.advantage.value[sample] / 5).clamp(-1, 1)[:, None] / 2 + 0.5
    by_v = (2 * r - 1) * 2 * difference * -b / (4 * difference.abs().mean(1, keepdim=True))
    weights = list(policy.trainable().values())
    expected = torch.autograd.grad((v * by_v).sum(), weights)
    found = torch.autograd.grad(learning.loss(sample, slot).sum(), weights)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert max(float(gradient.abs().max()) for gradient in expected) > 0.1


def test_the_sampling_policy_is_a_moving_average_by_rollout():
    policy, algorithm = toy_setup("flow", "nft", "algorithm.nft.old_decay=0.8")
    updater = Updater(policy, algorithm.config)
    expected = {name: p.detach().clone() for name, p in policy.trainable().items()}
    for iteration in range(4):
        if iteration:
            expected = {n: 0.8 * held + 0.2 * policy.trainable()[n].detach() for n, held in expected.items()}
        _, learning = toy_learning(algorithm, policy, iteration)
        for name, weight in expected.items():
            torch.testing.assert_close(algorithm.old[name], weight)
        updater.update(learning)


def test_samples_come_from_the_sampling_policy():
    policy, algorithm = toy_setup("flow", "nft", "algorithm.nft.old_decay=0.8")
    toy_learning(algorithm, policy)
    nudge(policy, 0.5)
    (trajectory, _), _ = toy_learning(algorithm, policy, 1)
    settings = {"seed": 0, "iteration": 1, "keep": "x0"}
    condition, config = policy.encode(WORDS), algorithm.config.rollout
    with policy.use_weights(algorithm.old):
        assert torch.equal(rollout(policy, condition, config, **settings).x0, trajectory.x0)
    assert not torch.equal(rollout(policy, condition, config, **settings).x0, trajectory.x0)


def test_its_state_is_the_sampling_policy():
    policy, algorithm = toy_setup("flow", "nft")
    toy_learning(algorithm, policy)
    nudge(policy, 0.5)
    _, resumed = toy_setup("flow", "nft")
    resumed.load_state_dict(algorithm.state_dict(), {n: t.clone() for n, t in algorithm.tensors().items()})
    left, right = (toy_learning(each, policy, 1)[0][0].x0 for each in (algorithm, resumed))
    assert torch.equal(left, right)


def test_a_failed_sample_teaches_nothing():
    policy, algorithm = toy_setup("flow", "nft")
    _, learning = toy_learning(algorithm, policy, judge=Bright(blind=(2, 7)))
    (part,) = learning.parts
    assert not {2, 7} & set(part.sample.tolist())
    assert part.total == 10 * 4


def test_a_group_without_signal_holds_to_the_sampling_policy():
    """r = 1/2: no gradient there, and one towards it elsewhere, unlike in GRPO."""

    class Flat(Bright):
        def __call__(self, media, prompts):
            told = super().__call__(media, prompts)
            told.values.fill_(0.5)
            return told

    policy, algorithm = toy_setup("flow", "nft")
    _, learning = toy_learning(algorithm, policy, judge=Flat())
    sample, slot = items(12, 4)
    weights = list(policy.trainable().values())
    at_start = torch.autograd.grad(learning.loss(sample, slot).sum(), weights)
    assert max(float(gradient.abs().max()) for gradient in at_start) < 1e-4
    nudge(policy, 0.3)
    first = learning.loss(sample, slot).sum()
    away = torch.autograd.grad(first, weights)
    assert max(float(gradient.abs().max()) for gradient in away) > 0.1
