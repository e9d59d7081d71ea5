"""Noise schedules and the Gaussian transitions of stochastic samplers: pure tensor math.

A sampler that adds noise at every step is a policy whose action is the next latent: `x_next ~ N(mean, std^2)`.
Each `*_step` function gives that Gaussian for one published discretisation; a `Dynamics` binds one of them to a
schedule, so that rollout and update ask the same object the same question.

Conventions: B rows, S the latent shape. Every coefficient is a (B,) tensor, one value per row: rows may sit at
different steps and noise levels, and a noise level of 0 makes its row a deterministic ODE step. Flow: sigma in
[0, 1], 1 = noise. Diffusion: alpha_bar in (0, 1], 1 = data. Half-precision inputs are computed in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Self, assert_never

import torch
from torch import Tensor

Reduction = Literal["mean", "sum"]
FlowSDE = Literal["dance", "flow-grpo", "cps"]
DiffusionSDE = Literal["ddim", "paper"]


def _full(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is float64 already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rows(coefficient: Tensor, like: Tensor) -> Tensor:
    """(B,) or (B, 1, ...) -> (B, 1, ..., 1), to broadcast against `like` (B, *S)."""
    return coefficient.reshape(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True, eq=False)
class Gaussian:
    """B independent isotropic Gaussians over a latent: the distribution of the next latent of one sampler step.

    mean: (B, *S), float32. std: one value per row, (B,) or (B, 1, ...); 0 = a deterministic step.
    """

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, (B, *S); noise: (B, *S) standard normal. Rows with std 0 return their mean."""
        std = _rows(self.std, self.mean)
        return torch.where(std == 0, self.mean, self.mean + std * _full(noise))

    def log_prob(self, x: Tensor, *, reduction: Reduction = "mean") -> Tensor:
        """Log density of x (B, *S) -> (B,), averaged (or summed) over all non-batch axes.

        The mean is the published scale: a clip range of 1e-4 only makes sense on it. x is an action already taken:
        detach it, or its gradient cancels the policy's.

        Raises ValueError if any row has std 0: a deterministic step has no density.
        """
        std = self._positive_std()
        squares = ((_full(x) - self.mean) / _rows(std, self.mean)).square().flatten(1)
        log_prob = -0.5 * squares.mean(1) - std.log() - 0.5 * math.log(2 * math.pi)
        return log_prob * squares.shape[1] if reduction == "sum" else log_prob

    def kl(self, other: Gaussian, *, reduction: Reduction = "mean") -> Tensor:
        """KL(self || other) -> (B,), for two Gaussians of equal std: mean((mean - mean_other)^2) / (2 std^2).

        Raises ValueError if any row has std 0.
        """
        std = self._positive_std()
        squares = ((self.mean - other.mean) / _rows(std, self.mean)).square().flatten(1)
        return 0.5 * (squares.sum(1) if reduction == "sum" else squares.mean(1))

    def _positive_std(self) -> Tensor:
        std = self.std.reshape(-1)
        if not bool((std > 0).all()):
            rows = (~(std > 0)).nonzero().flatten().tolist()
            raise ValueError(f"std is not positive in rows {rows}: a deterministic step has no density; leave it out.")
        return std


# --- Rectified flow: x_t = (1 - sigma) x0 + sigma x1, velocity = x1 - x0 --------------------------------------------


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Time shift `s*sigma / (1 + (s-1)*sigma)` (arXiv:2403.03206, eq. 23): s > 1 spends more steps at high noise."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def flow_sigmas(num_steps: int, shift: float = 1.0) -> Tensor:
    """The shifted schedule from 1 (noise) to 0 (data): (num_steps + 1,) float32, strictly decreasing."""
    # Rounded to float32 before the shift, as diffusers' flow scheduler does: the two agree to the last bit.
    return shift_sigmas(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).float(), shift)


