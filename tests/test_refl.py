"""ReFL: its gradient against finite differences of the whole composed function, and what it refuses."""

import pytest
import torch

from dancegrpo.algorithms import ReFL, build_algorithm
from dancegrpo.errors import ConfigError
from dancegrpo.rewards import FunctionReward, Judges, Scores
from dancegrpo.sde import DiffusionDynamics, FlowDynamics
from dancegrpo.update import Updater
from toy import Bright, gradients, items, toy_config, toy_learning, toy_setup


class Exact(Bright):
    """As `Bright`, with an offset."""

    def __init__(self, offset: float = 0.0, blind: tuple[int, ...] = ()) -> None:
        super().__init__(blind)
        self.offset = offset

    def __call__(self, media, prompts):
        told = super().__call__(media, prompts)
        return Scores(told.values + self.offset, told.valid)


def refl(judge=None, *overrides: str) -> ReFL:
    return build_algorithm(toy_config("refl", *overrides), Judges({"bright": judge or Bright()}))


def composed(policy, batch, weights: list[torch.Tensor], margin: float, scale: float) -> torch.Tensor:
    """The mean loss of a batch, from the weights to the reward, written out in float64."""
    w1, b1, w2, b2 = weights
    flow = isinstance(policy.dynamics, FlowDynamics)
    level = (policy.dynamics.sigmas if flow else policy.dynamics.alpha_bar)[batch.step].double()[:, None]
    x_t, word = batch.x_t.double(), batch.condition.tensors["word"].double()[batch.group]
    prediction = (torch.cat([x_t, level, word], 1) @ w1.T + b1).tanh() @ w2.T + b2
    x0 = x_t - level * prediction if flow else (x_t - (1 - level).sqrt() * prediction) / level.sqrt()
    return (scale * (margin - x0.sigmoid().mean(1)).clamp(min=0)).mean()


@pytest.mark.parametrize("family", ["flow", "diffusion"])
def test_its_gradient_is_that_of_finite_differences(family):
    """In float64 but for the scores, which the panel of judges rounds to float32: 1e-6 of their size."""
    policy = toy_setup(family, "refl")[0]
    batch, learning = toy_learning(refl(None, "algorithm.refl={margin: 0.7, loss_scale: 0.5}"), policy)
    policy.module.double()
    told = policy.dynamics
    policy.dynamics = (
        FlowDynamics(told.sigmas.double())
        if family == "flow"
        else DiffusionDynamics(told.timesteps, told.alpha_bar.double())
    )
    found = gradients(policy, learning)
    weights = [p.detach().clone() for p in policy.trainable().values()]
    for index, (name, weight) in enumerate(policy.trainable().items()):
        expected = torch.zeros_like(weight)
        for place in range(weight.numel()):
            change = torch.zeros_like(weight).flatten()
            change[place] = 1e-5
            ends = []
            for sign in (1, -1):
                moved = list(weights)
                moved[index] = weights[index] + sign * change.reshape(weight.shape)
                ends.append(composed(policy, batch, moved, 0.7, 0.5))
            expected.view(-1)[place] = (ends[0] - ends[1]) / 2e-5
        assert expected.abs().max() > 0
        torch.testing.assert_close(found[name], expected.detach(), atol=1e-8, rtol=1e-5)


def test_above_the_margin_nothing_is_learnt():
    policy = toy_setup("flow", "refl")[0]
    _, learning = toy_learning(refl(Exact(10.0)), policy)
    assert all((gradient == 0).all() for gradient in gradients(policy, learning).values())


def test_below_the_margin_the_loss_falls_by_the_scale_with_each_point():
    policy = toy_setup("flow", "refl")[0]
    sample, slot = items(12, 1)
    (_, low), (_, high) = (toy_learning(refl(Exact(offset)), policy) for offset in (-1.0, 0.0))
    losses = low.loss(sample, slot) - high.loss(sample, slot)
    torch.testing.assert_close(losses, torch.full((12,), 1e-3), atol=1e-8, rtol=1e-4)


