"""Peak memory and operations of each phase of an iteration, counted on tensors without storage."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dancegrpo.algorithms import ReFL, build_algorithm
from dancegrpo.config import RunConfig
from dancegrpo.doctor.architectures import Architecture
from dancegrpo.doctor.counting import KINDS, Counter
from dancegrpo.doctor.judges import JudgeNetwork, judge_network
from dancegrpo.doctor.phases import Iteration, resident, start_optimizer
from dancegrpo.doctor.pretend import Pretender, autocast_of, pretended_policy
from dancegrpo.policies import Condition
from dancegrpo.policies.pipeline import PipelinePolicy
from dancegrpo.prompts import Prompt
from dancegrpo.rewards import Judges, Scores
from dancegrpo.update import Updater

PHASES = ("load", "encode", "rollout", "decode", "score", "update", "save")
"""In the order of a run."""


@dataclass(frozen=True)
class Work:
    """What one repetition of a phase needs beside what is resident. flops: by kind. times: repetitions an iteration."""

    activation_bytes: int
    flops: dict[str, int]
    times: float


@dataclass(frozen=True)
class Prediction:
    """By phase: peak bytes on the device and on the host, and operations an iteration.

    resident: what lies on the device the whole time, by what it is. parameters: of each network. Where device and host
    are one, `host` is empty.
    """

    peak: dict[str, int]
    host: dict[str, int]
    work: dict[str, Work]
    resident: dict[str, int]
    parameters: dict[str, int]
    checkpoint_bytes: int

    @property
    def iteration_peak(self) -> int:
        """Of an iteration: no phase needs more."""
        return max(self.peak[phase] for phase in PHASES if phase not in ("load", "save"))

    def flops(self, phase: str) -> dict[str, int]:
        """Operations of a phase in an iteration."""
        work = self.work.get(phase)
        return dict.fromkeys(KINDS, 0) if work is None else {k: int(n * work.times) for k, n in work.flops.items()}


class Predictor:
    """Predicts recipes of one model, remembering every pass that was counted: settings tried twice cost nothing."""

    def __init__(self, architecture: Architecture, device: torch.device) -> None:
        self.architecture, self.device = architecture, device
        self._policies: dict[str, tuple[Pretender, PipelinePolicy]] = {}
        self._counted: dict[tuple[str, ...], dict[str, Work]] = {}

    def __call__(self, config: RunConfig) -> Prediction:
        """The prediction for a recipe. Raises ConfigError and ModelError for settings that the model cannot run."""
        pretender, policy = self._policy(config)
        judges = {name: judge_network(name, judge, pretender) for name, judge in config.rewards.items()}
        iteration = self._iteration(config, pretender, policy, judges)
        work = self._work(config, iteration, pretender, judges)
        return _assembled(config, self.device, iteration, list(judges.values()), work)

    def _policy(self, config: RunConfig) -> tuple[Pretender, PipelinePolicy]:
        rollout = config.rollout.model_dump(exclude={"batch_size", "store"}, mode="json")
        key = json.dumps([config.model.model_dump(exclude={"offload", "device"}, mode="json"), rollout])
        if key not in self._policies:
            pretender = Pretender()
            policy = pretended_policy(self.architecture, config.model, config.rollout, pretender)
            self._policies = {key: (pretender, policy)}  # one is enough: its tensors are many small objects
            self._counted.clear()
        return self._policies[key]

    def _iteration(
        self, config: RunConfig, pretender: Pretender, policy: PipelinePolicy, judges: dict[str, JudgeNetwork]
    ) -> Iteration:
        panel: Any = _Panel(config, judges)
        algorithm: Any = build_algorithm(config, panel)
        if isinstance(algorithm, ReFL):
            algorithm.judges, algorithm.watching = panel, _Panel(config, {})
        if config.algorithm.name == "nft":
            algorithm.old = {name: pretender.like(weight) for name, weight in policy.trainable().items()}
        policy._references = {}
        if algorithm.needs_reference:
            policy.keep_reference()
        updater = Updater(policy, config)
        start_optimizer(updater, pretender.like)
        return Iteration(config, policy, algorithm, updater, pretender.empty)

    def _work(
        self, config: RunConfig, iteration: Iteration, pretender: Pretender, judges: dict[str, JudgeNetwork]
    ) -> dict[str, Work]:
        run = _Counting(config, iteration, judges, self.device)
        sampling = (str(config.rollout.batch_size), str(config.rollout.group_size), str(config.prompts.per_iteration))
        keys = {
            "encode": ("encode", str(config.prompts.per_iteration)),
            "sample": ("sample", *sampling, str(sorted(config.rewards))),
            "update": ("update", *sampling, str(config.update), str(config.algorithm), str(config.advantage)),
        }
        found: dict[str, Work] = {}
        for name, key in keys.items():
            if key not in self._counted:
                self._counted[key] = getattr(run, name)()
            found |= self._counted[key]
        return found


class _Panel(Judges):
    """Judges whose verdicts have no values."""

    def __init__(self, config: RunConfig, networks: dict[str, JudgeNetwork]) -> None:
        self.networks = networks
        unseen: dict[str, Any] = {name: _Differentiable() for name in networks}
        self.rewards = unseen
        self.weights = {name: config.rewards[name].weight for name in networks}

    def score(self, media: Tensor, prompts: Any) -> dict[str, Scores]:
        """As `Judges.score`."""
        valid = torch.ones(len(media), dtype=torch.bool)
        return {name: Scores(network.look(media), valid) for name, network in self.networks.items()}


class _Differentiable:
    differentiable, batch_size = True, None


class _Counting:
    """Each phase once, with everything alive that is alive in a run."""

    def __init__(
        self, config: RunConfig, iteration: Iteration, judges: dict[str, JudgeNetwork], device: torch.device
    ) -> None:
        self.config, self.iteration, self.judges, self.device = config, iteration, judges, device
        self.networks = [judge.network for judge in judges.values() if judge.network is not None]
        self._condition: Condition | None = None

    @property
    def condition(self) -> Condition:
        """Of an iteration's prompts."""
        if self._condition is None:
            self.encode()
        assert self._condition is not None
        return self._condition

    def encode(self) -> dict[str, Work]:
        iteration, prompts = self.iteration, self.config.prompts.per_iteration
        with self._count() as counter:
            one = iteration.encode(self._prompt())
        self._condition = condition = iteration.conditions(one)
        # While the last prompt is encoded the others' conditions are there; then they are put together.
        size = sum(tensor.nbytes for tensor in condition.tensors.values())
        return {"encode": Work(max(counter.grown + size, 3 * size), counter.flops, prompts)}

    def sample(self) -> dict[str, Work]:
        """Rollout, decode and score."""
        iteration = self.iteration
        nothing = dict.fromkeys(("rollout", "decode", "score"), Work(0, dict.fromkeys(KINDS, 0), 0))
        if self.config.offline:
            return nothing
        refl = isinstance(iteration.algorithm, ReFL)
        batches, held = iteration.samples / iteration.batch, self._rollout_bytes()
        with self._count() as counter:
            kept = iteration.kept()
            base = counter.live
            counter.restart()
            x = iteration.steps(self.condition, kept, [min(1, self.config.rollout.num_steps - 1)])
            steps, flops = counter.restart() - base, counter.flops
        found = {"rollout": Work(held + steps, flops, batches * self.config.rollout.num_steps)}
        del kept
        if refl:  # decodes and scores while it learns
            return nothing | found
        with self._count([x]) as counter:
            media = iteration.decode(x, self.condition)
            decoding = counter.grown
        found["decode"] = Work(held + x.nbytes + self._waiting(media) + decoding, counter.flops, batches)
        found["score"] = self._score(media, held)
        return nothing | found

    def _score(self, media: Tensor, held: int) -> Work:
        """All judges on as much as one asks for at once; per iteration as often as its samples need."""
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
        return Work(held + self._waiting(media) + media.nbytes + peak, flops, 1)

    def update(self) -> dict[str, Work]:
        iteration, config = self.iteration, self.config
        for parameter in iteration.updater.parameters.values():
            parameter.grad = _like(iteration, parameter)
        kept = None if config.offline else iteration.kept()
        x0 = None if config.offline else iteration.make(iteration.samples, *iteration.policy.latent_shape)
        learning = iteration.learning(self.condition, kept, x0)
        batches = [micro_batch for part in iteration.micro_batches(learning) for micro_batch in part]
        largest = max(batches, key=lambda micro_batch: len(micro_batch[0]))
        gradients = [p.grad for p in iteration.updater.parameters.values() if p.grad is not None]
        with self._count(gradients) as counter:
            iteration.backward(learning, largest)
        known = sum(gradient.nbytes for gradient in gradients) + self._rollout_bytes(start=False)
        times = sum(len(micro_batch[0]) for micro_batch in batches) / len(largest[0])
        for parameter in iteration.updater.parameters.values():
            parameter.grad = None
        return {"update": Work(known + counter.grown, counter.flops, times)}

    def _count(self, more: Iterable[Tensor] = ()) -> Any:
        held = [*resident(self.iteration, self.networks), *more]
        if self._condition is not None:
            held += self._condition.tensors.values()
        gc.collect()
        return _Around(Counter(held), self.device)

    def _rollout_bytes(self, *, start: bool = True) -> int:
        """Conditions, starting noise, final latents and what is kept of the transitions."""
        iteration, rows = self.iteration, self.iteration.samples
        latent = 4 * torch.Size(iteration.policy.latent_shape).numel()
        condition = sum(tensor.nbytes for tensor in self.condition.tensors.values())
        copies = 3 if getattr(iteration.algorithm, "keep", "") == "means" else 2
        transitions = copies * iteration.plan.trained.numel() * latent
        return condition + rows * latent * (2 if start else 1) + transitions

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