def flow_x0(x_t: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The data a velocity points at: x_t - sigma * velocity, (B, *S). sigma: (B,)."""
    x_t = _full(x_t)
    return x_t - _rows(sigma, x_t) * _full(velocity)


def flow_x1(x_t: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The noise a velocity comes from: x_t + (1 - sigma) * velocity, (B, *S). The score is -x1 / sigma."""
    x_t = _full(x_t)
    return x_t + (1 - _rows(sigma, x_t)) * _full(velocity)


def dance_step(x_t: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, eta: Tensor) -> Gaussian:
    """One Euler-Maruyama step of dz = (u - eta^2/2 score) dt + eta dw: rectified flow's reverse SDE (arXiv:2505.07818).

    x_t, velocity: (B, *S). sigma in (0, 1], 1 = noise; sigma_next < sigma; eta >= 0, unitless: all (B,).
    Keeps the flow's marginals to weak order 1. At eta 0 it is the ODE's Euler step, bit for bit.
    """
    x_t, velocity = _full(x_t), _full(velocity)
    delta = sigma_next - sigma
    score = -flow_x1(x_t, velocity, sigma) / _rows(sigma, x_t)
    mean = x_t + _rows(delta, x_t) * velocity - _rows(0.5 * eta.square() * delta, x_t) * score
    return Gaussian(mean, eta * (-delta).sqrt())


def flow_sde_step(
    x_t: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, noise_level: Tensor, sigma_1: Tensor
) -> Gaussian:
    """One step of Flow-GRPO's SDE (arXiv:2505.05470): `dance_step` with eta = noise_level * sqrt(sigma / (1 - sigma)).

    sigma_1: (B,) or scalar, the schedule's second sigma; it stands in for sigma = 1 in that denominator.
    """
    denominator = 1 - torch.where(sigma == 1, sigma_1, sigma)
    return dance_step(x_t, velocity, sigma, sigma_next, noise_level * (sigma / denominator).sqrt())


def cps_step(x_t: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, noise_level: Tensor) -> Gaussian:
    """One coefficients-preserving step: fresh noise replaces part of the predicted x1 (Flow-CPS, arXiv:2509.05952).

    std = sigma_next sin(a pi/2), mean = (1 - sigma_next) x0 + sqrt(sigma_next^2 - std^2) x1, a = noise_level in [0, 1].
    Exact for exact x0 and x1; through a learned (mean) velocity its marginals carry an O(a^2) bias at any step count.
    """
    x_t, velocity = _full(x_t), _full(velocity)
    angle = noise_level * (math.pi / 2)
    x0, x1 = flow_x0(x_t, velocity, sigma), flow_x1(x_t, velocity, sigma)
    # sigma_next cos(angle) is that square root, without its cancellation near a = 1.
    mean = (1 - _rows(sigma_next, x_t)) * x0 + _rows(sigma_next * angle.cos(), x_t) * x1
    # At a = 0 the two agree only to rounding: take the ODE's own arithmetic, so that deployment is met bit for bit.
    euler = x_t + _rows(sigma_next - sigma, x_t) * velocity
    return Gaussian(torch.where(_rows(noise_level, x_t) == 0, euler, mean), sigma_next * angle.sin())


# --- Diffusion: x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) epsilon ----------------------------------------------


def diffusion_alpha_bar(alphas_cumprod: Tensor, timesteps: Tensor, final_alpha_bar: float | Tensor) -> Tensor:
    """alpha_bar at every state of a sampler: (T + 1,) float32, the last being the state after the last step.

    alphas_cumprod: the training schedule. timesteps: (T,) int64, decreasing. final_alpha_bar: what follows timestep
    0 or less; Stable Diffusion takes alphas_cumprod[0] rather than 1.
    """
    final = torch.as_tensor(final_alpha_bar, dtype=torch.float32, device=alphas_cumprod.device)
    return torch.cat([alphas_cumprod.float()[timesteps.to(alphas_cumprod.device)], final.reshape(1)])


def diffusion_x0(x_t: Tensor, epsilon: Tensor, alpha_bar: Tensor) -> Tensor:
    """The data a noise prediction implies: (x_t - sqrt(1 - alpha_bar) epsilon) / sqrt(alpha_bar), (B, *S)."""
    x_t, alpha_bar = _full(x_t), _rows(alpha_bar, x_t)
    return (x_t - (1 - alpha_bar).sqrt() * _full(epsilon)) / alpha_bar.sqrt()


def ddim_step(x_t: Tensor, epsilon: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor, eta: Tensor) -> Gaussian:
    """One DDIM step with noise (arXiv:2010.02502, eq. 12 and 16): eta 0 is DDIM, eta 1 ancestral DDPM sampling.

    x_t, epsilon: (B, *S). alpha_bar < alpha_bar_prev, the next and less noisy state's; eta in [0, 1]: all (B,).
    At eta 0 it is diffusers' `DDIMScheduler.step`, bit for bit: the order of operations is that one's.
    """
    x0 = diffusion_x0(x_t, epsilon, alpha_bar)
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
    std = eta * variance.sqrt()
    direction = (1 - alpha_bar_prev - std.square()).clamp(min=0).sqrt()  # rounding alone can take it below 0
    mean = _rows(alpha_bar_prev.sqrt(), x0) * x0 + _rows(direction, x0) * _full(epsilon)
    return Gaussian(mean, std)


def diffusion_sde_step(
    x_t: Tensor, epsilon: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor, noise_level: Tensor
) -> Gaussian:
    """One step of dz = (f z - (1 + e^2)/2 g^2 score) dt + e g dw (arXiv:2505.07818), e = noise_level >= 0.

    e = 0 is the probability-flow ODE, e = 1 the reverse SDE. With y = z / sqrt(alpha_bar) and
    s = sqrt((1 - alpha_bar) / alpha_bar) the drift f vanishes and the step reads
    y' = y + (1 + e^2) (s' - s) epsilon + e sqrt(s^2 - s'^2) noise: at e = 0 exactly DDIM, bit for bit.
    """
    ode = ddim_step(x_t, epsilon, alpha_bar, alpha_bar_prev, torch.zeros_like(noise_level))
    scale = alpha_bar_prev.sqrt()
    s = ((1 - alpha_bar) / alpha_bar).sqrt()
    s_prev = ((1 - alpha_bar_prev) / alpha_bar_prev).sqrt()
    drift = noise_level.square() * (s_prev - s) * scale
    std = noise_level * (s.square() - s_prev.square()).sqrt() * scale
    return Gaussian(ode.mean + _rows(drift, ode.mean) * _full(epsilon), std)


# --- Dynamics: a step function bound to a schedule ------------------------------------------------------------------


def _require(rule: bool, message: str) -> None:
    if not rule:
        raise ValueError(message)


@dataclass(frozen=True, eq=False)
class FlowDynamics:
    """A rectified flow's sampler: the model predicts velocity.

    sigmas: (T + 1,) float32 after the time shift, strictly decreasing from at most 1. Raises ValueError otherwise.
    """

    sigmas: Tensor
    sde: FlowSDE = "dance"

    def __post_init__(self) -> None:
        _require(self.sigmas.ndim == 1 and len(self.sigmas) >= 2, "sigmas must be (T + 1,) with at least one step.")
        _require(bool((self.sigmas.diff() < 0).all()), f"sigmas {self.sigmas.tolist()} must strictly decrease.")
        _require(bool((self.sigmas >= 0).all() and self.sigmas[0] <= 1), "sigmas must lie in [0, 1].")

    @property
    def num_steps(self) -> int:
        """T, the number of transitions."""
        return len(self.sigmas) - 1

    @property
    def last_step_trainable(self) -> bool:
        """False: the last step is decoded as its x0 prediction, so its noise never reaches the reward."""
        return False

    @property
    def trainable_steps(self) -> range:
        """The steps GRPO may train: all but the last."""
        return range(self.num_steps - 1)

    def transition(self, x_t: Tensor, prediction: Tensor, step: Tensor, noise_level: Tensor) -> Gaussian:
        """The next latent's distribution. x_t, velocity: (B, *S); step: (B,) int64; noise_level: (B,), 0 = ODE."""
        sigma, sigma_next = self.sigmas[step], self.sigmas[step + 1]
        match self.sde:
            case "dance":
                return dance_step(x_t, prediction, sigma, sigma_next, noise_level)
            case "flow-grpo":
                return flow_sde_step(x_t, prediction, sigma, sigma_next, noise_level, self.sigmas[1])
            case "cps":
                return cps_step(x_t, prediction, sigma, sigma_next, noise_level)
            case _:
                assert_never(self.sde)

    def x0(self, x_t: Tensor, prediction: Tensor, step: Tensor) -> Tensor:
        """The data predicted at `step` (B,) int64: (B, *S)."""
        return flow_x0(x_t, prediction, self.sigmas[step])

    def noised(self, x0: Tensor, noise: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """The forward process at `step` (B,) int64: x_t = (1 - sigma) x0 + sigma noise, and its velocity, (B, *S)."""
        sigma = _rows(self.sigmas[step], x0)
        return (1 - sigma) * x0 + sigma * noise, noise - x0

    def to(self, device: torch.device | str) -> Self:
        """The same dynamics with its schedule on `device`."""
        return replace(self, sigmas=self.sigmas.to(device))


@dataclass(frozen=True, eq=False)
class DiffusionDynamics:
    """A diffusion model's sampler: the model predicts epsilon.

    timesteps: (T,) int64, what the network is told at each step. alpha_bar: (T + 1,) float32, [k] at step k's state
    and [k + 1] after it, strictly increasing in (0, 1] (see `diffusion_alpha_bar`). Raises ValueError otherwise.
    """

    timesteps: Tensor
    alpha_bar: Tensor
    sde: DiffusionSDE = "ddim"

    def __post_init__(self) -> None:
        shape = tuple(self.alpha_bar.shape)
        _require(shape == (len(self.timesteps) + 1,), f"alpha_bar {shape} must have one entry more than timesteps.")
        _require(
            bool((self.alpha_bar.diff() > 0).all()), "alpha_bar must strictly increase: noise falls with every step."
        )
        _require(bool(self.alpha_bar[0] > 0 and self.alpha_bar[-1] <= 1), "alpha_bar must lie in (0, 1].")

    @property
    def num_steps(self) -> int:
        """T, the number of transitions."""
        return len(self.timesteps)

    @property
    def last_step_trainable(self) -> bool:
        """Whether the last step has a density that reaches the reward: the final latent is decoded, noise and all."""
        return bool(self.alpha_bar[-1] < 1)

    @property
    def trainable_steps(self) -> range:
        """The steps GRPO may train: all but the last."""
        return range(self.num_steps - 1)

    def transition(self, x_t: Tensor, prediction: Tensor, step: Tensor, noise_level: Tensor) -> Gaussian:
        """The next latent's distribution. x_t, epsilon: (B, *S); step: (B,) int64; noise_level: (B,), 0 = ODE."""
        alpha_bar, alpha_bar_prev = self.alpha_bar[step], self.alpha_bar[step + 1]
        match self.sde:
            case "ddim":
                return ddim_step(x_t, prediction, alpha_bar, alpha_bar_prev, noise_level)
            case "paper":
                return diffusion_sde_step(x_t, prediction, alpha_bar, alpha_bar_prev, noise_level)
            case _:
                assert_never(self.sde)

    def x0(self, x_t: Tensor, prediction: Tensor, step: Tensor) -> Tensor:
        """The data predicted at `step` (B,) int64: (B, *S)."""
        return diffusion_x0(x_t, prediction, self.alpha_bar[step])

    def noised(self, x0: Tensor, noise: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """The forward process at `step` (B,) int64: x_t = sqrt(abar) x0 + sqrt(1 - abar) noise, and noise, (B, *S)."""
        alpha_bar = _rows(self.alpha_bar[step], x0)
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise, noise

    def to(self, device: torch.device | str) -> Self:
        """The same dynamics with its schedule on `device`."""
        return replace(self, timesteps=self.timesteps.to(device), alpha_bar=self.alpha_bar.to(device))


Dynamics = FlowDynamics | DiffusionDynamics
