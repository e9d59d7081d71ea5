"""Whether a sampler with noise still samples the model: marginals of laws whose velocity and score are known exactly.

Sampling, on a mixture of Gaussians in the plane, shows that the marginals are kept. The order of convergence is
measured without sampling: for Gaussian data every step is affine in x, so its moments propagate in closed form.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dancegrpo.sde import DiffusionDynamics, FlowDynamics

WEIGHTS = torch.tensor([0.3, 0.5, 0.2])
MEANS = torch.tensor([[1.5, 0.0], [-1.0, 0.8], [0.0, -1.6]])
COVARIANCES = torch.tensor([[[0.20, 0.10], [0.10, 0.15]], [[0.10, -0.05], [-0.05, 0.30]], [[0.25, 0.0], [0.0, 0.05]]])

Dynamics = FlowDynamics | DiffusionDynamics
STOCHASTIC = [("dance", 0.7), ("flow-grpo", 0.7), ("ddim", 1.0), ("paper", 0.6), ("paper", 1.0)]
KEEPING = [("dance", 0.0), ("ddim", 0.0), *STOCHASTIC]


def dynamics_over(sigmas: Tensor, sde: str) -> Dynamics:
    """`sde` from sigmas[0] to sigmas[-1], sigma being the standard deviation of the noise in x for both families."""
    if sde in ("dance", "flow-grpo", "cps"):
        return FlowDynamics(sigmas, sde)
    return DiffusionDynamics(torch.arange(len(sigmas) - 1), 1 - sigmas.square(), sde)


def signal(dynamics: Dynamics, sigma: Tensor) -> Tensor:
    """a(sigma) of x = a x0 + sigma x1."""
    return 1 - sigma if isinstance(dynamics, FlowDynamics) else (1 - sigma.square()).sqrt()


def exact_prediction(dynamics: Dynamics, x: Tensor, x0: Tensor, a: Tensor, sigma: Tensor) -> Tensor:
    """The network's ideal output given E[x0 | x]: velocity E[x1 - x0 | x] or epsilon E[x1 | x]."""
    x1 = (x - a * x0) / sigma
    return x1 - x0 if isinstance(dynamics, FlowDynamics) else x1


# --- a mixture, by sampling ------------------------------------------------------------------------------------------


def draw_mixture(count: int, generator: torch.Generator) -> Tensor:
    component = torch.multinomial(WEIGHTS, count, replacement=True, generator=generator)
    noise = torch.randn(count, 2, generator=generator)
    factors = torch.linalg.cholesky(COVARIANCES)[component]
    return MEANS[component] + (factors @ noise[:, :, None])[:, :, 0]


def mixture_x0(x: Tensor, a: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | a x0 + sigma x1 = x] for the mixture: each component's regression, weighted by its posterior."""
    noisy = a**2 * COVARIANCES + sigma**2 * torch.eye(2)
    residual = x - a * MEANS[:, None]  # (K, N, 2)
    whitened = residual @ torch.linalg.inv(noisy)
    normaliser = WEIGHTS.log() - 0.5 * torch.logdet(noisy)
    log_density = normaliser[:, None] - 0.5 * (residual * whitened).sum(-1)
    regression = MEANS[:, None] + a * whitened @ COVARIANCES
    return (log_density.softmax(0)[:, :, None] * regression).sum(0)


