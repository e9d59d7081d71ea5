"""From a scored batch to optimizer steps: accumulation, clipping, the moving average."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dancegrpo.algorithms import Learning, Part
from dancegrpo.config import RunConfig
from dancegrpo.policies.base import Policy


class Updater:
    """Holds what changes in training: the optimizer's state, the moving average, the count of updates."""

    def __init__(self, policy: Policy, config: RunConfig) -> None:
        self.policy, self.config = policy, config
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

    def update(self, learning: Learning) -> dict[str, float | None]:
        """One optimizer step per part. Returns the metrics under `train/` and `pairs/`.

        A gradient that is not finite changes nothing and is counted.
        """
        losses, norms, rate = [], [], self._learning_rate()
        for index, part in enumerate(learning.parts):
            if not len(part.sample):
                continue
            losses.append(self.accumulate(part, learning))
            learning.before_step(index)
            norms.append(self._step())
            learning.after_step(moved=math.isfinite(norms[-1]))
        trained = sum(len(part.sample) for part in learning.parts)
        finite = [norm for norm in norms if math.isfinite(norm)]
        return {
            **learning.metrics(),
            "train/loss": sum(float(loss) for loss in losses) / len(losses) if losses else None,
            "train/grad_norm": sum(finite) / len(finite) if finite else None,
            "train/updates": len(finite),
            "train/skipped_updates": len(norms) - len(finite),
            "train/learning_rate": rate,
            "train/weight_change": self.weight_change(),
            "pairs/trained": trained,
            "pairs/skipped_zero_advantage": sum(part.total for part in learning.parts) - trained,
        }

    def accumulate(self, part: Part, learning: Learning) -> Tensor:
        """Gradients of one part's loss, whatever the micro-batch; returns the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.policy.device)
        for sample, slot in part.micro_batches(self.config.update.micro_batch_size, learning.bucket):
            total += self._backward(learning, sample, slot, part.scale)
        return total

    def _backward(self, learning: Learning, sample: Tensor, slot: Tensor, scale: float) -> Tensor:
        """Adds one micro-batch's gradients; returns its share of the loss, no graph with it."""
        # A function of its own: nothing of the graph is left when the next micro-batch begins.
        loss = learning.loss(sample, slot).sum() * scale
        loss.backward()
        return loss.detach()

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


def _landmarks(parameter: Tensor, num_parameters: int, budget: int = 4_000_000) -> Tensor:
    """Evenly spread elements, so that watching a 12 B model move costs megabytes, not a second copy of it."""
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, len(flat) * num_parameters // budget)]
