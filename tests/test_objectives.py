"""The clipped objective against published numbers, and its properties."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dancegrpo.objectives import approx_kl, clipped_surrogate, is_clipped, ratio

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
