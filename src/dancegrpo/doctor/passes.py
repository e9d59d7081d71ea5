"""Each phase of an iteration run once on pretended tensors, and what it made counted."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dancegrpo.algorithms import ReFL
from dancegrpo.config import RunConfig
from dancegrpo.doctor.counting import KINDS, Counter
from dancegrpo.doctor.judges import JudgeNetwork
from dancegrpo.doctor.phases import Iteration, resident
from dancegrpo.doctor.pretend import autocast_of
from dancegrpo.health import Looks
from dancegrpo.policies import Condition
from dancegrpo.prompts import Prompt


@dataclass(frozen=True)
class Work:
    """A phase on one GPU. held: bytes that wait for it, or from it. made: bytes of one repetition while it works.

    flops: of one repetition, by kind. times: repetitions an iteration. micro_batches: of an optimizer step. calls,
    backwards: of denoisers in a repetition, all and those with a backward pass. attended: bytes into and out of
    attention in a repetition, of whole sequences.
    """

    held: int
    made: int
    flops: dict[str, int]
    times: float
    micro_batches: int = 1
    calls: int = 0
    backwards: int = 0
    attended: int = 0


class Passes:
    """Each phase once, with everything alive that is alive in a run."""

    def __init__(
        self,
        config: RunConfig,
        iteration: Iteration,
        judges: dict[str, JudgeNetwork],
        device: torch.device,
    ) -> None:
        self.config, self.iteration, self.judges = config, iteration, judges
        self.device, self.layout = device, iteration.layout
        self.networks = [judge.network for judge in judges.values() if judge.network is not None]
        self.known: Condition | None = None

    @property
    def condition(self) -> Condition:
        """Of an iteration's prompts: what `encode` gave, or what is `known`."""
        if self.known is None:
            self.encode()
        assert self.known is not None
        return self.known

    def encode(self) -> dict[str, Work]:
        """The prompts one by one; every GPU encodes all of them."""
        iteration, prompts = self.iteration, self.config.prompts.per_iteration
        with self._count() as counter:
            one = iteration.encode(self._prompt())
        self.known = condition = iteration.conditions(one)
        # While the last prompt is encoded the others' conditions are there; then they are put together.
        size = sum(tensor.nbytes for tensor in condition.tensors.values())
        return {"encode": Work(0, max(counter.grown + size, 3 * size), counter.flops, prompts)}

    def sample(self) -> dict[str, Work]:
        """Rollout, decode and score."""
        iteration = self.iteration
        nothing = dict.fromkeys(("rollout", "decode", "score"), Work(0, 0, dict.fromkeys(KINDS, 0), 0))
        if self.config.offline:
            return nothing
        batches, held = iteration.samples / iteration.batch, self._rollout_bytes()
        with self._count() as counter, self._calls() as calls:
            kept = iteration.kept(iteration.samples)
            base = counter.live
            counter.restart()
            x = iteration.steps(self.condition, kept, [min(1, self.config.rollout.num_steps - 1)])
            steps, flops = counter.restart() - base, counter.flops
        made = {"calls": len(calls), "attended": counter.attended}
        times = batches * self.config.rollout.num_steps
        found = {"rollout": Work(held, steps // self.layout.context, self._shared(flops), times, **made)}
        del kept
        if isinstance(iteration.algorithm, ReFL):  # decodes and scores while it learns
            return nothing | found
        with self._count([x]) as counter:
            media = iteration.decode(x, self.condition)
            decoding = counter.grown
        found["decode"] = Work(held + x.nbytes + self._waiting(media), decoding, counter.flops, batches)
        found["score"] = self._score(media, held)
        return nothing | found

    def _score(self, media: Tensor, held: int) -> Work:
        """All judges on as much as one asks for at once, as often as its samples need; then what watches pictures."""
        samples, peak, flops = self.iteration.samples, 0, dict.fromkeys(KINDS, 0)
        for judge in self.judges.values():
            size = min(judge.batch or samples, samples)
            shown = self.iteration.make(size, *media.shape[1:])
            with self._count([shown]) as counter, torch.no_grad():
                _ = ((shown >= 0) & (shown <= 1)).flatten(1).all(1)
                judge.look(shown)
            peak = max(peak, counter.grown + judge.activation_bytes)
            for kind, count in counter.flops.items():
                flops[kind] += int(count * samples / size)
        if self.config.health.watch != "none":
            with self._count([media]) as counter:
                Looks().add(media)
            peak = max(peak, counter.grown)
        return Work(held + self._waiting(media) + media.nbytes, peak, flops, 1)

    def update(self) -> dict[str, Work]:
        """The largest micro-batch; gradients, which are there too, are not in `held`."""
        iteration, config = self.iteration, self.config
        parameters = iteration.updater.parameters.values()
        for parameter in parameters:
            parameter.grad = like(iteration, parameter)
        kept = None if config.offline else iteration.kept(iteration.total)
        x0 = None if config.offline else iteration.make(iteration.total, *iteration.policy.latent_shape)
        learning = iteration.learning(self.condition, kept, x0)
        items = [self.layout.items(len(part.sample)) for part in learning.parts]
        size = min(config.update.micro_batch_size, max(items))
        batches = (batch for part in learning.parts for batch in iteration.micro_batches(learning, part, size))
        largest = max(batches, key=lambda batch: len(batch[0]))
        known = [p.grad for p in parameters if p.grad is not None]
        known += [t for t in (*(vars(kept).values() if kept else ()), x0) if isinstance(t, Tensor)]
        with self._count(known) as counter, self._calls() as calls:
            iteration.backward(learning, largest)
        for parameter in parameters:
            parameter.grad = None
        count, times = max(math.ceil(each / size) for each in items), sum(items) / len(largest[0])
        held, made = self._rollout_bytes(start=False), counter.grown // self.layout.context
        flops = self._shared(counter.flops)
        seen = {"calls": len(calls), "backwards": sum(calls), "attended": counter.attended}
        return {"update": Work(held, made, flops, times, count, **seen)}

    def _shared(self, flops: dict[str, int]) -> dict[str, int]:
        """Of a denoiser's operations those of one GPU: ranks that compute a sample together each do a piece."""
        return {kind: count // self.layout.context for kind, count in flops.items()}

    @contextmanager
    def _calls(self) -> Iterator[list[bool]]:
        """Within it, notes every call of a denoiser, and whether a backward pass follows."""
        policy, found = self.iteration.policy, list[bool]()

        def called(*_: object) -> None:
            found.append(torch.is_grad_enabled())

        networks = [*policy.modules.values(), *policy._references.values()]
        hooks = [network.register_forward_pre_hook(called) for network in networks]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    def _count(self, more: Iterable[Tensor] = ()) -> Any:
        held = [*resident(self.iteration, self.networks), *more]
        if self.known is not None:
            held += self.known.tensors.values()
        gc.collect()
        return _Around(Counter(held), self.device)

    def _rollout_bytes(self, *, start: bool = True) -> int:
        """Conditions, final latents, what is kept of the transitions, and where it is here, the starting noise."""
        iteration, rows = self.iteration, self.iteration.samples
        latent = 4 * torch.Size(iteration.policy.latent_shape).numel()
        condition = sum(tensor.nbytes for tensor in self.condition.tensors.values())
        noise = iteration.total * latent if start and self.device.type == "cpu" else 0  # drawn on the host
        return condition + noise + rows * latent + iteration.transition_bytes

    def _waiting(self, media: Tensor) -> int:
        """Bytes of media that wait for the judge with the largest batch, beside the last ones made."""
        samples = self.iteration.samples
        most = max((min(judge.batch or samples, samples) for judge in self.judges.values()), default=0)
        each = media.nbytes // max(1, len(media))
        return max(0, -(-most // len(media)) * len(media) - len(media)) * each

    def _prompt(self) -> Prompt:
        model = self.config.model
        if not self.iteration.policy.takes_image:
            return Prompt(0, "a picture")
        from PIL import Image

        return Prompt(0, "a picture", image=Image.new("RGB", (model.width, model.height)))


class _Around:
    """A counter, and around it what the device's arithmetic differs in."""

    def __init__(self, counter: Counter, device: torch.device) -> None:
        self.counter, self.arithmetic = counter, autocast_of(device)

    def __enter__(self) -> Counter:
        self.arithmetic.__enter__()
        return self.counter.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.counter.__exit__(*error)
        self.arithmetic.__exit__(*error)


def like(iteration: Iteration, parameter: nn.Parameter) -> Tensor:
    """A pretended tensor of a parameter's size."""
    made = iteration.make(*parameter.shape)
    return made if parameter.dtype == torch.float32 else made.to(parameter.dtype)
