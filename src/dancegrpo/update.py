"""From a rollout to optimizer steps: packed (sample, step) pairs, accumulation, clipping, the moving average."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dancegrpo.algorithms.base import Advantage, Algorithm, Pairs
from dancegrpo.config import RunConfig
from dancegrpo.errors import ModelError
from dancegrpo.policies.base import Policy
from dancegrpo.sampling import Trajectory, fetch

REPLAY_LIMIT = 0.05
"""Largest believable |log-prob of the training forward - log-prob of the rollout|, per latent element. Rounding stays
under 1e-3 even in bfloat16; a schedule that is off by one step is past 1."""


@dataclass(frozen=True)
class Part:
    """The pairs of one optimizer step. sample, slot: (N,) int64 into a trajectory's (B, K).

    scale: what one pair's loss is multiplied with, so that the sum over the part is the mean over its selected samples
    of the mean over their K steps. Pairs whose gradient is 0 are not listed, yet count in the denominator.
    """

    sample: Tensor
    slot: Tensor
    scale: float

    def micro_batches(self, size: int, bucket: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(sample, slot) in runs of at most `size` pairs of one bucket. bucket: (B, K) int64, of every pair."""
        of_pair = bucket[self.sample, self.slot]
        for name in of_pair.unique().tolist():
            chosen = of_pair == name
            yield from zip(self.sample[chosen].split(size), self.slot[chosen].split(size), strict=True)


def deal(group: Tensor, weight: Tensor, num_parts: int) -> Tensor:
    """Deals each group's selected samples round-robin into parts: (B,) int64, -1 where weight is 0."""
    selected = weight > 0
    before = (group[:, None] == group[None, :]).tril(-1) & selected[None, :]
    return torch.where(selected, before.sum(dim=1) % num_parts, -1)


def work_list(
    advantage: Advantage, group: Tensor, steps_per_sample: int, num_parts: int, *, all_pairs: bool
) -> list[Part]:
    """The pairs of a rollout's `num_parts` optimizer steps.

    all_pairs: list zero-advantage pairs too (a KL term has a gradient there).
    """
    dealt, parts = deal(group, advantage.weight, num_parts), []
    for index in range(num_parts):
        member = dealt == index
        active = member if all_pairs else member & (advantage.value != 0)
        sample = active.nonzero()[:, 0].repeat_interleave(steps_per_sample)
        slot = torch.arange(steps_per_sample).repeat(int(active.sum()))
        parts.append(Part(sample, slot, 1.0 / max(1, int(member.sum()) * steps_per_sample)))
    return parts


