"""Replay: the training forward gives the rollout's log-probs back, on real pipelines of both families."""

import pytest
import torch

from dancegrpo.algorithms import GRPO, Advantage, gather
from dancegrpo.config import load_config
from dancegrpo.policies import load_policy
from dancegrpo.prompts import Prompt

PROMPTS = [Prompt(0, "a red circle"), Prompt(1, "two blue squares on a white background")]


@pytest.fixture(params=["flux", "sd", "sd-guided"])
def rolled(request, tiny_flux_path, tiny_sd_path):
    """(policy, algorithm, trajectory) of 16 samples, sampled 8 at a time."""
    flux = request.param == "flux"
    model = {"path": str(tiny_flux_path if flux else tiny_sd_path), "height": 16, "width": 16}
    model |= {"max_sequence_length": 16} if flux else {"guidance_scale": 1.5 if request.param == "sd-guided" else 1.0}
    settings = {
        "name": "replay",
        "model": model,
        "prompts": {"train": "none.txt", "per_iteration": 2},
        "rollout": {"group_size": 8, "num_steps": 5, "noise_level": 0.7, "batch_size": 8},
        "rewards": {"any": {"judge": "python:any"}},
    }
    settings["rollout"]["timesteps"] = {"fraction": 1.0}
    config = load_config(settings)
    policy, algorithm = load_policy(config.model, config.rollout), GRPO(config)
    return policy, algorithm, algorithm.collect(policy, policy.encode(PROMPTS), 0)


def differences(rolled, batch, shift=0):
    """|log-prob of the training forward - rollout's| of every pair, in micro-batches that mix steps."""
    policy, algorithm, told = rolled
    sample = torch.arange(len(told)).repeat_interleave(told.step.shape[1] - shift)
    slot = torch.arange(told.step.shape[1] - shift).repeat(len(told))
    advantage = Advantage(
        torch.ones(len(told)),
        torch.ones(len(told)),
        torch.ones(len(told), dtype=torch.bool),
        {},
        torch.zeros(2, dtype=torch.bool),
    )
    found = []
    with torch.no_grad():
        for s, k in zip(sample.split(batch), slot.split(batch), strict=True):
            pairs = gather(told, advantage, s, k, None)
            if shift:
                object.__setattr__(pairs, "step", pairs.step + shift)
            found.append((algorithm.log_prob(policy, pairs) - told.log_prob[s, k]).abs())
    return torch.cat(found)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_replay_is_rounding_at_any_training_batch(rolled, batch):
    assert differences(rolled, batch).max() <= 1e-6


def test_replay_is_exact_at_the_rollouts_batch(rolled):
    assert differences(rolled, 8).max() == 0


def test_a_schedule_off_by_one_step_fails_the_replay(rolled):
    assert differences(rolled, 8, shift=1).median() > 1e-3
