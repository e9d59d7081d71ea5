"""The clipped objective against published numbers, and its properties."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dancegrpo.objectives import (
    approx_kl,
    clipped_surrogate,
    dpo_loss,
    guarded_log_ratio,
    is_clipped,
    mean_square,
    nft_loss,
    optimality,
    ratio,
    refl_loss,
    reward_weighted,
)

GOLDEN = Path(__file__).parent / "golden"
finite = st.floats(-5, 5, width=32, allow_subnormal=False)
log_ratio = st.floats(-1, 1, width=32, allow_subnormal=False)
unhurried = settings(deadline=None, max_examples=50)


def test_loss_matches_the_published_implementation():
    golden = load_file(GOLDEN / "grpo_loss.safetensors")
    loss = clipped_surrogate(
        golden["new_log_prob"],
        golden["old_log_prob"],
        golden["advantages"].flatten().clamp(-5, 5),
        golden["clip_range"].item(),
    )
    torch.testing.assert_close(loss, golden["loss_per_sample"], atol=1e-6, rtol=0)


@unhurried
@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=8))
def test_at_ratio_one_the_loss_is_minus_a_and_its_gradient_minus_a_dlogp(samples: list[tuple[float, float]]):
    advantage, value = torch.tensor(samples).T
    log_prob = value.clone().requires_grad_()
    loss = clipped_surrogate(log_prob, log_prob.detach(), advantage, 1e-4)
    loss.sum().backward()
    assert torch.equal(loss.detach(), -advantage)
    assert torch.equal(log_prob.grad, -advantage)


@unhurried
@given(finite, log_ratio)
def test_the_clip_only_ever_raises_the_loss_and_bounds_the_gain(advantage: float, change: float):
    """A pessimistic bound: never below -A ratio, and no better than the best -A r within the clip range."""
    a, log_prob, clip = torch.tensor([advantage]), torch.tensor([change]), 0.2
    loss = clipped_surrogate(log_prob, torch.zeros(1), a, clip)
    best_allowed = min(-advantage * (1 - clip), -advantage * (1 + clip))
    assert loss >= -a * log_prob.exp() - 1e-6
    assert loss >= best_allowed - 1e-5


@unhurried
@given(finite.filter(lambda a: abs(a) > 1e-3), log_ratio.filter(lambda x: abs(abs(x) - 0.2) > 0.05))
def test_the_gradient_stops_only_beyond_the_clip_in_the_wanted_direction(advantage: float, change: float):
    log_prob = torch.tensor([change], requires_grad=True)
    clipped_surrogate(log_prob, torch.zeros(1), torch.tensor([advantage]), 0.2).sum().backward()
    r = torch.tensor(change).exp().item()
    stopped = (advantage > 0 and r > 1.2) or (advantage < 0 and r < 0.8)
    assert log_prob.grad.item() == pytest.approx(0.0 if stopped else -advantage * r, rel=1e-5)


def test_a_zero_advantage_has_no_gradient():
    log_prob = torch.tensor([0.0, 0.3, -0.3], requires_grad=True)
    clipped_surrogate(log_prob, torch.zeros(3), torch.zeros(3), 1e-4).sum().backward()
    assert log_prob.grad.tolist() == [0.0, 0.0, 0.0]


def test_ratio_of_equal_log_probs_is_exactly_one():
    log_prob = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert (ratio(log_prob, log_prob.clone()) == 1).all()


def test_a_row_is_clipped_outside_the_trust_interval():
    old, new = torch.zeros(4), torch.tensor([0.0, 5e-5, 2e-4, -2e-4])
    assert is_clipped(new, old, 1e-4).tolist() == [False, False, True, True]


def test_approx_kl_estimates_the_kl_of_two_normals():
    """KL(N(0,1) || N(m,1)) = m^2 / 2, from samples of the old one."""
    m = 0.3
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    old, new = -0.5 * x.square(), -0.5 * (x - m).square()
    estimate = approx_kl(new, old)
    assert (estimate >= 0).all()
    assert estimate.mean().item() == pytest.approx(m**2 / 2, abs=5 * estimate.std().item() / len(x) ** 0.5)


@unhurried
@given(finite.filter(lambda a: abs(a) > 1e-3), log_ratio.filter(lambda x: abs(abs(x) - 0.2) > 0.05))
def test_dpoks_gradient_stops_beyond_the_clip_on_either_side(advantage: float, change: float):
    """No pessimistic maximum: where the ratio left in the unwanted direction, GRPO's loss still pulls it back."""
    log_prob = torch.tensor([change], requires_grad=True)
    loss = reward_weighted(log_prob, torch.zeros(1), torch.tensor([advantage]), 3.0, 0.2)
    loss.sum().backward()
    r = torch.tensor(change).exp().item()
    inside = 0.8 < r < 1.2
    assert loss.item() == pytest.approx(-3 * advantage * min(max(r, 0.8), 1.2), rel=1e-5)
    assert log_prob.grad.item() == pytest.approx(-3 * advantage * r if inside else 0.0, rel=1e-5)