def mixture_moments(a: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    mean = WEIGHTS @ MEANS
    centred = MEANS - mean
    covariance = (WEIGHTS[:, None, None] * (COVARIANCES + centred[:, :, None] * centred[:, None, :])).sum(0)
    return a * mean, a**2 * covariance + sigma**2 * torch.eye(2)


def worst_z(x: Tensor, mean: Tensor, covariance: Tensor) -> float:
    """The largest deviation of the sample's mean and covariance from the true ones, in standard errors."""
    centred = x - mean
    products = (centred[:, :, None] * centred[:, None, :]).flatten(1)
    statistics = torch.cat([centred, products - covariance.flatten()], dim=1).double()
    return (statistics.mean(0) / (statistics.std(0) / len(x) ** 0.5)).abs().max().item()


def simulate(sde: str, noise_level: float, num_steps: int, count: int) -> list[float]:
    """Sample from sigma 0.95 to 0.05; the worst z at every sixth of the way."""
    generator = torch.Generator().manual_seed(0)
    sigmas = torch.linspace(0.95, 0.05, num_steps + 1)
    dynamics = dynamics_over(sigmas, sde)
    level, a = torch.full((count,), noise_level), signal(dynamics, sigmas)
    x = a[0] * draw_mixture(count, generator) + sigmas[0] * torch.randn(count, 2, generator=generator)
    deviations = []
    for k in range(num_steps):
        prediction = exact_prediction(dynamics, x, mixture_x0(x, a[k], sigmas[k]), a[k], sigmas[k])
        transition = dynamics.transition(x, prediction, torch.full((count,), k), level)
        x = transition.sample(torch.randn(count, 2, generator=generator))
        if (k + 1) % (num_steps // 6) == 0:
            deviations.append(worst_z(x, *mixture_moments(a[k + 1], sigmas[k + 1])))
    return deviations


@pytest.mark.parametrize(("sde", "noise_level"), STOCHASTIC)
def test_sampling_keeps_the_mixture_s_marginals(sde: str, noise_level: float):
    """30 statistics (5 moments at 6 sigmas) within 4 standard errors: chance alone fails one seed in 500."""
    assert max(simulate(sde, noise_level, num_steps=198, count=4_000)) < 4


def test_too_few_steps_leave_the_mixture_s_marginals():
    """The test above can fail: at 6 steps the bias of the first-order scheme stands far outside the sampling error."""
    assert max(simulate("dance", 0.7, num_steps=6, count=4_000)) > 8


# --- a Gaussian, in closed form --------------------------------------------------------------------------------------

DATA_MEAN, DATA_VARIANCE = 1.2, 0.36


def moment_errors(sde: str, noise_level: float, num_steps: int) -> Tensor:
    """Errors (2,) of mean and variance at sigma 0.05, started exactly at 0.95, of the numerical scheme itself."""
    sigmas = torch.linspace(0.95, 0.05, num_steps + 1, dtype=torch.float64)
    dynamics = dynamics_over(sigmas, sde)
    a = signal(dynamics, sigmas)
    true_mean, true_variance = a * DATA_MEAN, a**2 * DATA_VARIANCE + sigmas**2
    mean, variance = true_mean[0], true_variance[0]
    level = torch.full((2,), noise_level, dtype=torch.float64)
    probe = torch.tensor([[0.0], [1.0]], dtype=torch.float64)  # two points fix an affine map
    for k in range(num_steps):
        x0 = DATA_MEAN + a[k] * DATA_VARIANCE / true_variance[k] * (probe - true_mean[k])
        prediction = exact_prediction(dynamics, probe, x0, a[k], sigmas[k])
        transition = dynamics.transition(probe, prediction, torch.full((2,), k), level)
        offset, image = transition.mean[:, 0]
        slope = image - offset
        mean, variance = offset + slope * mean, slope**2 * variance + transition.std[0] ** 2
    return torch.stack([mean - true_mean[-1], variance - true_variance[-1]])


@pytest.mark.parametrize(("sde", "noise_level"), KEEPING)
def test_halving_the_step_halves_the_error_of_the_moments(sde: str, noise_level: float):
    """Weak order 1: the variance converges at first order; the mean of a Gaussian travels exactly."""
    coarse, fine = moment_errors(sde, noise_level, 200), moment_errors(sde, noise_level, 400)
    torch.testing.assert_close(torch.stack([coarse[0], fine[0]]), torch.zeros(2).double(), atol=1e-12, rtol=0)
    assert coarse[1].abs() > 1e-4  # an error worth halving, far from rounding
    assert (coarse[1] / fine[1]).item() == pytest.approx(2, abs=0.06)


def test_the_bias_of_cps_is_quadratic_in_its_noise_and_no_number_of_steps_removes_it():
    """Richardson's extrapolation to infinitely many steps: half the noise leaves a quarter of the bias, not none."""
    biases = [2 * moment_errors("cps", level, 400)[1] - moment_errors("cps", level, 200)[1] for level in (0.1, 0.2)]
    assert biases[0].abs() > 1e-3
    assert (biases[1] / biases[0]).item() == pytest.approx(4, rel=0.05)