def _like(iteration: Iteration, parameter: nn.Parameter) -> Tensor:
    made = iteration.make(*parameter.shape)
    return made if parameter.dtype == torch.float32 else made.to(parameter.dtype)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _assembled(
    config: RunConfig, device: torch.device, iteration: Iteration, judges: list[JudgeNetwork], work: dict[str, Work]
) -> Prediction:
    """Where everything lies: what is resident, what is lent while it works, what waits in the host's memory."""
    policy, updater = iteration.policy, iteration.updater
    apart = device.type != "cpu"
    networks = policy._networks()
    sizes = {name: _bytes([*part.parameters(), *part.buffers()]) for name, part in networks.items()}
    lent = {n: s for n, s in sizes.items() if n not in policy.modules} if config.model.offload and apart else {}
    weights = {name: size for name, size in sizes.items() if name not in lent}
    references = _bytes(t for part in policy._references.values() for t in part.parameters())
    moments = _bytes(t for state in updater.optimizer.state.values() for t in state.values())
    averages = _bytes([*(updater.ema or {}).values(), *updater._landmarks.values()])
    averages += _bytes((getattr(iteration.algorithm, "old", None) or {}).values())
    judged = sum(judge.parameter_bytes for judge in judges)
    judged += _bytes(t for judge in judges if judge.network for t in judge.network.parameters())
    told = {**weights, "reference": references, "optimizer": moments, "averages": averages, "judges": judged}
    always = sum(told.values())
    lent_to = {phase: sum(lent.get(name, 0) for name in names) for phase, names in _users(iteration).items()}
    latents = 4 * torch.Size(policy.latent_shape).numel() * iteration.plan.trained.numel()
    waiting = latents * (3 if getattr(iteration.algorithm, "keep", "") == "means" else 2)
    hosted = waiting if config.rollout.store == "host" and apart else 0
    using = ("rollout", "decode", "score", "update")
    peak = {"load": always - moments, "save": always}
    for phase, needed in work.items():
        peak[phase] = always + lent_to.get(phase, 0)
        peak[phase] += needed.activation_bytes - (hosted if phase in using and needed.times else 0)
    host = {phase: sum(lent.values()) + (hosted if phase in using else 0) for phase in PHASES} if apart else {}
    if apart:
        host["load"] = sum(sizes.values())
    saved = _bytes(updater.parameters.values()) + moments + _bytes((updater.ema or {}).values())
    if apart:
        host["save"] += max(_bytes(updater.parameters.values()), moments // 2)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in networks.items()}
    return Prediction({p: peak[p] for p in PHASES}, host, work, told, counts, saved)


def _users(iteration: Iteration) -> dict[str, list[str]]:
    """The parts that a phase wakes where they are offloaded."""
    policy = iteration.policy
    encoders = [*policy.encoders, *(["vae"] if policy.takes_image else [])]
    learning = ["vae"] if isinstance(iteration.algorithm, ReFL) or iteration.config.offline else []
    return {"encode": encoders, "decode": ["vae"], "update": learning}