def test_a_failed_sample_adds_nothing():
    policy = toy_setup("flow", "refl")[0]
    all_of_them = "update.micro_batch_size=12"
    _, whole = toy_learning(refl(None, all_of_them), policy)
    _, failed = toy_learning(refl(Bright(blind=(3, 8)), all_of_them), policy)
    sample, slot = items(12, 1)
    kept = torch.tensor([index not in (3, 8) for index in range(12)])
    expected = torch.autograd.grad(whole.loss(sample, slot)[kept].sum() / 12, list(policy.trainable().values()))
    for found, gradient in zip(gradients(policy, failed, micro_batch_size=12).values(), expected, strict=True):
        torch.testing.assert_close(found, gradient, atol=1e-9, rtol=1e-5)
    assert failed.loss(sample, slot)[~kept].tolist() == [0.0, 0.0]


def test_scores_come_back_in_the_order_of_the_samples_whatever_the_micro_batch():
    policy = toy_setup("flow", "refl")[0]
    batch, learning = toy_learning(refl(None, "update.updates_per_rollout=2"), policy)
    config = toy_config(
        "refl", "update.updates_per_rollout=2", "update.micro_batch_size=5", "optimizer.learning_rate=1e-12"
    )
    metrics = Updater(policy, config).update(learning)
    condition = batch.condition[batch.group]
    with torch.no_grad():
        x0 = policy.dynamics.x0(batch.x_t, policy.predict(batch.x_t, batch.step, condition), batch.step)
        expected = policy.decode(x0, condition).flatten(1).mean(1)
    torch.testing.assert_close(learning.scores["bright"].values, expected, atol=1e-5, rtol=0)
    assert metrics["train/updates"] == 2


def test_the_step_with_gradient_is_one_of_the_last():
    policy = toy_setup("flow", "refl")[0]
    algorithm = refl(None, "algorithm.refl.window=0.5", "rollout.group_size=40")
    batch, _ = toy_learning(algorithm, policy)
    assert set(batch.step.tolist()) == {3, 4, 5}


def test_judges_of_weight_zero_are_asked_without_teaching():
    config = toy_config("refl", "rewards.held={judge: 'python:held', weight: 0}")
    blunt = FunctionReward(lambda images, prompts: images.amax((1, 2, 3)), "held")
    algorithm = build_algorithm(config, Judges({"bright": Bright(), "held": blunt}, {"bright": 1.0, "held": 0.0}))
    policy = toy_setup("flow", "refl")[0]
    _, learning = toy_learning(algorithm, policy)
    _, alone = toy_learning(refl(), policy)
    found, expected = gradients(policy, learning), gradients(policy, alone)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    learning.metrics()
    assert (learning.scores["held"].values > learning.scores["bright"].values).all()


def test_weights_of_judges_weigh_their_scores():
    config = toy_config("refl", "rewards.more={judge: 'python:more', weight: 3}")
    both = Judges({"bright": Bright(), "more": Bright()}, {"bright": 1.0, "more": 3.0})
    policy = toy_setup("flow", "refl")[0]
    _, learning = toy_learning(build_algorithm(config, both), policy)
    _, alone = toy_learning(refl(), policy)
    sample, slot = items(12, 1)
    reward = (2e-3 - alone.loss(sample, slot)) / 1e-3
    torch.testing.assert_close(learning.loss(sample, slot), 1e-3 * (2 - 4 * reward).relu(), atol=1e-8, rtol=1e-3)


def test_a_judge_without_a_gradient_is_refused_by_name():
    blunt = FunctionReward(lambda images, prompts: images.mean((1, 2, 3)), "bright")
    with pytest.raises(
        ConfigError, match=r"^algorithm\.name=refl .* no gradient flows from bright \(python:bright\)"
    ) as told:
        build_algorithm(toy_config("refl"), Judges({"bright": blunt}))
    assert "\n" not in str(told.value)


def test_a_batch_that_the_judge_failed_on_altogether_adds_nothing():
    policy, algorithm = toy_setup("flow", "refl")
    algorithm.judges.rewards["bright"] = FailsOnce()
    _, learning = toy_learning(algorithm, policy)
    for sample, slot in zip(*(each.split(4) for each in items(12, 1)), strict=True):
        learning.loss(sample, slot).sum().backward()
    first = [p.grad.clone() for p in policy.trainable().values()]
    assert all(torch.isfinite(gradient).all() for gradient in first)
    learning.metrics()
    assert learning.scores["bright"].valid.tolist() == [False] * 4 + [True] * 8


class FailsOnce(Bright):
    """Raises at its first batch."""

    asked = 0

    def __call__(self, media, prompts):
        self.asked += 1
        if self.asked == 1:
            raise RuntimeError("out of order")
        return super().__call__(media, prompts)
