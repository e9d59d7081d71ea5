import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dancegrpo.errors import ConfigError
from dancegrpo.prompts import Prompt
from dancegrpo.sampling import rollout, sample, starting_noise, step_plan
from dancegrpo.sde import DiffusionDynamics, FlowDynamics, flow_sigmas
from dancegrpo.settings import RolloutConfig, TimestepsConfig
from toy import ToyPolicy

FLOW = FlowDynamics(flow_sigmas(16, 3.0))
DIFFUSION = DiffusionDynamics(torch.arange(16).flip(0), torch.linspace(0.01, 0.99, 17))
PROMPTS = [Prompt(i, "word" * (i + 1)) for i in range(3)]


def config(**changes) -> RolloutConfig:
    return RolloutConfig(**{"group_size": 4, "num_steps": 6, "noise_level": 0.5, "batch_size": 5, **changes})


def test_the_papers_sixty_percent_of_sixteen_steps_is_nine_per_sample_each_its_own():
    plan = step_plan(RolloutConfig(group_size=12, num_steps=16), FLOW, 8, seed=0, iteration=0)
    assert plan.trained.shape == (96, 9)
    assert (plan.trained.diff(dim=1) > 0).all()
    assert plan.trained.max() <= 14
    assert len({tuple(row) for row in plan.trained.tolist()}) > 80


def test_random_steps_are_uniform_over_the_trainable_ones():
    plan = step_plan(RolloutConfig(group_size=100, num_steps=16), FLOW, 40, seed=0, iteration=0)
    counts = plan.trained.flatten().bincount(minlength=16).double()
    expected = 4000 * 9 / 15
    assert counts[15] == 0
    assert (counts[:15] - expected).abs().max() < 5 * (expected * (1 - 9 / 15)) ** 0.5


@pytest.mark.parametrize(
    ("select", "expected"), [("first", [0, 1, 2, 3]), ("last", [11, 12, 13, 14]), ("list", [3, 5])]
)
def test_shared_selections(select, expected):
    steps = TimestepsConfig(select=select, fraction=0.3, steps=(5, 3) if select == "list" else ())
    plan = step_plan(RolloutConfig(num_steps=16, timesteps=steps), FLOW, 1, seed=0, iteration=0)
    assert plan.trained.tolist() == [expected] * 12


def test_a_flows_last_transition_is_silent_and_a_diffusions_is_not():
    settings_ = RolloutConfig(num_steps=16)
    assert (step_plan(settings_, FLOW, 1, 0, 0).noise_level[:, -1] == 0).all()
    assert (step_plan(settings_, DIFFUSION, 1, 0, 0).noise_level[:, -1] > 0).all()


def test_ode_elsewhere_leaves_noise_only_where_a_sample_trains():
    steps = TimestepsConfig(stochastic="trained")
    plan = step_plan(RolloutConfig(num_steps=16, timesteps=steps), FLOW, 2, 0, 0)
    noisy = [row.nonzero()[:, 0].tolist() for row in plan.noise_level]
    assert noisy == plan.trained.tolist()


def test_training_a_silent_step_is_refused():
    levels = (0.0,) + (0.3,) * 15
    first = TimestepsConfig(select="first")
    with pytest.raises(ConfigError, match=r"trained steps \[0\]"):
        step_plan(RolloutConfig(num_steps=16, noise_level=levels, timesteps=first), FLOW, 1, 0, 0)


def test_random_selection_avoids_silent_steps():
    levels = (0.0, 0.0) + (0.3,) * 14
    plan = step_plan(RolloutConfig(num_steps=16, noise_level=levels), FLOW, 4, 0, 0)
    assert plan.trained.min() == 2


def test_a_group_shares_its_starting_noise_and_groups_differ():
    noise = starting_noise(config(), (4,), 2, seed=0, iteration=0).reshape(2, 4, 4)
    assert (noise == noise[:, :1]).all()
    assert not torch.equal(noise[0], noise[1])


def test_unshared_noise_differs_inside_a_group():
    noise = starting_noise(config(shared_noise=False), (4,), 1, seed=0, iteration=0)
    assert len({tuple(row) for row in noise.tolist()}) == 4


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 12))
def test_the_rollout_does_not_depend_on_its_batch_size(batch_size):
    policy = ToyPolicy()
    condition = policy.encode(PROMPTS)
    a, b = (rollout(policy, condition, config(batch_size=n), seed=3, iteration=2) for n in (12, batch_size))
    assert torch.equal(a.step, b.step)
    torch.testing.assert_close(a.x0, b.x0, atol=1e-5, rtol=0)
    torch.testing.assert_close(a.log_prob, b.log_prob, atol=1e-5, rtol=0)


def test_the_trajectory_keeps_what_the_sampler_did():
    policy = ToyPolicy()
    condition = policy.encode(PROMPTS)
    told = rollout(policy, condition, config(timesteps=TimestepsConfig(fraction=1.0)), seed=3)
    assert torch.equal(told.x_t[:, 1:], told.x_next[:, :-1])
    assert torch.equal(told.step, torch.arange(5).expand(12, 5))
    for k in range(5):
        velocity = policy.predict(told.x_t[:, k], told.step[:, k], condition[told.group])
        gaussian = policy.dynamics.transition(told.x_t[:, k], velocity, told.step[:, k], told.noise_level[:, k])
        independent = torch.distributions.Normal(gaussian.mean, gaussian.std.reshape(-1, 1))
        torch.testing.assert_close(told.log_prob[:, k], independent.log_prob(told.x_next[:, k]).mean(1))
    velocity = policy.predict(told.x_next[:, -1], torch.full((12,), 5), condition[told.group])
    torch.testing.assert_close(told.x0, told.x_next[:, -1] - policy.dynamics.sigmas[5] * velocity)


def test_noise_level_zero_is_the_deterministic_sampler():
    policy, quiet = (
        ToyPolicy(),
        config(noise_level=(0.5, 0.0, 0.0, 0.0, 0.0, 0.0), timesteps=TimestepsConfig(fraction=0.2)),
    )
    condition = policy.encode(PROMPTS)
    told = rollout(policy, condition, quiet, seed=1)
    x = told.x_next[:, 0]
    for step in range(1, 6):
        sigma, following = policy.dynamics.sigmas[step], policy.dynamics.sigmas[step + 1]
        x = x + (following - sigma) * policy.predict(x, torch.full((12,), step), condition[told.group])
    torch.testing.assert_close(told.x0, x)


def test_the_deployment_sampler_is_euler():
    policy, noise = ToyPolicy(), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    condition = policy.encode(PROMPTS)
    x = noise
    for step, (sigma, following) in enumerate(zip(policy.dynamics.sigmas, policy.dynamics.sigmas[1:], strict=False)):
        x = x + (following - sigma) * policy.predict(x, torch.full((3,), step), condition)
    torch.testing.assert_close(sample(policy, condition, noise), x)
