"""Peak memory and operations of each phase of an iteration, counted on tensors without storage."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dancegrpo.algorithms import ReFL, build_algorithm
from dancegrpo.config import RunConfig
from dancegrpo.doctor.architectures import Architecture
from dancegrpo.doctor.counting import KINDS
from dancegrpo.doctor.judges import JudgeNetwork, judge_network
from dancegrpo.doctor.layout import ONE, Layout, layout_of
from dancegrpo.doctor.passes import Passes, Work
from dancegrpo.doctor.phases import Iteration, start_optimizer
from dancegrpo.doctor.places import PHASES, assembled
from dancegrpo.doctor.pretend import Pretender, pretended_policy
from dancegrpo.doctor.scaling import traffic
from dancegrpo.policies import Condition
from dancegrpo.policies.pipeline import PipelinePolicy
from dancegrpo.rewards import Judges, Scores
from dancegrpo.update import Updater


@dataclass(frozen=True)
class Prediction:
    """By phase: peak bytes on the device and on the host, and operations an iteration.

    Of one GPU, where several share the run. resident: what lies on the device the whole time, by what it is.
    parameters: of each network, whole. checkpoint_bytes: of all GPUs. Where device and host are one, `host` is empty.
    """

    peak: dict[str, int]
    host: dict[str, int]
    work: dict[str, Work]
    resident: dict[str, int]
    parameters: dict[str, int]
    checkpoint_bytes: int
    layout: Layout = ONE
    traffic: dict[str, int] = field(default_factory=dict)
    """Bytes that one GPU receives from others in an iteration, by what for."""

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

    def __init__(self, architecture: Architecture, device: torch.device, gpus: int | None = None) -> None:
        """gpus: of the run; None = as few as the recipe's `parallel` settings need."""
        self.architecture, self.device, self.gpus = architecture, device, gpus
        self._policies: dict[str, tuple[Pretender, PipelinePolicy]] = {}
        self._counted: dict[tuple[str, ...], dict[str, Work]] = {}
        self._conditions: dict[str, Condition] = {}

    def __call__(self, config: RunConfig) -> Prediction:
        """The prediction for a recipe. Raises ConfigError and ModelError for settings that the model cannot run."""
        layout = layout_of(config, self.gpus)
        pretender, policy = self._policy(config)
        if layout.context > 1:
            policy.require_context(layout.context)  # what the run would refuse
        judges = {name: judge_network(name, judge, pretender, self.device) for name, judge in config.rewards.items()}
        iteration = self._iteration(config, pretender, policy, judges, layout)
        work = self._work(config, iteration, judges)
        placed = assembled(config, self.device, iteration, list(judges.values()), work)
        return Prediction(*placed, layout, traffic(iteration, work, len(judges)))

    def _policy(self, config: RunConfig) -> tuple[Pretender, PipelinePolicy]:
        rollout = config.rollout.model_dump(exclude={"batch_size", "store"}, mode="json")
        key = json.dumps([config.model.model_dump(exclude={"offload", "device"}, mode="json"), rollout])
        if key not in self._policies:
            pretender = Pretender()
            policy = pretended_policy(self.architecture, config.model, config.rollout, pretender)
            self._policies = {key: (pretender, policy)}  # one is enough: its tensors are many small objects
            self._counted.clear()
            self._conditions.clear()
        return self._policies[key]

    def _iteration(
        self,
        config: RunConfig,
        pretender: Pretender,
        policy: PipelinePolicy,
        judges: dict[str, JudgeNetwork],
        layout: Layout,
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
        return Iteration(config, policy, algorithm, updater, pretender.empty, layout)

    def _work(self, config: RunConfig, iteration: Iteration, judges: dict[str, JudgeNetwork]) -> dict[str, Work]:
        run = Passes(config, iteration, judges, self.device)
        per_iteration = str(config.prompts.per_iteration)
        run.known = self._conditions.get(per_iteration)
        sampling = (
            str(config.rollout.batch_size),
            str(config.rollout.group_size),
            per_iteration,
            str(iteration.layout),
        )
        keys = {
            "encode": ("encode", per_iteration),
            "sample": ("sample", *sampling, str(config.rewards)),
            "update": ("update", *sampling, str(config.update), str(config.algorithm), str(config.advantage)),
        }
        found: dict[str, Work] = {}
        for name, key in keys.items():
            if key not in self._counted:
                self._counted[key] = getattr(run, name)()
            found |= self._counted[key]
        self._conditions[per_iteration] = run.condition
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
