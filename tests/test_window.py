"""Which transitions are trained when: the sliding window, the last step, and states on the way."""

import pytest
import torch

from dancegrpo.errors import ConfigError
from dancegrpo.sampling import rollout, states, step_plan, trained_steps
from dancegrpo.sde import DiffusionDynamics, FlowDynamics, flow_sigmas
from dancegrpo.settings import RolloutConfig, TimestepsConfig
from toy import FAMILIES, WORDS, items, normal_log_prob, toy_config, toy_learning, toy_setup

FLOW = FlowDynamics(flow_sigmas(10, 3.0))
DIFFUSION = DiffusionDynamics(torch.arange(10).flip(0), torch.linspace(0.01, 0.99, 11))


def windowed(**changes) -> RolloutConfig:
    window = {"select": "window", "stochastic": "trained", "window": 3, "stride": 2, "slide_every": 5, **changes}
    return RolloutConfig(group_size=4, num_steps=10, timesteps=TimestepsConfig(**window))


@pytest.mark.parametrize(
    ("iteration", "steps"),
    [
        (0, [0, 1, 2]),
        (4, [0, 1, 2]),
        (5, [2, 3, 4]),
        (10, [4, 5, 6]),
        (15, [6, 7, 8]),
        (20, [6, 7, 8]),
        (999, [6, 7, 8]),
    ],
)
def test_the_window_slides_by_its_stride_and_stays_at_the_end(iteration, steps):
    assert trained_steps(windowed(), FLOW, iteration) == steps
    plan = step_plan(windowed(), FLOW, 2, 0, iteration)
    assert plan.trained.tolist() == [steps] * 8
    assert [row.nonzero()[:, 0].tolist() for row in plan.noise_level] == [steps] * 8


def test_a_stride_that_overshoots_ends_with_the_last_trainable_step():
    assert trained_steps(windowed(stride=5), FLOW, 5) == [5, 6, 7]
    assert trained_steps(windowed(stride=5), FLOW, 10) == [6, 7, 8]


def test_with_the_last_step_the_window_gets_to_it():
    assert trained_steps(windowed(include_last=True), DIFFUSION, 999) == [7, 8, 9]


@pytest.mark.parametrize("family", ["flow", "diffusion"])
def test_outside_the_window_steps_are_the_deterministic_sampler(family):
    policy, algorithm = toy_setup(
        family, "grpo", "rollout.timesteps={select: window, window: 2, stochastic: trained, slide_every: 1}"
    )
    trajectory, _ = toy_learning(algorithm, policy, 1)
    assert trajectory.step.tolist() == [[1, 2]] * 12
    condition = trajectory.condition[trajectory.group]
    with torch.no_grad():
        x = trajectory.x_next[:, 1]
        for step in range(3, 6):
            at = torch.full((12,), step)
            prediction = policy.predict(x, at, condition)
            x = policy.dynamics.transition(x, prediction, at, torch.zeros(12)).mean
    torch.testing.assert_close(trajectory.x0, x, atol=1e-6, rtol=1e-6)


def test_a_window_that_would_reach_a_silent_step_is_refused_at_once():
    config = windowed().model_copy(update={"noise_level": (0.5,) * 7 + (0.0,) * 3})
    with pytest.raises(ConfigError, match=r"rollout\.noise_level is 0 at trained steps \[7, 8\]"):
        step_plan(config, FLOW, 1, 0, 0)


def test_ddpo_on_diffusion_trains_the_last_step_too():
    last = "rollout.timesteps={include_last: true, fraction: 1.0}"
    policy, algorithm = toy_setup("diffusion", "ddpo", last)
    trajectory, learning = toy_learning(algorithm, policy)
    assert trajectory.step.tolist() == [[0, 1, 2, 3, 4, 5]] * 12
    assert torch.equal(trajectory.x_next[:, 5], trajectory.x0)
    assert (trajectory.noise_level == 0.5).all()
    sample, slot = items(12, 6)
    torch.testing.assert_close(
        trajectory.log_prob[sample, slot], normal_log_prob(policy, trajectory, sample, slot), atol=1e-5, rtol=1e-5
    )
    assert algorithm.workload(policy).steps == 6
    assert torch.equal(learning.loss(sample, slot).detach(), -learning.advantage.value[sample])


def test_a_flow_refuses_to_train_its_last_step():
    config = toy_config("ddpo", "rollout.timesteps.include_last=true")
    with pytest.raises(ConfigError, match=r"^rollout\.timesteps\.include_last=true: this model's last step") as told:
        step_plan(config.rollout, FAMILIES["flow"]().dynamics, 1, 0, 0)
    assert "\n" not in str(told.value)


def test_a_diffusion_that_ends_without_noise_refuses_too():
    clean = DiffusionDynamics(torch.arange(6).flip(0), torch.linspace(0.05, 1.0, 7))
    assert not clean.last_step_trainable
    config = toy_config("ddpo", "rollout.timesteps.include_last=true")
    with pytest.raises(ConfigError, match="include_last=true"):
        step_plan(config.rollout, clean, 1, 0, 0)


@pytest.mark.parametrize("family", ["flow", "diffusion"])
@pytest.mark.parametrize("stochastic", ["all", "trained"])
@pytest.mark.parametrize("batch_size", [5, 12])
def test_states_are_those_that_a_rollout_passes(family, stochastic, batch_size):
    timesteps = f"rollout.timesteps={{select: first, fraction: 0.4, stochastic: {stochastic}}}"
    config = toy_config("refl", timesteps, f"rollout.batch_size={batch_size}").rollout
    policy = FAMILIES[family]()
    condition, at = policy.encode(WORDS), torch.arange(12) % 6
    found = states(policy, condition, config, at, seed=3, iteration=2)
    # The same noise in every step, and every transition kept.
    levels = step_plan(config, policy.dynamics, 3, 3, 2).noise_level[0].tolist()
    for sample, step in enumerate(at.tolist()):
        x = _passed(policy, condition, config, levels, sample, step)
        torch.testing.assert_close(found[sample], x, atol=1e-5, rtol=0)


def _passed(policy, condition, config, levels, sample: int, step: int) -> torch.Tensor:
    """What `rollout` records as x_t where this very step is trained, with a little noise in it if it had none."""
    own = [level or (1e-6 if k == step else 0.0) for k, level in enumerate(levels)]
    last = step == len(levels) - 1
    if last:  # never trained on a flow: what the transition before it led to
        own[step - 1] = own[step - 1] or 1e-6
    chosen = TimestepsConfig(select="list", steps=(step - last,))
    told = rollout(
        policy,
        condition,
        config.model_copy(update={"noise_level": tuple(own), "timesteps": chosen}),
        seed=3,
        iteration=2,
    )
    return (told.x_next if last else told.x_t)[sample, 0]


def test_a_rollout_of_final_latents_alone_draws_the_same():
    policy, config = FAMILIES["flow"](), toy_config("grpo").rollout
    condition = policy.encode(WORDS)
    whole, alone = (rollout(policy, condition, config, seed=1, keep=keep) for keep in ("transitions", "x0"))
    assert torch.equal(whole.x0, alone.x0)
    assert alone.x_t.shape == (12, 0, 4)