class Updater:
    """Holds what changes in training: the optimizer's state, the moving average, the count of updates."""

    def __init__(self, policy: Policy, algorithm: Algorithm, config: RunConfig) -> None:
        self.policy, self.algorithm, self.config = policy, algorithm, config
        self.parameters = policy.trainable()
        settings = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.ema = None
        if config.ema.decay is not None:
            self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.num_updates = 0
        self._landmarks = {name: _landmarks(p, len(self.parameters)).clone() for name, p in self.parameters.items()}

    def update(self, trajectory: Trajectory, advantage: Advantage) -> dict[str, float | None]:
        """`updates_per_rollout` optimizer steps on disjoint parts of every group. Returns the metrics under `train/`.

        Raises ModelError if the training forward does not reproduce the rollout's log-probs.
        """
        config, steps = self.config.update, trajectory.step.shape[1]
        group, all_pairs = trajectory.group.cpu(), self.algorithm.needs_reference
        parts = work_list(advantage, group, steps, config.updates_per_rollout, all_pairs=all_pairs)
        old_log_prob, moved = trajectory.log_prob, False
        statistics: dict[str, list[Tensor]] = defaultdict(list)
        losses, norms, skipped, rate = [], [], 0, self._learning_rate()
        for index, part in enumerate(parts):
            if not len(part.sample):
                continue
            losses.append(self._accumulate(part, trajectory, advantage, old_log_prob if moved else None, statistics))
            if not moved:
                replay = self._replay_difference(statistics)
                if replay > self.config.algorithm.clip_range / 10 and index + 1 < len(parts):
                    # Rounding would eat the trust interval: take old log-probs from the forward that will be compared.
                    old_log_prob = self._recompute(parts[index + 1 :], trajectory, advantage)
            norm = self._step()
            norms.append(norm)
            skipped += not math.isfinite(norm)
            moved = moved or math.isfinite(norm)
        pairs = sum(len(part.sample) for part in parts)
        finite = [norm for norm in norms if math.isfinite(norm)]
        return {
            **self._metrics(statistics),
            "train/loss": sum(float(loss) for loss in losses) / len(losses) if losses else None,
            "train/grad_norm": sum(finite) / len(finite) if finite else None,
            "train/updates": len(norms) - skipped,
            "train/skipped_updates": skipped,
            "train/learning_rate": rate,
            "train/weight_change": self.weight_change(),
            "pairs/trained": pairs,
            "pairs/skipped_zero_advantage": int((advantage.weight > 0).sum()) * steps - pairs,
        }

    def _accumulate(
        self,
        part: Part,
        trajectory: Trajectory,
        advantage: Advantage,
        old_log_prob: Tensor | None,
        statistics: dict[str, list[Tensor]],
    ) -> Tensor:
        """Gradients of one part's loss, whatever the micro-batch; returns the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.policy.device)
        for sample, slot in self._micro_batches(part, trajectory):
            loss, told = self._backward(gather(trajectory, advantage, sample, slot, old_log_prob), part.scale)
            total += loss
            for name, value in told.items():
                statistics[name].append(value)
            if old_log_prob is None:
                statistics["first"].append(told["ratio"])
                statistics["replay"].append((told["log_prob"] - trajectory.log_prob[sample, slot]).abs())
        return total

    def _backward(self, pairs: Pairs, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds one micro-batch's gradients; returns its share of the loss and its statistics, no graph with them."""
        loss, told = self.algorithm.loss(self.policy, pairs)
        loss = loss.sum() * scale
        loss.backward()
        return loss.detach(), told

    def _micro_batches(self, part: Part, trajectory: Trajectory) -> Iterator[tuple[Tensor, Tensor]]:
        yield from part.micro_batches(self.config.update.micro_batch_size, self.policy.bucket(trajectory.step.cpu()))

    def _replay_difference(self, statistics: dict[str, list[Tensor]]) -> float:
        largest = float(torch.cat(statistics["replay"]).max())
        elements = 1 if self.config.algorithm.log_prob_reduction == "mean" else math.prod(self.policy.latent_shape)
        if not largest / elements <= REPLAY_LIMIT:
            raise ModelError(
                f"the training forward misses the rollout's log-probs by {largest:.3g} (at most {REPLAY_LIMIT} is "
                "rounding): the schedule or dropout differs between sampling and training, or weights are not finite"
            )
        return largest

    @torch.no_grad()
    def _recompute(self, parts: list[Part], trajectory: Trajectory, advantage: Advantage) -> Tensor:
        log_prob = trajectory.log_prob.clone()
        for part in parts:
            for sample, slot in self._micro_batches(part, trajectory):
                pairs = gather(trajectory, advantage, sample, slot, None)
                log_prob[sample, slot] = self.algorithm.log_prob(self.policy, pairs)
        return log_prob

    def _step(self) -> float:
        """Clips and steps; returns the gradient norm before clipping. A norm that is not finite changes nothing."""
        parameters = list(self.parameters.values())
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.config.optimizer.max_grad_norm))
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = self._learning_rate()
            self.optimizer.step()
            self.num_updates += 1
            if self.ema is not None and self.config.ema.decay is not None:
                current = [p.detach() for p in parameters]
                torch._foreach_lerp_(list(self.ema.values()), current, 1.0 - self.config.ema.decay)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _learning_rate(self) -> float:
        settings = self.config.optimizer
        warm = min(1.0, (self.num_updates + 1) / settings.warmup_updates) if settings.warmup_updates else 1.0
        return settings.learning_rate * warm

    def weight_change(self) -> float:
        """|w - w_start| / |w_start| over evenly spread weights (all of them in a small model)."""
        moved = start = 0.0
        for name, parameter in self.parameters.items():
            then = self._landmarks[name]
            moved += float((_landmarks(parameter, len(self.parameters)) - then).double().square().sum())
            start += float(then.double().square().sum())
        return math.sqrt(moved / start) if start else math.sqrt(moved)

    def _metrics(self, statistics: dict[str, list[Tensor]]) -> dict[str, float | None]:
        if not statistics:
            names = (
                "ratio_mean",
                "ratio_first",
                "ratio_max_deviation",
                "clip_fraction",
                "approx_kl",
                "kl",
                "replay_difference",
            )
            return {f"train/{name}": None for name in names}
        joined = {name: torch.cat(values).double() for name, values in statistics.items()}
        return {
            "train/ratio_mean": float(joined["ratio"].mean()),
            "train/ratio_first": float(joined["first"].mean()),
            "train/ratio_max_deviation": float((joined["ratio"] - 1).abs().max()),
            "train/clip_fraction": float(joined["clipped"].mean()),
            "train/approx_kl": float(joined["approx_kl"].mean()),
            "train/kl": float(joined["kl"].mean()) if "kl" in joined else None,
            "train/replay_difference": float(joined["replay"].max()),
        }

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Tensors to resume from, by kind and parameter name: weights, exp_avg, exp_avg_sq, step, ema."""
        state = {"weights": {name: p.detach() for name, p in self.parameters.items()}}
        for kind in ("exp_avg", "exp_avg_sq", "step"):
            held = {n: self.optimizer.state[p][kind] for n, p in self.parameters.items() if p in self.optimizer.state}
            state[kind] = held
        if self.ema is not None:
            state["ema"] = self.ema
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, dict[str, Tensor]], num_updates: int) -> None:
        """Restores `state_dict` in place."""
        for name, parameter in self.parameters.items():
            parameter.copy_(state["weights"][name])
            if name in state["step"]:
                kinds = ("exp_avg", "exp_avg_sq", "step")  # copied: loaded tensors lie unaligned in a mapped file
                held = {kind: state[kind][name].to(parameter.device, copy=True) for kind in kinds}
                self.optimizer.state[parameter] = held
            if self.ema is not None:
                self.ema[name].copy_(state["ema"][name])
        self.num_updates = num_updates


def gather(trajectory: Trajectory, advantage: Advantage, sample: Tensor, slot: Tensor, old: Tensor | None) -> Pairs:
    """The rows (sample, slot) of a trajectory as one micro-batch."""
    device = trajectory.log_prob.device
    x_t, x_next = (fetch(latents, sample, slot, device) for latents in (trajectory.x_t, trajectory.x_next))
    sample, slot, value = sample.to(device), slot.to(device), advantage.value.to(device)
    return Pairs(
        x_t=x_t,
        x_next=x_next,
        step=trajectory.step[sample, slot],
        noise_level=trajectory.noise_level[sample, slot],
        advantage=value[sample],
        condition=trajectory.condition[trajectory.group[sample]],
        old_log_prob=None if old is None else old[sample, slot],
    )


def _landmarks(parameter: Tensor, num_parameters: int, budget: int = 4_000_000) -> Tensor:
    """Evenly spread elements, so that watching a 12 B model move costs megabytes, not a second copy of it."""
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, len(flat) * num_parameters // budget)]
