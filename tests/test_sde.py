"""Transitions against published numbers, diffusers' schedulers and torch.distributions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dancegrpo.sde import (
    DiffusionDynamics,
    FlowDynamics,
    Gaussian,
    cps_step,
    dance_step,
    ddim_step,
    diffusion_alpha_bar,
    diffusion_sde_step,
    diffusion_x0,
    flow_sde_step,
    flow_sigmas,
    flow_x0,
    shift_sigmas,
)

GOLDEN = Path(__file__).parent / "golden"
CLOSE = {"atol": 1e-5, "rtol": 0}
SHAPE = (3, 4, 4)
EVERY_SDE = ["dance", "flow-grpo", "cps", "ddim", "paper"]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def stable_diffusion_scheduler(num_steps: int):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(num_steps)
    return scheduler


def flow_scheduler(num_steps: int, shift: float):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps))
    return scheduler


def stable_diffusion_dynamics(num_steps: int, sde: str) -> DiffusionDynamics:
    scheduler = stable_diffusion_scheduler(num_steps)
    alpha_bar = diffusion_alpha_bar(scheduler.alphas_cumprod, scheduler.timesteps, scheduler.final_alpha_cumprod)
    return DiffusionDynamics(scheduler.timesteps, alpha_bar, sde)


def dynamics_of(sde: str, num_steps: int) -> FlowDynamics | DiffusionDynamics:
    if sde in ("ddim", "paper"):
        return stable_diffusion_dynamics(num_steps, sde)
    return FlowDynamics(flow_sigmas(num_steps, 3.0), sde)


def assert_matches(golden: dict[str, torch.Tensor], steps: list[Gaussian]) -> None:
    """steps: one Gaussian per sample of the second axis, the cases being rows."""
    for sample, gaussian in enumerate(steps):
        noise, x_next = golden["noise"][:, sample], golden["x_next"][:, sample]
        torch.testing.assert_close(gaussian.mean, golden["mean"][:, sample], **CLOSE)
        torch.testing.assert_close(gaussian.std, golden["std"], **CLOSE)
        torch.testing.assert_close(gaussian.sample(noise), x_next, **CLOSE)
        torch.testing.assert_close(gaussian.log_prob(x_next), golden["log_prob"][:, sample], **CLOSE)


# --- published implementations ---------------------------------------------------------------------------------------


def test_dance_step_matches_the_published_implementation():
    golden = load_file(GOLDEN / "dance_flow_step.safetensors")
    step = golden["sigma"], golden["sigma_next"], golden["eta"]
    x_t, velocity = golden["x_t"], golden["velocity"]
    assert_matches(golden, [dance_step(x_t[:, i], velocity[:, i], *step) for i in range(2)])


def test_flow_x0_matches_the_published_implementation():
    golden = load_file(GOLDEN / "dance_flow_step.safetensors")
    torch.testing.assert_close(flow_x0(golden["x_t"], golden["velocity"], golden["sigma"]), golden["x0"], **CLOSE)


def test_flow_sde_step_matches_the_published_implementation():
    golden = load_file(GOLDEN / "flow_sde_step.safetensors")
    step = golden["sigma"], golden["sigma_next"], golden["noise_level"], golden["sigma_1"]
    x_t, velocity = golden["x_t"], golden["velocity"]
    assert_matches(golden, [flow_sde_step(x_t[:, i], velocity[:, i], *step) for i in range(2)])


def test_ddim_step_matches_the_published_implementation():
    golden = load_file(GOLDEN / "ddim_step.safetensors")
    previous = (golden["timestep"] - 1000 // golden["num_steps"]).clamp(min=0)
    step = golden["alphas_cumprod"][golden["timestep"]], golden["alphas_cumprod"][previous], golden["eta"]
    x_t, epsilon = golden["x_t"], golden["model_output"]
    assert_matches(golden, [ddim_step(x_t[:, i], epsilon[:, i], *step) for i in range(2)])


@pytest.mark.parametrize(("num_steps", "shift"), [(12, 3), (16, 3), (16, 5), (16, 7), (20, 3)])
def test_flow_sigmas_match_the_published_schedules(num_steps: int, shift: int):
    golden = load_file(GOLDEN / "sigma_schedules.safetensors")[f"steps{num_steps}_shift{shift}"]
    torch.testing.assert_close(flow_sigmas(num_steps, shift), golden, atol=1e-6, rtol=0)


# --- deployment samplers, bit for bit --------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 1.5, 3.0, 7.0])
def test_flow_sigmas_equal_the_deployment_schedule_bit_for_bit(shift: float):
    for num_steps in range(1, 61):
        assert torch.equal(flow_sigmas(num_steps, shift), flow_scheduler(num_steps, shift).sigmas), num_steps


@pytest.mark.parametrize("sde", ["dance", "flow-grpo", "cps"])
def test_zero_noise_is_the_flow_euler_step_bit_for_bit(sde: str):
    scheduler = flow_scheduler(16, 3.0)
    dynamics = FlowDynamics(scheduler.sigmas, sde)
    x_t = expected = draw(5, *SHAPE)
    for k, timestep in enumerate(scheduler.timesteps):
        velocity = draw(5, *SHAPE, seed=k + 1)
        gaussian = dynamics.transition(x_t, velocity, torch.full((5,), k), torch.zeros(5))
        x_t = gaussian.sample(draw(5, *SHAPE, seed=99))
        expected = scheduler.step(velocity, timestep, expected).prev_sample
        assert torch.equal(x_t, expected), k
        assert gaussian.std.tolist() == [0.0] * 5


@pytest.mark.parametrize("sde", ["ddim", "paper"])
@pytest.mark.parametrize("num_steps", [10, 30, 50])
def test_zero_noise_is_the_ddim_step_bit_for_bit(sde: str, num_steps: int):
    scheduler = stable_diffusion_scheduler(num_steps)
    dynamics = stable_diffusion_dynamics(num_steps, sde)
    x_t = expected = draw(5, *SHAPE)
    for k, timestep in enumerate(scheduler.timesteps):
        epsilon = draw(5, *SHAPE, seed=k + 1)
        step = torch.full((5,), k)
        result = scheduler.step(epsilon, timestep, expected, eta=0.0)
        assert torch.equal(dynamics.x0(x_t, epsilon, step), result.pred_original_sample), k
        x_t = dynamics.transition(x_t, epsilon, step, torch.zeros(5)).sample(draw(5, *SHAPE, seed=99))
        expected = result.prev_sample
        assert torch.equal(x_t, expected), k


def test_ddim_step_with_noise_is_the_scheduler_s():
    scheduler, dynamics = stable_diffusion_scheduler(20), stable_diffusion_dynamics(20, "ddim")
    x_t, epsilon, noise = draw(1, *SHAPE), draw(1, *SHAPE, seed=1), draw(1, *SHAPE, seed=2)
    for k, timestep in enumerate(scheduler.timesteps):
        expected = scheduler.step(epsilon, timestep, x_t, eta=0.8, variance_noise=noise).prev_sample
        gaussian = dynamics.transition(x_t, epsilon, torch.tensor([k]), rows(0.8))
        torch.testing.assert_close(gaussian.sample(noise), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("sde", EVERY_SDE)
def test_rows_of_a_mixed_batch_equal_the_rows_alone(sde: str):
    """ODE and stochastic rows at all steps, sigma = 1 and sigma_next = 0 included, share a batch without touching."""
    dynamics = dynamics_of(sde, 8)
    step = torch.arange(8).repeat(3)
    noise_level = rows(0.0, 0.5, 1.0).repeat_interleave(8)
    x_t, prediction, noise = draw(24, *SHAPE), draw(24, *SHAPE, seed=1), draw(24, *SHAPE, seed=2)
    together = dynamics.transition(x_t, prediction, step, noise_level).sample(noise)
    for i in range(24):
        row = slice(i, i + 1)
        alone = dynamics.transition(x_t[row], prediction[row], step[row], noise_level[row]).sample(noise[row])
        assert torch.equal(together[row], alone), i
    assert together.isfinite().all()


# --- the steps themselves --------------------------------------------------------------------------------------------


def test_flow_grpo_first_step_replaces_sigma_one_by_the_second_sigma():
    dynamics = FlowDynamics(rows(1.0, 0.9, 0.5, 0.0), "flow-grpo")
    gaussian = dynamics.transition(draw(1, *SHAPE), draw(1, *SHAPE), torch.tensor([0]), rows(0.7))
    assert gaussian.std.item() == pytest.approx(0.7 * math.sqrt(1.0 / (1 - 0.9)) * math.sqrt(0.1), rel=1e-5)


@pytest.mark.parametrize("noise_level", [0.0, 0.3, 0.8, 1.0])
def test_cps_preserves_its_coefficients_for_exact_x0_and_x1(noise_level: float):
    """x_t = (1-s) x0 + s x1 goes to (1-s') x0 + c x1 + std noise, with c^2 + std^2 = s'^2."""
    x0, x1 = draw(4, *SHAPE).double(), draw(4, *SHAPE, seed=1).double()
    sigma, sigma_next = torch.tensor([[1.0, 0.7, 0.3, 0.2], [0.9, 0.6, 0.25, 0.0]], dtype=torch.float64)
    s = sigma[:, None, None, None]
    gaussian = cps_step((1 - s) * x0 + s * x1, x1 - x0, sigma, sigma_next, torch.full_like(sigma, noise_level))
    remaining = (sigma_next.square() - gaussian.std.square()).clamp(min=0).sqrt()[:, None, None, None]
    expected = (1 - sigma_next[:, None, None, None]) * x0 + remaining * x1
    torch.testing.assert_close(gaussian.mean, expected, atol=1e-7, rtol=0)
    torch.testing.assert_close(gaussian.std, sigma_next * math.sin(noise_level * math.pi / 2), atol=1e-12, rtol=0)


def test_the_paper_s_diffusion_step_in_its_rescaled_variables():
    abar, abar_prev, level = rows(0.2, 0.6), rows(0.3, 0.9), rows(0.5, 1.0)
    x_t, epsilon = draw(2, *SHAPE), draw(2, *SHAPE, seed=1)
    gaussian = diffusion_sde_step(x_t, epsilon, abar, abar_prev, level)
    for i in range(2):
        a, a_prev, e = abar[i].item(), abar_prev[i].item(), level[i].item()
        s, s_prev = math.sqrt((1 - a) / a), math.sqrt((1 - a_prev) / a_prev)
        y = x_t[i] / math.sqrt(a) + (1 + e**2) * (s_prev - s) * epsilon[i]
        torch.testing.assert_close(gaussian.mean[i], y * math.sqrt(a_prev), atol=1e-5, rtol=1e-5)
        assert gaussian.std[i].item() == pytest.approx(e * math.sqrt(s**2 - s_prev**2) * math.sqrt(a_prev), rel=1e-5)


def test_x0_predictions_invert_the_forward_process():
    x0, noise, level = draw(2, *SHAPE), draw(2, *SHAPE, seed=1), rows(0.3, 0.8)
    c = level[:, None, None, None]
    torch.testing.assert_close(flow_x0((1 - c) * x0 + c * noise, noise - x0, level), x0, **CLOSE)
    torch.testing.assert_close(diffusion_x0(c.sqrt() * x0 + (1 - c).sqrt() * noise, noise, level), x0, **CLOSE)


def test_half_precision_inputs_are_computed_in_float32():
    x_t, velocity = draw(2, *SHAPE).bfloat16(), draw(2, *SHAPE, seed=1).bfloat16()
    step = rows(0.9, 0.5), rows(0.8, 0.4), rows(0.3, 0.3)
    half, full = dance_step(x_t, velocity, *step), dance_step(x_t.float(), velocity.float(), *step)
    assert half.mean.dtype == torch.float32
    assert torch.equal(half.mean, full.mean)


def test_shift_leaves_the_ends_and_raises_what_lies_between():
    sigmas = torch.linspace(1, 0, 9)
    shifted = shift_sigmas(sigmas, 3.0)
    assert shifted[[0, -1]].tolist() == [1.0, 0.0]
    assert (shifted[1:-1] > sigmas[1:-1]).all()


# --- densities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std_shape", [(3,), (3, 1, 1, 1)])
def test_log_prob_is_torch_distributions_normal(std_shape: tuple[int, ...]):
    mean, x, std = draw(3, *SHAPE), draw(3, *SHAPE, seed=1), rows(0.01, 0.5, 2.0)
    expected = torch.distributions.Normal(mean.double(), std.double()[:, None, None, None]).log_prob(x.double())
    gaussian = Gaussian(mean, std.reshape(std_shape))
    for reduction in ("mean", "sum"):
        reduced = getattr(expected.flatten(1), reduction)(1).float()
        torch.testing.assert_close(gaussian.log_prob(x, reduction=reduction), reduced, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kl_is_torch_distributions_kl(reduction: str):
    mean, other, std = draw(3, *SHAPE), draw(3, *SHAPE, seed=1), rows(0.3, 0.5, 2.0)
    normals = [torch.distributions.Normal(m.double(), std.double()[:, None, None, None]) for m in (mean, other)]
    expected = getattr(torch.distributions.kl_divergence(*normals).flatten(1), reduction)(1).float()
    actual = Gaussian(mean, std).kl(Gaussian(other, std), reduction=reduction)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_a_deterministic_step_has_no_density():
    gaussian = Gaussian(torch.zeros(2, *SHAPE), rows(0.1, 0.0))
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        gaussian.log_prob(torch.zeros(2, *SHAPE))
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        gaussian.kl(gaussian)


def test_log_prob_gradient_reaches_the_prediction():
    """d log N / d velocity = (x - mean) / std^2 * d mean / d velocity, averaged over the latent."""
    x_t, velocity = draw(1, *SHAPE), draw(1, *SHAPE, seed=1).requires_grad_()
    sigma, sigma_next, eta = 0.8, 0.7, 0.3
    gaussian = dance_step(x_t, velocity, rows(sigma), rows(sigma_next), rows(eta))
    x_next = gaussian.sample(draw(1, *SHAPE, seed=2)).detach()
    gaussian.log_prob(x_next).sum().backward()
    d = sigma_next - sigma
    slope = d + 0.5 * eta**2 * d * (1 - sigma) / sigma
    expected = (x_next - gaussian.mean) / gaussian.std**2 * slope / x_t.numel()
    torch.testing.assert_close(velocity.grad, expected.detach(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("sde", EVERY_SDE)
def test_a_schedule_shifted_by_one_step_shows_in_the_log_prob(sde: str):
    """A replay tolerance of 1e-6 is worth something: an off-by-one is typically over a thousand times larger."""
    dynamics = dynamics_of(sde, 16)
    step, noise_level = torch.arange(14), torch.full((14,), 0.3)
    x_t, prediction = draw(14, *SHAPE), draw(14, *SHAPE, seed=1)
    gaussian = dynamics.transition(x_t, prediction, step, noise_level)
    x_next = gaussian.sample(draw(14, *SHAPE, seed=2))
    replay = dynamics.transition(x_t, prediction, step, noise_level).log_prob(x_next)
    shifted = dynamics.transition(x_t, prediction, step + 1, noise_level).log_prob(x_next)
    assert torch.equal(replay, gaussian.log_prob(x_next))
    difference = (shifted - replay).abs()
    assert difference.median() > 1e-3
    assert difference.min() > 1e-5


# --- dynamics --------------------------------------------------------------------------------------------------------


def test_diffusion_alpha_bar_is_the_scheduler_s_chain():
    """State k + 1 is what the scheduler calls step k's previous timestep, the final one included."""
    for num_steps in (1, 10, 30, 50):
        scheduler = stable_diffusion_scheduler(num_steps)
        alpha_bar = stable_diffusion_dynamics(num_steps, "ddim").alpha_bar
        previous = (scheduler.timesteps - 1000 // num_steps).clamp(min=0)
        assert torch.equal(alpha_bar[:-1], scheduler.alphas_cumprod[scheduler.timesteps])
        assert torch.equal(alpha_bar[1:], scheduler.alphas_cumprod[previous])


def test_the_last_step_is_never_among_the_trainable():
    flow, diffusion = FlowDynamics(flow_sigmas(5)), stable_diffusion_dynamics(5, "ddim")
    assert list(flow.trainable_steps) == list(diffusion.trainable_steps) == [0, 1, 2, 3]


def test_only_a_diffusion_s_noisy_last_step_reaches_the_reward():
    noisy = stable_diffusion_dynamics(5, "ddim")
    clean = DiffusionDynamics(torch.tensor([500, 1]), rows(0.3, 0.99, 1.0))
    assert not FlowDynamics(flow_sigmas(5)).last_step_trainable
    assert noisy.last_step_trainable
    assert not clean.last_step_trainable


def test_the_last_flow_step_ends_on_its_x0_prediction():
    dynamics = FlowDynamics(flow_sigmas(5, 3.0))
    x_t, velocity, step = draw(2, *SHAPE), draw(2, *SHAPE, seed=1), torch.tensor([4, 4])
    mean = dynamics.transition(x_t, velocity, step, torch.zeros(2)).mean
    assert torch.equal(mean, dynamics.x0(x_t, velocity, step))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_dynamics_move_to_a_device_whole(device: str):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an accelerator")
    for dynamics in (FlowDynamics(flow_sigmas(4), "cps"), stable_diffusion_dynamics(4, "paper")):
        moved = dynamics.to(device)
        assert type(moved) is type(dynamics)
        assert moved.sde == dynamics.sde
        for name, value in vars(dynamics).items():
            if isinstance(value, torch.Tensor):
                assert getattr(moved, name).device.type == device
                assert torch.equal(getattr(moved, name).cpu(), value)


@pytest.mark.parametrize("sigmas", [[1.0], [0.5, 0.6], [1.2, 0.0], [0.5, -0.1], [float("nan"), 0.0]])
def test_a_flow_schedule_that_is_none_is_refused(sigmas: list[float]):
    with pytest.raises(ValueError, match="sigmas"):
        FlowDynamics(rows(*sigmas))


@pytest.mark.parametrize("alpha_bar", [[0.5, 0.6], [0.5, 0.4, 0.6], [0.0, 0.5, 0.9], [0.5, 0.9, 1.1]])
def test_a_diffusion_schedule_that_is_none_is_refused(alpha_bar: list[float]):
    with pytest.raises(ValueError, match="alpha_bar"):
        DiffusionDynamics(torch.tensor([900, 1]), rows(*alpha_bar))
