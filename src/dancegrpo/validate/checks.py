"""The checks of `dancegrpo validate`: each measures one promise of a policy, and finds the cause where it breaks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dancegrpo.algorithms import GRPO
from dancegrpo.algorithms.base import Advantage
from dancegrpo.algorithms.policy_gradient import REPLAY_LIMIT, Pairs, gather
from dancegrpo.config import RunConfig
from dancegrpo.noise import normal
from dancegrpo.policies import Condition, ModelCard, load_policy
from dancegrpo.policies.pipeline import PipelinePolicy
from dancegrpo.prompts import Prompt
from dancegrpo.sampling import Trajectory, sample
from dancegrpo.settings import LoraConfig
from dancegrpo.validate import causes
from dancegrpo.validate.trace import Trace, record_decoded, trace_pipeline, trace_policy_step

REPLAY_BOUND = 1e-6
"""Largest |log-prob difference| of rollout and training forward in float32, where the batch is the same."""
ROUNDING = 1e-5
"""Largest difference in float32 that another batch size, or folded adapters, may make, of values around 1."""
HALF = 0.05
"""The same for predictions and latents in half precision, relative to their spread (root mean square)."""


@dataclass(frozen=True)
class Outcome:
    """What a check found. value: for the table. step: where it first failed. cause: in plain words, "" if it passed."""

    ok: bool
    value: str
    step: int | None = None
    cause: str = ""


class Subject:
    """What is checked: a policy, the settings it was loaded with, two prompts of different length, starting noise."""

    def __init__(self, policy: PipelinePolicy, config: RunConfig, prompts: list[Prompt]) -> None:
        self.policy, self.config, self.prompts = policy, config, prompts
        self.half = policy.dtype is not torch.float32

    @cached_property
    def noise(self) -> Tensor:
        """(1, *S) float32."""
        return normal(self.policy.latent_shape, self.config.seed, "start", [(0,)]).to(self.policy.device)

    @cached_property
    def condition(self) -> Condition:
        """The first prompt's, of length 1."""
        return self.policy.encode(self.prompts[:1])

    @cached_property
    def trace(self) -> Trace:
        """The pipeline's own run of the first prompt."""
        _ = self.condition  # what is wrong with the settings, `encode` says in words, and the pipeline does not
        return trace_pipeline(self.policy, self.prompts[:1], self.noise)

    @cached_property
    def algorithm(self) -> GRPO:
        """What rolls out and replays: the trainer's own."""
        return GRPO(self.config)

    @cached_property
    def trajectory(self) -> Trajectory:
        """One group for each prompt, every step but the last trained."""
        return self.algorithm.collect(self.policy, self.policy.encode(self.prompts), 0)

    def pairs(self, sample_: Tensor, slot: int) -> Pairs:
        """The `slot`-th trained transition of the samples (N,), as training sees it."""
        told = self.trajectory
        one = torch.ones(len(told))
        silent = torch.zeros(len(self.prompts), dtype=torch.bool)
        return gather(told, Advantage(one, one, one.bool(), {}, silent), sample_, torch.full_like(sample_, slot), None)


def equals_pipeline(subject: Subject) -> Outcome:
    """At noise level 0 the latents are the pipeline's own, bit for bit in float32."""
    policy, trace = subject.policy, subject.trace
    if len(trace.steps) != policy.dynamics.num_steps:
        count = f"the pipeline takes {len(trace.steps)} steps, the policy {policy.dynamics.num_steps}"
        return Outcome(False, "-", 0, f"{count}: state `num_inference_steps` in `_usage`")
    condition = subject.condition
    x = policy.start(subject.noise, condition)
    if x.shape != trace.steps[0].x_t.shape or not _near(subject, x, trace.steps[0].x_t):
        return Outcome(False, "-", 0, causes.of_start(x, trace.steps[0].x_t))
    cause, first = "", None
    for index, theirs in enumerate(trace.steps):
        ours = trace_policy_step(policy, x, index, condition)
        if first is None and not _near(subject, ours.x_next, theirs.x_next):
            first, cause = index, causes.of_step(policy, trace, index, ours)
        x = ours.x_next
    return Outcome(first is None, f"difference {_largest(x, trace.steps[-1].x_next):.3g}", first, cause)


def _near(subject: Subject, ours: Tensor, theirs: Tensor) -> bool:
    ours, theirs = ours.float(), theirs.float()
    if subject.policy.exact:
        return torch.equal(ours, theirs)
    if subject.half:
        return bool((ours - theirs).square().mean().sqrt() <= HALF * theirs.std())
    return torch.allclose(ours, theirs, rtol=ROUNDING, atol=ROUNDING)


