"""Diffusion policy optimization with KL regularization (DPOK, arXiv:2305.16381): a learnt baseline, an anchor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dancegrpo.algorithms.base import Advantage
from dancegrpo.algorithms.baseline import weighted_sum
from dancegrpo.algorithms.policy_gradient import Pairs, PolicyGradient, PolicyGradientLearning, gather
from dancegrpo.algorithms.work import deal
from dancegrpo.config import RunConfig
from dancegrpo.distributed import ALONE, World
from dancegrpo.noise import generator, key
from dancegrpo.objectives import mean_square, reward_weighted
from dancegrpo.policies.base import Condition, Policy
from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import Scores
from dancegrpo.sampling import Trajectory

_POOLED, _HIDDEN, _TIMES = 256, 256, 16


class DPOK(PolicyGradient):
    """-w (r - V(z, c, t)) clip(ratio) + anchor_weight |prediction - prediction at the start|^2.

    The reward is the judges' weighted sum, raw; the value network learns it from the state, the condition and the step.
    """

    def __init__(self, config: RunConfig, world: World = ALONE) -> None:
        super().__init__(config, world)
        self.needs_reference = config.algorithm.dpok.anchor_weight > 0
        self.value: ValueNetwork | None = None
        self._rollouts = 0
        self._restored: Mapping[str, Tensor] | None = None

    def advantage(self, scores: Mapping[str, Scores], group: Tensor, prompts: Sequence[Prompt] = ()) -> Advantage:
        """The summed raw rewards: what is taken off them depends on the step, so `objective` does it."""
        total, valid = weighted_sum(scores, self.config.weights)
        value = torch.where(valid, total, 0.0).float()
        return Advantage(value, valid.float(), valid, {}, torch.zeros(int(group.max()) + 1, dtype=torch.bool))

    def deal(self, advantage: Advantage, group: Tensor) -> Tensor:
        """The rollout's samples round-robin: a group may be a single sample."""
        return deal(torch.zeros_like(group), advantage.weight, self.config.update.updates_per_rollout)

    @property
    def everywhere(self) -> bool:
        """True: a reward of 0 is not a reward that the value network explains."""
        return True

    def learning(self, policy: Policy, trajectory: Trajectory, advantage: Advantage) -> PolicyGradientLearning:
        """Fits the value network to this rollout first, then learns from what it does not explain."""
        learning = super().learning(policy, trajectory, advantage)
        error = self._fit_value(policy, trajectory, advantage)
        learning.note(value_loss=error.reshape(1))
        learning.advantage = None  # what is weighed is the rest that the value leaves, not these raw rewards
        return learning

    def objective(self, policy: Policy, pairs: Pairs, learning: PolicyGradientLearning) -> Tensor:
        """See the class."""
        config = self.config.algorithm
        assert self.value is not None
        with torch.no_grad():
            unexplained = pairs.advantage - self.value(pairs.x_t, pairs.step, pairs.condition)
        prediction = policy.predict(pairs.x_t, pairs.step, pairs.condition)
        gaussian = policy.dynamics.transition(pairs.x_t, prediction, pairs.step, pairs.noise_level)
        log_prob = gaussian.log_prob(pairs.x_next, reduction=config.log_prob_reduction)
        old = log_prob.detach() if pairs.old_log_prob is None else pairs.old_log_prob
        loss = reward_weighted(log_prob, old, unexplained, config.dpok.reward_weight, config.clip_range)
        if self.needs_reference:
            with torch.no_grad(), policy.reference():
                anchor = policy.predict(pairs.x_t, pairs.step, pairs.condition)
            distance = mean_square(prediction - anchor)
            loss = loss + config.dpok.anchor_weight * distance
            learning.note(anchor_distance=distance)
        learning.note(log_prob=log_prob)
        learning.note_ratio(log_prob, old)
        return loss

    def _fit_value(self, policy: Policy, trajectory: Trajectory, advantage: Advantage) -> Tensor:
        """`value_steps` steps on random pairs of this rollout; returns the last mean squared error."""
        config, seed = self.config.algorithm.dpok, self.config.seed
        value = self._value_network(policy, trajectory.condition)
        known = (advantage.weight > 0).nonzero()[:, 0]
        error = torch.zeros((), device=policy.device)
        for number in range(config.value_steps if len(known) else 0):
            random = generator(seed, "value", self._rollouts, number)
            sample = known[torch.randint(len(known), (config.value_batch,), generator=random)]
            slot = torch.randint(trajectory.step.shape[1], (config.value_batch,), generator=random)
            # The network sees whole states: of ranks that have a share together, one is enough.
            mine = (self.owner[sample] == self.world.share) & self.world.leads
            pairs = gather(trajectory, advantage, sample[mine] - trajectory.first, slot[mine], None)
            value.optimizer.zero_grad()
            with torch.enable_grad():
                guess = value(pairs.x_t, pairs.step, pairs.condition)
                error = F.mse_loss(guess, pairs.advantage, reduction="sum") / config.value_batch
                error.backward()
            self.world.sum_gradients(list(value.parameters()))
            value.optimizer.step()
        self._rollouts += 1
        return self.world.sum(error.detach().reshape(1))[0]

    def _value_network(self, policy: Policy, condition: Condition) -> ValueNetwork:
        if self.value is None:
            width = _features(condition).shape[1]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(key(self.config.seed, "value"))
                self.value = ValueNetwork(width, policy.dynamics.num_steps)
            self.value.to(policy.device).start(self.config.algorithm.dpok.value_learning_rate)
            if self._restored is not None:
                self.value.restore(self._restored)
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """How often the value network was fitted: the key of its draws."""
        return {"rollouts": self._rollouts}

    def tensors(self) -> dict[str, Tensor]:
        """The value network and its optimizer's state."""
        if self.value is None:
            return dict(self._restored or {})
        return self.value.saved()

    def load_state_dict(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """The network takes its weights when its width is known, at the next rollout."""
        self._rollouts, self._restored = state["rollouts"], {n: t.clone() for n, t in tensors.items()} or None
        self.value = None


class ValueNetwork(nn.Module):
    """V(z, c, t): the reward expected from a state. Three layers on pooled latents, pooled condition and step."""

    def __init__(self, condition_width: int, num_steps: int) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.layers = nn.Sequential(
            nn.Linear(_POOLED + condition_width + _TIMES, _HIDDEN),
            nn.SiLU(),
            nn.Linear(_HIDDEN, _HIDDEN),
            nn.SiLU(),
            nn.Linear(_HIDDEN, 1),
        )

    def start(self, learning_rate: float) -> None:
        """Gives it its optimizer, on the device where it now is."""
        self.optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate)

    def forward(self, x_t: Tensor, step: Tensor, condition: Condition) -> Tensor:
        """x_t (N, *S), step (N,) int64, N conditions -> (N,)."""
        latents = F.adaptive_avg_pool1d(x_t.float().flatten(1).unsqueeze(1), _POOLED)[:, 0]
        angle = step[:, None] / self.num_steps * math.pi * torch.arange(1, _TIMES // 2 + 1, device=step.device)
        told = torch.cat([latents, _features(condition), angle.sin(), angle.cos()], dim=1)
        return self.layers(told)[:, 0]

    def saved(self) -> dict[str, Tensor]:
        """Weights and Adam's moments, by name."""
        held = {f"weights.{name}": p.detach() for name, p in self.named_parameters()}
        for name, p in self.named_parameters():
            held |= {f"{kind}.{name}": value for kind, value in self.optimizer.state.get(p, {}).items()}
        return held

    @torch.no_grad()
    def restore(self, held: Mapping[str, Tensor]) -> None:
        """Takes `saved` back."""
        for name, p in self.named_parameters():
            p.copy_(held[f"weights.{name}"])
            if f"step.{name}" in held:
                kinds = ("step", "exp_avg", "exp_avg_sq")
                self.optimizer.state[p] = {
                    k: held[f"{k}.{name}"].to("cpu" if k == "step" else p.device, copy=True) for k in kinds
                }


def _features(condition: Condition) -> Tensor:
    """What a condition says, (N, D): every tensor of numbers by name.

    Sequences (N, tokens, D) as the mean of their tokens that are not padding (zeros), latents (N, D, ...) as the mean
    of each channel.
    """
    pooled = []
    for _, tensor in sorted(condition.tensors.items()):
        if not tensor.is_floating_point() or tensor.ndim < 2:
            continue
        if tensor.ndim == 3:
            told = (tensor != 0).any(-1, keepdim=True)
            tensor = (tensor * told).sum(1) / told.sum(1).clamp(min=1)
        pooled.append(tensor.float().flatten(2).mean(-1) if tensor.ndim > 3 else tensor.float())
    return torch.cat(pooled, dim=1)
