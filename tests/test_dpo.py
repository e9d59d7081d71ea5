"""Diffusion-DPO: the closed form, pairs from groups, and what both sides of a pair share."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dancegrpo.algorithms.dpo import DPO, DPOLearning, Preferences, best_and_worst
from dancegrpo.algorithms.forward import draw_steps, forward_noise
from dancegrpo.rewards import Scores
from dancegrpo.sde import FlowDynamics, flow_sigmas
from dancegrpo.update import Updater
from toy import WORDS, Bright, ToyPolicy, items, nudge, toy_config, toy_learning, toy_setup

BETA = "algorithm.dpo.beta=20"


class Flat(Bright):
    """Finds all pictures of the prompts in `ties` equal."""

    def __init__(self, *ties: int) -> None:
        super().__init__()
        self.ties = ties

    def __call__(self, media, prompts):
        told = super().__call__(media, prompts)
        flat = torch.tensor([prompt.id in self.ties for prompt in prompts])
        return Scores(torch.where(flat, 0.5, told.values), told.valid)


def pair_loss(policy, pairs, pair: int, draw: int, step: int, beta: float) -> torch.Tensor:
    """-log sigmoid(-beta/2 ((e_w - e_l) - (e_w_start - e_l_start))) of one pair at one draw, written out."""
    owner = pairs.group[pair : pair + 1]
    noise = forward_noise(policy, owner, torch.tensor([draw]), seed=0, iteration=0)
    at, condition = torch.tensor([step]), pairs.condition[owner]

    def error(x0):
        if isinstance(policy.dynamics, FlowDynamics):
            sigma = policy.dynamics.sigmas[step]
            x_t, target = (1 - sigma) * x0 + sigma * noise, noise - x0
        else:
            alpha_bar = policy.dynamics.alpha_bar[step]
            x_t, target = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise, noise
        return ((policy.predict(x_t, at, condition) - target) ** 2).mean()

    winner, loser = pairs.winner[pair : pair + 1], pairs.loser[pair : pair + 1]
    now = error(winner) - error(loser)
    with policy.reference():
        start = error(winner) - error(loser)
    return (1 + (beta / 2 * (now - start)).exp()).log()


@pytest.mark.parametrize("family", ["flow", "diffusion"])
def test_the_loss_is_the_closed_form(family):
    policy, algorithm = toy_setup(family, "dpo", BETA)
    _, learning = toy_learning(algorithm, policy)
    nudge(policy, 0.05)
    sample, slot = items(3, 4)
    found = learning.loss(sample, slot)
    steps = learning.step[sample, slot].tolist()
    rows = zip(sample.tolist(), slot.tolist(), steps, strict=True)
    expected = torch.stack([pair_loss(policy, learning.pairs, pair, draw, k, 20.0) for pair, draw, k in rows])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    weights = list(policy.trainable().values())
    for one, other in zip(
        torch.autograd.grad(found.mean(), weights), torch.autograd.grad(expected.mean(), weights), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("family", "beta"), [("flow", 100.0), ("diffusion", 5000.0)])
def test_the_published_strengths_are_the_defaults(family, beta):
    policy, algorithm = toy_setup(family, "dpo")
    assert toy_learning(algorithm, policy)[1].beta == beta


def test_at_the_start_every_pair_costs_the_log_of_two():
    policy, algorithm = toy_setup("flow", "dpo")
    _, learning = toy_learning(algorithm, policy)
    assert torch.equal(learning.loss(*items(3, 4)).detach(), torch.full((12,), math.log(2)))


@pytest.mark.parametrize("family", ["flow", "diffusion"])
def test_a_step_lowers_the_winners_error_against_the_losers(family):
    policy, algorithm = toy_setup(family, "dpo", BETA)
    _, learning = toy_learning(algorithm, policy)
    Updater(policy, toy_config("dpo", "optimizer.learning_rate=1e-4")).update(learning)
    learning._told.clear()
    assert learning.loss(*items(3, 4)).mean() < math.log(2)
    assert learning.metrics()["train/preference_margin"] > 0


def test_pairs_are_the_brightest_and_the_darkest_of_each_group():
    policy, algorithm = toy_setup("flow", "dpo")
    (trajectory, _), learning = toy_learning(algorithm, policy)
    bright = policy.decode(trajectory.x0, trajectory.condition).flatten(1).mean(1).reshape(3, 4)
    x0 = trajectory.x0.reshape(3, 4, 4)
    for group in range(3):
        assert torch.equal(learning.pairs.winner[group], x0[group, bright[group].argmax()])
        assert torch.equal(learning.pairs.loser[group], x0[group, bright[group].argmin()])
    assert learning.advantage.weight.reshape(3, 4).sum(1).tolist() == [2.0] * 3


def test_a_group_of_ties_makes_no_pair():
    policy, algorithm = toy_setup("flow", "dpo")
    _, learning = toy_learning(algorithm, policy, judge=Flat(1))
    assert learning.pairs.group.tolist() == [0, 2]
    assert learning.advantage.silent.tolist() == [False, True, False]


def test_the_draws_of_a_pair_do_not_depend_on_the_others():
    policy, algorithm = toy_setup("flow", "dpo", BETA)
    _, whole = toy_learning(algorithm, policy)
    _, some = toy_learning(algorithm, policy, judge=Flat(1))
    nudge(policy, 0.05)
    found, expected = some.loss(*items(2, 4)), whole.loss(*items(3, 4)).reshape(3, 4)[[0, 2]].flatten()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_only_ties_change_nothing():
    policy, algorithm = toy_setup("flow", "dpo", "update.updates_per_rollout=3")
    _, learning = toy_learning(algorithm, policy, judge=Flat(0, 1, 2))
    before = [p.detach().clone() for p in policy.trainable().values()]
    metrics = Updater(policy, algorithm.config).update(learning)
    assert metrics["train/updates"] == metrics["pairs/trained"] == 0
    assert all(torch.equal(p, held) for p, held in zip(policy.trainable().values(), before, strict=True))


def test_a_failed_sample_is_in_no_pair():
    policy, algorithm = toy_setup("flow", "dpo")
    (trajectory, _), plain = toy_learning(algorithm, policy)
    best = [int((trajectory.x0 == winner).all(1).nonzero()[0]) for winner in plain.pairs.winner]
    _, learning = toy_learning(algorithm, policy, judge=Bright(blind=tuple(best)))
    assert len(learning.pairs.group) == 3
    assert not any((learning.pairs.winner == trajectory.x0[index]).all(1).any() for index in best)


@pytest.mark.parametrize("family", ["flow", "diffusion"])
def test_both_of_a_pair_meet_the_same_noise_at_the_same_step(family):
    """Two equal pictures then have equal errors, whatever the policy: the margin is exactly 0."""
    policy, algorithm = toy_setup(family, "dpo")
    nudge(policy, 0.3)
    x0 = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    learning = DPOLearning(algorithm, policy, Preferences(x0, x0.clone(), torch.arange(3), policy.encode(WORDS), 0))
    assert torch.equal(learning.loss(*items(3, 4)).detach(), torch.full((12,), math.log(2)))
    assert learning.metrics()["train/preference_margin"] == 0


def test_updates_take_disjoint_pairs():
    policy, algorithm = toy_setup("flow", "dpo", "update.updates_per_rollout=3")
    _, learning = toy_learning(algorithm, policy)
    assert [part.sample.unique().tolist() for part in learning.parts] == [[0], [1], [2]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-2, 2), st.booleans()), min_size=1, max_size=24))
def test_best_and_worst_of_each_group(rows):
    group, value, weight = (torch.tensor(column) for column in zip(*rows, strict=True))
    winner, loser = best_and_worst(value.float(), weight.float(), group)
    pairs = {int(group[w]): (w, loser[i]) for i, w in enumerate(winner.tolist())}
    assert len(pairs) == len(winner)
    for name in range(4):
        known = [(v, i) for i, (g, v, kept) in enumerate(rows) if g == name and kept]
        values = [v for v, _ in known]
        if len(set(values)) < 2:
            assert name not in pairs
            continue
        best, worst = (int(index) for index in pairs[name])
        assert best == next(i for v, i in known if v == max(values))
        assert worst == next(i for v, i in known if v == min(values))


def test_diffusion_steps_are_uniform_and_flow_steps_logit_normal():
    many = {"seed": 0, "iteration": 0}
    policy = toy_setup("diffusion", "dpo")[0]
    counts = draw_steps(policy, 3000, 4, **many).flatten().bincount(minlength=6).double()
    assert (counts - 2000).abs().max() < 5 * (12000 * 1 / 6 * 5 / 6) ** 0.5
    policy = ToyPolicy()
    policy.dynamics = FlowDynamics(flow_sigmas(6))
    counts = draw_steps(policy, 3000, 4, **many).flatten().bincount(minlength=6).double()
    # Sigmas 1, 5/6, ..., 1/6: each takes what lies nearer to it than to its neighbours.
    edges = torch.tensor([11.0, 9.0, 7.0, 5.0, 3.0]).double() / 12
    below = torch.distributions.Normal(0.0, 1.0).cdf((edges / (1 - edges)).log())
    share = torch.cat([torch.ones(1), below]) - torch.cat([below, torch.zeros(1)])
    assert ((counts - 12000 * share).abs() < 5 * (12000 * share * (1 - share)).sqrt()).all()


def test_samples_beyond_the_clamp_of_others_are_still_told_apart():
    """Two judges of large weight: under a clamp of 5 the best two would tie."""
    config = toy_config("dpo", "rollout.group_size=4")
    judge = config.rewards["bright"].model_copy(update={"weight": 9.0})
    heavy = config.model_copy(update={"rewards": {"a": judge, "b": judge}})
    values = torch.tensor([0.9, 1.0, 0.1, 0.0])
    scores = {name: Scores(values, torch.ones(4, dtype=torch.bool)) for name in ("a", "b")}
    found = DPO(heavy).advantage(scores, torch.zeros(4, dtype=torch.int64))
    winner, loser = best_and_worst(found.value, found.weight, torch.zeros(4, dtype=torch.int64))
    assert (winner.tolist(), loser.tolist()) == ([1], [3])
