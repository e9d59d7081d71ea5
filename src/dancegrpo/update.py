"""From a scored batch to optimizer steps: accumulation, clipping, the moving average."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dancegrpo.algorithms import Learning, Part
from dancegrpo.config import RunConfig
from dancegrpo.distributed import ALONE, World, first_element, laid_out, local, whole
from dancegrpo.health.guard import Guard
from dancegrpo.policies.base import Policy


class Updater:
    """Holds what changes in training: the optimizer's state, the moving average, the count of updates."""

    def __init__(self, policy: Policy, config: RunConfig, world: World = ALONE, guard: Guard | None = None) -> None:
        self.policy, self.config, self.world = policy, config, world
        self.guard = guard or Guard(config.health)
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

        A gradient that is not finite, or spikes, changes nothing and is counted.
        """
        losses, norms, made, rate = [], [], 0, self._learning_rate()
        for index, part in enumerate(learning.parts):
            if not len(part.sample):
                continue
            losses.append(self.accumulate(part, learning))
            learning.before_step(index)
            norm, moved = self._step()
            norms.append(norm)
            made += moved
            learning.after_step(moved=moved)
        trained = sum(len(part.sample) for part in learning.parts)
        finite = [norm for norm in norms if math.isfinite(norm)]
        return {
            **learning.metrics(),
            "train/loss": sum(float(loss) for loss in losses) / len(losses) if losses else None,
            "train/grad_norm": sum(finite) / len(finite) if finite else None,
            "train/updates": made,
            "train/skipped_updates": len(norms) - made,
            "train/learning_rate": rate,
            "train/weight_change": self.weight_change(),
            "pairs/trained": trained,
            "pairs/skipped_zero_advantage": sum(part.total for part in learning.parts) - trained,
        }

    def accumulate(self, part: Part, learning: Learning) -> Tensor:
        """Gradients of one part's loss, whatever the micro-batch; returns the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.policy.device)
        batches = list(learning.micro_batches(part, self.config.update.micro_batch_size))
        each = self.config.parallel.reduce == "each"
        for index, (sample, slot, counts) in enumerate(batches):
            learning.silent = not counts
            with self.policy.accumulating(last=each or index + 1 == len(batches)):
                total += self._backward(learning, sample, slot, part.scale if counts else 0.0)
        learning.silent = False
        self.world.sum_gradients(list(self.parameters.values()))
        return self.world.sum(total.reshape(1))[0]

    def _backward(self, learning: Learning, sample: Tensor, slot: Tensor, scale: float) -> Tensor:
        """Adds one micro-batch's gradients; returns its share of the loss, no graph with it."""
        # A function of its own: nothing of the graph is left when the next micro-batch begins.
        loss = learning.loss(sample, slot).sum() * scale
        loss.backward()
        return loss.detach()

    def _step(self) -> tuple[float, bool]:
        """Clips and steps where the guard allows it; returns the gradient norm before clipping, and whether it did."""
        parameters = list(self.parameters.values())
        norm = float(whole(torch.nn.utils.clip_grad_norm_(parameters, self.config.optimizer.max_grad_norm)))
        allowed = self.guard.allow(norm)
        if allowed:
            for group in self.optimizer.param_groups:
                group["lr"] = self._learning_rate()
            self.optimizer.step()
            self.num_updates += 1
            if self.ema is not None and self.config.ema.decay is not None:
                current = [p.detach() for p in parameters]
                torch._foreach_lerp_(list(self.ema.values()), current, 1.0 - self.config.ema.decay)
        self.optimizer.zero_grad(set_to_none=True)
        return norm, allowed

    def _learning_rate(self) -> float:
        settings = self.config.optimizer
        warm = min(1.0, (self.num_updates + 1) / settings.warmup_updates) if settings.warmup_updates else 1.0
        return settings.learning_rate * warm * self.guard.rate

    def weight_change(self) -> float:
        """|w - w_start| / |w_start| over evenly spread weights (all of them in a small model)."""
        moved = start = 0.0
        for name, parameter in self.parameters.items():
            then = self._landmarks[name]
            moved += float((_landmarks(parameter, len(self.parameters)) - then).double().square().sum())
            start += float(then.double().square().sum())
        if any(local(p) is not p for p in self.parameters.values()):  # each rank looked at its own shards
            moved, start = self.world.sum(torch.tensor([moved, start], dtype=torch.float64)).tolist()
        return math.sqrt(moved / start) if start else math.sqrt(moved)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Tensors to resume from, whole, by kind and parameter name: weights, exp_avg, exp_avg_sq, step, ema.

        Every rank must ask.
        """
        state = {"weights": {name: whole(p.detach()) for name, p in self.parameters.items()}}
        for kind in ("exp_avg", "exp_avg_sq", "step"):
            held = {n: self.optimizer.state[p][kind] for n, p in self.parameters.items() if p in self.optimizer.state}
            state[kind] = {name: whole(tensor) for name, tensor in held.items()}
        if self.ema is not None:
            state["ema"] = {name: whole(average) for name, average in self.ema.items()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, dict[str, Tensor]], num_updates: int) -> None:
        """Restores `state_dict` in place, on any number of ranks."""
        for name, parameter in self.parameters.items():
            parameter.copy_(laid_out(state["weights"][name], parameter))
            if name in state["step"]:
                kinds = ("exp_avg", "exp_avg_sq")  # copied: loaded tensors lie unaligned in a mapped file
                held = {kind: laid_out(state[kind][name], parameter, copy=True) for kind in kinds}
                device = local(parameter).device
                self.optimizer.state[parameter] = held | {"step": state["step"][name].to(device, copy=True)}
            if self.ema is not None:
                self.ema[name].copy_(laid_out(state["ema"][name], parameter))
        self.num_updates = num_updates


def _landmarks(parameter: Tensor, num_parameters: int, budget: int = 4_000_000) -> Tensor:
    """Evenly spread elements, so that watching a 12 B model move costs megabytes, not a second copy of it."""
    flat, first = local(parameter.detach()).reshape(-1), first_element(parameter)
    stride = max(1, parameter.numel() * num_parameters // budget)
    return flat[-first % stride :: stride]  # the same elements, however the weight is sharded