@pytest.mark.parametrize(("advantage", "change"), [(1.0, -0.5), (-1.0, 0.5)])
def test_dpok_and_grpo_differ_where_the_ratio_left_in_the_unwanted_direction(advantage: float, change: float):
    log_prob, a = torch.tensor([change]), torch.tensor([advantage])
    dpok, grpo = (
        reward_weighted(log_prob, torch.zeros(1), a, 1.0, 0.2),
        clipped_surrogate(log_prob, torch.zeros(1), a, 0.2),
    )
    assert grpo.item() == pytest.approx(-advantage * torch.tensor(change).exp().item())
    assert dpok.item() == pytest.approx(-advantage * (1.2 if change > 0 else 0.8))


def test_the_guards_log_ratio_is_its_formula():
    """((x - m_old)^2 - (x - m)^2 + (m - m_old)^2) / (2 s^2) * s = (m - m_old)(x - m_old) / s: linear in the noise."""
    x, m, m_old, s = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    s = s.abs() + 0.1
    normal = torch.distributions.Normal
    change = normal(m, s).log_prob(x) - normal(m_old, s).log_prob(x)
    found = guarded_log_ratio(change, (m - m_old).square() / (2 * s.square()), s)
    torch.testing.assert_close(found, (m - m_old) * (x - m_old) / s)


@unhurried
@given(finite, finite, finite, finite, st.floats(0.01, 50))
def test_dpo_is_minus_the_log_of_the_preferences_probability(w: float, lo: float, w0: float, lo0: float, beta: float):
    """By the odds of Bradley and Terry, on rewards -beta/2 (e - e_start)."""
    errors = [torch.tensor([value], dtype=torch.float64) for value in (w, lo, w0, lo0)]
    odds = torch.tensor([-beta / 2 * (w - w0), -beta / 2 * (lo - lo0)], dtype=torch.float64).log_softmax(0)
    torch.testing.assert_close(dpo_loss(*errors, beta), -odds[:1], atol=1e-9, rtol=1e-9)


def test_dpo_at_the_start_is_log_two_and_pulls_the_winners_error_down():
    winner, loser = torch.tensor([0.7], requires_grad=True), torch.tensor([0.4], requires_grad=True)
    loss = dpo_loss(winner, loser, winner.detach(), loser.detach(), 10.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert winner.grad.item() == pytest.approx(10 / 4)
    assert loser.grad.item() == pytest.approx(-10 / 4)


def test_mean_square_leaves_one_number_per_row():
    x = torch.arange(12.0).reshape(2, 3, 2)
    torch.testing.assert_close(mean_square(x), torch.tensor([55 / 6, 451 / 6]))


def test_refl_pays_up_to_its_margin():
    reward = torch.tensor([-1.0, 1.5, 2.0, 7.0], requires_grad=True)
    loss = refl_loss(reward, 2.0, 0.1)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([0.3, 0.05, 0.0, 0.0]))
    torch.testing.assert_close(reward.grad, torch.tensor([-0.1, -0.1, 0.0, 0.0]))


def test_optimality_is_linear_between_its_bounds():
    assert optimality(torch.tensor([-9.0, -5.0, 0.0, 2.5, 5.0, 9.0]), 5.0).tolist() == [0.0, 0.0, 0.5, 0.75, 1.0, 1.0]


def test_nft_weighs_each_sides_square_by_its_own_error_without_gradient():
    x0, r = torch.zeros(1, 2), torch.tensor([0.75])
    positive, negative = torch.tensor([[1.0, 3.0]], requires_grad=True), torch.tensor([[2.0, 0.0]], requires_grad=True)
    loss = nft_loss(positive, negative, x0, r, 0.5)
    loss.sum().backward()
    assert loss.item() == pytest.approx((0.75 * 5 / 2 + 0.25 * 2 / 1) / 0.5)
    torch.testing.assert_close(positive.grad, 0.75 * torch.tensor([[1.0, 3.0]]) / 2 / 0.5)
    torch.testing.assert_close(negative.grad, 0.25 * torch.tensor([[2.0, 0.0]]) / 1 / 0.5)
