"""From a scored batch to optimizer steps: accumulation, clipping, the moving average."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dancegrpo.algorithms import Learning, Part
from dancegrpo.config import RunConfig
from dancegrpo.distributed import ALONE, World
from dancegrpo.errors import OutOfMemoryError
from dancegrpo.faults import MicroBatchSize, free_memory, is_out_of_memory, memory_advice
from dancegrpo.health.guard import Guard
from dancegrpo.policies.base import Policy
from dancegrpo.sharding import InParts, first_element, laid_out, local, whole


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
        self.micro_batch = MicroBatchSize(config.update.micro_batch_size)
        self._landmarks = {name: _landmarks(p, len(self.parameters)).clone() for name, p in self.parameters.items()}

    def update(self, learning: Learning) -> dict[str, float | None]:
        """One optimizer step per part. Returns the metrics under `train/` and `pairs/`.

        A gradient that is not finite, or spikes, changes nothing and is counted.
        """
        losses, norms, made, rate = [], [], 0, self._learning_rate()
        for index, part in enumerate(learning.parts):
            if not len(part.sample):
                continue
            losses.append(self.accumulate(part, learning, index))
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

    def accumulate(self, part: Part, learning: Learning, index: int = 0) -> Tensor:
        """Gradients of one part's loss, whatever the micro-batch; returns the loss. index: of the part.

        Where memory runs out it is tried once more with half the micro-batch, which is kept. Raises OutOfMemoryError
        where that does not help, or cannot be: the others of sharded ranks are in the middle of a forward pass.
        """
        world, step = self.world, (self.world.place.iteration or 0, index)
        size, items = self.micro_batch.at(*step), int(learning.owner[part.sample].bincount().max())
        total, short = self._tried(part, learning, size)
        if world.together:
            if short and min(size, items) > 1:
                self.micro_batch.halve(*step, items)  # for a restart
        elif world.any(bool(short)):  # all ranks go back, or their sizes part
            short = short or "on another rank"
            if min(size, items) > 1:
                total, short = self._tried(part, learning, self.micro_batch.halve(*step, items))
                short = short or ("on another rank" if world.any(bool(short)) else "")
        if short:
            raise OutOfMemoryError(memory_advice(short, self.config, self.world.place))
        self.world.sum_gradients(list(self.parameters.values()))
        return self.world.sum(total.reshape(1))[0]

    def _tried(self, part: Part, learning: Learning, size: int) -> tuple[Tensor, str]:
        """This rank's share of a part's loss, its gradients added up; and the allocator's words where it had no more,
        with nothing left of the attempt."""
        self.optimizer.zero_grad(set_to_none=True)
        noted, short = learning.mark(), ""
        try:
            return self._passes(part, learning, size), ""
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            short = str(error) or type(error).__name__
            free_memory(error)
        finally:
            learning.silent = False
        learning.forget(noted)
        self.optimizer.zero_grad(set_to_none=True)
        return torch.zeros((), device=self.policy.device), short

    def _passes(self, part: Part, learning: Learning, size: int) -> Tensor:
        total = torch.zeros((), device=self.policy.device)
        each = self.config.parallel.reduce == "each"
        for batch in learning.micro_batches(part, size):
            learning.silent = not batch.counts
            with (
                self.policy.accumulating(last=each or batch.last),  # of its bucket: another may be another network's
                self.policy.company(None if batch.counts else batch.bucket),
            ):
                total += self._backward(learning, batch.sample, batch.slot, part.scale if batch.counts else 0.0)
        return total

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
            self.policy.reshard()  # passes without a gradient leave weights gathered, which would then be the old ones
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
            moved, start = self.world.sum_of_ranks(torch.tensor([moved, start], dtype=torch.float64)).tolist()
        return math.sqrt(moved / start) if start else math.sqrt(moved)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Tensors to resume from, as they lie, by kind and parameter name: weights, exp_avg, exp_avg_sq, step, ema."""
        state = {"weights": {name: p.detach() for name, p in self.parameters.items()}}
        known = {name: self.optimizer.state[p] for name, p in self.parameters.items() if p in self.optimizer.state}
        for kind in ("exp_avg", "exp_avg_sq", "step"):
            state[kind] = {name: held[kind] for name, held in known.items()}
        if self.ema is not None:
            state["ema"] = dict(self.ema)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor | InParts]], num_updates: int) -> None:
        """Restores `state_dict` in place, on any number of ranks."""
        self.policy.reshard()
        self.optimizer.state.clear()  # weights that had no moments then have none
        for name, parameter in self.parameters.items():
            parameter.copy_(laid_out(state["weights"][name], parameter))
            if name in state["step"]:
                held = {kind: laid_out(state[kind][name], parameter, copy=True) for kind in ("exp_avg", "exp_avg_sq")}
                step = torch.zeros((), device=local(parameter).device)
                self.optimizer.state[parameter] = held | {"step": laid_out(state["step"][name], step, copy=True)}
            if self.ema is not None:
                self.ema[name].copy_(laid_out(state["ema"][name], parameter))
        self.num_updates = num_updates


def _landmarks(parameter: Tensor, num_parameters: int, budget: int = 4_000_000) -> Tensor:
    """Evenly spread elements, so that watching a 12 B model move costs megabytes, not a second copy of it."""
    flat, first = local(parameter.detach()).reshape(-1), first_element(parameter)
    stride = max(1, parameter.numel() * num_parameters // budget)
    return flat[-first % stride :: stride]  # the same elements, however the weight is sharded