def _largest(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def finite_log_probs(subject: Subject) -> Outcome:
    """The rollout's log-probs are numbers at every trained step."""
    log_prob, steps = subject.trajectory.log_prob.cpu(), subject.trajectory.step.cpu()
    odd = ~log_prob.isfinite()
    value = f"{log_prob.shape[1]} steps, {float(log_prob.min()):.3g} to {float(log_prob.max()):.3g}"
    if not odd.any():
        return Outcome(True, value)
    step = int(steps[odd].min())
    x_t = subject.trajectory.x_t.cpu()[odd & (steps == step)]
    what = "the network's prediction" if bool(x_t.isfinite().all()) else "the latent before it"
    return Outcome(False, value, step, f"{what} is not finite: look at the weights, or at a division in `predict`")


def replays(subject: Subject) -> Outcome:
    """The training forward gives the rollout's log-probs back: ratio 1, at the rollout's batch and one by one."""
    told, sizes = subject.trajectory, (subject.config.rollout.batch_size, 1)
    slots = range(told.step.shape[1])
    found = torch.stack([torch.stack([_replay(subject, slot, size).abs() for slot in slots], dim=1) for size in sizes])
    # Another batch rounds otherwise, and small noise levels magnify that: it must stay inside the trust interval.
    single_bound = subject.config.algorithm.clip_range
    bounds = (REPLAY_LIMIT, REPLAY_LIMIT) if subject.half else (REPLAY_BOUND, single_bound)
    same, single = (float(each.max()) for each in found)
    value = f"difference {same:.3g}, batch of 1 {single:.3g}"
    wrong = ~(found <= torch.tensor(bounds).reshape(2, 1, 1))
    bad = wrong.any(0)
    if not bad.any():
        return Outcome(True, value)
    cause = _of_replay(subject, bad, only_one_by_one=not wrong[0].any())
    return Outcome(False, value, int(told.step.cpu()[bad].min()), cause)


def _batches(subject: Subject, slot: int, size: int, shift: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows, own), (N,) int64 and bool: the samples at the slot in batches of `size`, each for one network alone.

    A batch keeps its size, as another one rounds otherwise: where the other network would be asked, `own` is False and
    a row of this one stands in. shift: added to the steps, of which those outside the schedule are left out.
    """
    policy, told = subject.policy, subject.trajectory
    for rows in torch.arange(len(told)).split(size):
        step = told.step[rows, slot].cpu() + shift
        inside = (step >= 0) & (step < policy.dynamics.num_steps)
        bucket = policy.bucket(step.clamp(0, policy.dynamics.num_steps - 1))
        for name in bucket[inside].unique():
            own = inside & (bucket == name)
            yield torch.where(own, rows, rows[own][0]), own


def _replay(subject: Subject, slot: int, size: int) -> Tensor:
    """Log-prob of the training forward, in batches of `size`, minus the rollout's, of all samples at the slot: (B,)."""
    found = torch.empty(len(subject.trajectory))
    for rows, own in _batches(subject, slot, size):
        # With gradients, as in training: what differs only then would otherwise go unseen.
        log_prob = subject.algorithm.log_prob(subject.policy, subject.pairs(rows, slot)).detach()
        found[rows[own]] = (log_prob - subject.trajectory.log_prob[rows, slot]).cpu()[own]
    return found


def _of_replay(subject: Subject, bad: Tensor, *, only_one_by_one: bool) -> str:
    """bad: (B, K) bool, the trained transitions that are not replayed."""
    if cause := causes.random_parts(subject.policy):
        return cause
    slots, size = bad.any(0).nonzero().flatten().tolist(), subject.config.rollout.batch_size
    if not torch.equal(_replay(subject, slots[0], size), _replay(subject, slots[0], size)):
        return "two passes over the same input differ: something in `predict` is random"
    if only_one_by_one:
        return "a row depends on the rows beside it: look for means over the batch, or for padding that is not masked"
    for slot in slots:
        steps = subject.trajectory.step[:, slot].cpu()
        for shift in causes.SHIFTS:
            difference = _replay_at(subject, slot, shift)
            known = bad[:, slot] & ~difference.isnan()
            if known.any() and bool((difference[known] <= 10 * REPLAY_BOUND).all()):
                step = int(steps[known].min())
                return f"schedule off by one: for step {step}, training asks the network about step {step - shift}"
    return "training computes another prediction than sampling: see what `predict` does only with gradients on"


def _replay_at(subject: Subject, slot: int, shift: int) -> Tensor:
    """The replay's difference if `predict` is asked about the step `shift` later, the transition staying as it was.

    (B,); NaN where there is no such step.
    """
    policy, found = subject.policy, torch.full((len(subject.trajectory),), torch.nan)
    for rows, own in _batches(subject, slot, subject.config.rollout.batch_size, shift):
        pairs = subject.pairs(rows, slot)
        prediction = policy.predict(pairs.x_t, pairs.step + shift, pairs.condition)
        gaussian = policy.dynamics.transition(pairs.x_t, prediction, pairs.step, pairs.noise_level)
        log_prob = gaussian.log_prob(pairs.x_next, reduction=subject.config.algorithm.log_prob_reduction).detach()
        found[rows[own]] = (log_prob - subject.trajectory.log_prob[rows, slot]).abs().cpu()[own]
    return found


def gradients_reach_all(subject: Subject) -> Outcome:
    """Every trainable weight has a gradient that is not 0, once the weights are moved off zeros they may start from."""
    policy = subject.policy
    weights = policy.trainable()
    rows = torch.arange(len(subject.trajectory))
    with perturbed(policy):
        for slot in range(subject.trajectory.step.shape[1]):
            bucket = policy.bucket(subject.trajectory.step[:, slot].cpu())
            for name in bucket.unique():
                pairs = subject.pairs(rows[bucket == name], slot)
                log_prob = subject.algorithm.log_prob(policy, pairs)
                if not log_prob.requires_grad:
                    cause = "no gradient leaves `predict`: it cuts them off (detach, no_grad)"
                    return Outcome(False, f"0 of {len(weights)} weights", int(pairs.step[0]), cause)
                log_prob.sum().backward()
        lacking, odd = _without_gradient(policy)
        idle = _idle(subject) if lacking else set()
    lacking = [name for name in lacking if name not in idle]
    value = f"{len(weights) - len(lacking) - len(idle)} of {len(weights)} weights"
    value += f", {len(idle)} without effect in the network itself" if idle else ""
    if odd:
        return Outcome(False, value, None, f"the gradient of {odd[0]} is not finite ({len(odd)} weights)")
    if not lacking:
        return Outcome(True, value)
    frozen = [name for name in lacking if not weights[name].requires_grad]
    more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
    told = f"no gradient reaches {', '.join(lacking[:3])}{more}: "
    if frozen:
        return Outcome(
            False, value, None, f"{told}frozen (requires_grad=False), thaw them or leave them out of `trainable`"
        )
    return Outcome(
        False, value, None, f"{told}`predict` cuts them off (detach, no_grad), or asks only part of the networks"
    )


def _without_gradient(policy: PipelinePolicy) -> tuple[list[str], list[str]]:
    """Names of the weights whose gradient is missing or 0, and of those where it is not finite; clears them all."""
    lacking, odd = [], []
    for name, weight in policy.trainable().items():
        if weight.grad is None or not bool(weight.grad.any()):
            lacking.append(name)
        elif not bool(weight.grad.isfinite().all()):
            odd.append(name)
        weight.grad = None
    return lacking, odd


def _idle(subject: Subject) -> set[str]:
    """Weights that get no gradient from the network's own output either: some architectures have such (the text half of
    a last block, say). The network is called as the pipeline calls it."""
    policy = subject.policy
    frozen = [weight for weight in policy.trainable().values() if not weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        for step in subject.trace.steps[:-1]:
            for call in step.calls:
                with policy.autocast():
                    out = policy.modules[call.network](**call.arguments)
                out = out[0] if isinstance(out, tuple) else out.sample
                (
                    out.float() * torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape)
                ).sum().backward()
        return set(_without_gradient(policy)[0])
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


@contextmanager
def perturbed(policy: PipelinePolicy, zeros: float = 0.01) -> Iterator[None]:
    """Within it, every trained weight is moved a little: gradients that are 0 at zeros (LoRA's A at B = 0) show.

    zeros: standard deviation of what weights that are 0 become.
    """
    random = torch.Generator(policy.device).manual_seed(0)
    moved = {}
    for name, weight in policy.trainable().items():
        scale = 0.05 * weight.detach().square().mean().sqrt() + zeros
        moved[name] = weight.detach() + scale * torch.randn(weight.shape, generator=random, device=weight.device)
    with policy.use_weights(moved):
        yield


def batches_equal_singles(subject: Subject) -> Outcome:
    """Prompts of different length in one batch get the predictions that they get alone."""
    policy, prompts = subject.policy, subject.prompts
    together, alone = policy.encode(prompts), [policy.encode([prompt]) for prompt in prompts]
    x = policy.start(
        normal(policy.latent_shape, 0, "start", [(i,) for i in range(len(prompts))]).to(policy.device), together
    )
    largest, first = 0.0, None
    for step in range(policy.dynamics.num_steps):
        difference = _batch_difference(policy, x, step, together, alone, relative=subject.half)
        largest = max(largest, difference)
        if first is None and not difference <= (HALF if subject.half else ROUNDING):
            first = step
    value = f"difference {largest:.3g}"
    if first is None:
        return Outcome(True, value)
    cause = (
        "a prompt's prediction depends on the prompt beside it: mask the padding of the shorter one, "
        "and keep the mask in the condition"
    )
    return Outcome(False, value, first, causes.random_parts(policy) or cause)


@torch.no_grad()
def _batch_difference(
    policy: PipelinePolicy, x: Tensor, step: int, together: Condition, alone: list[Condition], *, relative: bool
) -> float:
    rows = torch.full((len(x),), step, dtype=torch.int64, device=x.device)
    batch = policy.predict(x, rows, together)
    single = torch.cat([policy.predict(x[i : i + 1], rows[:1], condition) for i, condition in enumerate(alone)])
    if relative:
        return float((batch - single).square().mean().sqrt() / single.std())
    return float((batch - single).abs().max() / single.abs().max().clamp(min=1))


def decodes(subject: Subject) -> Outcome:
    """Decoded media are the pipeline's own: finite, in [0, 1], of its shape; bit for bit in float32."""
    policy, trace = subject.policy, subject.trace
    assert trace.media is not None
    latents = trace.steps[-1].x_next.float()
    with torch.no_grad(), record_decoded(policy) as decoded:
        media = policy.decode(latents, subject.condition)
    value = f"{tuple(media.shape[1:])}, {float(media.min()):.3g} to {float(media.max()):.3g}"
    cause = ""
    if media.shape != trace.media.shape:
        cause = f"shape {list(media.shape)} where the pipeline gives {list(trace.media.shape)} (B, F, 3, H, W)"
    elif not bool(media.isfinite().all()):
        cause = (
            "the media are not finite: look at the autoencoder's dtype (`vae_dtypes`) and at the scaling in `decode`"
        )
    elif float(media.min()) < 0 or float(media.max()) > 1:
        cause = "the media leave [0, 1]: use `self._decode`, which maps the decoder's -1 to 1"
    elif not subject.half and not torch.equal(media, trace.media):
        value += f", difference {_largest(media, trace.media):.3g}"
        cause = causes.of_media(decoded[0] if decoded else None, trace.decoded, policy.pipeline.vae.config)
    return Outcome(not cause, value, None, cause)


def lora_round_trips(subject: Subject, free: Callable[[], None]) -> Outcome:
    """Exported adapters, loaded by diffusers into the untrained pipeline, give the policy's latents.

    free: called when the subject's own policy is no longer needed, so that one copy of the model is held at a time.
    """
    model, rollout, prompts = subject.policy.model, subject.config.rollout, subject.prompts[:1]
    noise, half = subject.noise, subject.half
    adapters = model.lora or LoraConfig(rank=4, alpha=8)
    free()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "lora"
        trained: Any = load_policy(model.model_copy(update={"lora": adapters}), rollout)
        condition = trained.encode(prompts)
        before = sample(trained, condition, noise)
        with perturbed(trained, zeros=0.1):
            ours = sample(trained, condition, noise)
            trained.export(out, ModelCard("base", "validate", 0, ()))
        del trained
        plain: Any = load_policy(model.model_copy(update={"lora": None}), rollout)
        plain.load_adapters(out)
        # By the policy, whose sampler another check holds against the pipeline's: here the adapters alone are judged.
        theirs = sample(plain, condition, noise)
    difference, effect = _largest(ours, theirs), _largest(ours, before)
    value = f"difference {difference:.3g}, effect {effect:.3g}"
    bound = HALF * float(ours.std()) if half else min(ROUNDING * max(1.0, float(ours.abs().max())), effect / 20)
    if not effect > 0:
        cause = "the adapters change nothing: name layers that take part (model.lora.target_modules)"
        return Outcome(False, value, None, cause)
    if difference <= bound:
        return Outcome(True, value)
    return Outcome(False, value, None, _of_lora(plain, _largest(theirs, before), effect))


def _of_lora(plain: Any, loaded_effect: float, effect: float) -> str:
    loaded = sum(1 for module in plain.modules.values() for name, _ in module.named_parameters() if ".lora_" in name)
    if not loaded or loaded_effect < effect / 20:
        return "diffusers loaded no adapter: it looks for other names, see the pipeline's save_lora_weights"
    return f"diffusers loaded {loaded} tensors that act otherwise: look at alpha / rank, and at the names it saved"
