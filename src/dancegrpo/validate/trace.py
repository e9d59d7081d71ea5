"""What a diffusers pipeline does, written down while it runs: each step's latents, what the networks are told."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dancegrpo.policies.pipeline import PipelinePolicy
from dancegrpo.prompts import Prompt
from dancegrpo.sde import FlowDynamics


@dataclass(frozen=True)
class Call:
    """One forward pass of a denoiser. arguments: by name, tensors as copies."""

    network: str
    arguments: Mapping[str, Any]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The arguments that are tensors."""
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Step:
    """One transition. x_t, x_next: (B, *S). prediction: velocity or noise, guidance included, (B, *S)."""

    x_t: Tensor
    x_next: Tensor
    prediction: Tensor
    calls: tuple[Call, ...]


@dataclass
class Trace:
    """A pipeline's run. media: (B, F, 3, H, W). decoded: what its autoencoder was given. schedule: (T + 1,) sigmas of a
    flow, (T,) timesteps of a diffusion model."""

    steps: list[Step] = field(default_factory=list)
    media: Tensor | None = None
    decoded: Tensor | None = None
    schedule: Tensor | None = None


def trace_pipeline(policy: PipelinePolicy, prompts: Sequence[Prompt], noise: Tensor) -> Trace:
    """Runs the pipeline of `policy` from noise (B, *S) with the scheduler of noise level 0."""
    scheduler, trace = policy.pipeline_scheduler(), Trace()
    original = scheduler.step
    with record_calls(policy) as calls, record_decoded(policy) as decoded:

        @functools.wraps(original)  # pipelines look at the names of its arguments
        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            out = original(model_output, timestep, sample, *args, **kwargs)
            x_next = out[0] if isinstance(out, tuple) else out.prev_sample
            prediction = _epsilon(scheduler, model_output.float(), timestep, sample.float())
            before, after, told = (policy.pipeline_state(state).clone() for state in (sample, x_next, prediction))
            trace.steps.append(Step(before, after, told, tuple(calls)))
            calls.clear()
            return out

        scheduler.step = step
        trace.media = policy.run_pipeline(prompts, noise, scheduler)
    trace.decoded = decoded[0] if decoded else None
    is_flow = isinstance(policy.dynamics, FlowDynamics)
    trace.schedule = scheduler.sigmas if is_flow else scheduler.timesteps
    return trace


def _epsilon(scheduler: Any, output: Tensor, timestep: Any, x_t: Tensor) -> Tensor:
    """The network's output as the policies predict it: v is solved for epsilon (arXiv:2202.00512)."""
    if scheduler.config.get("prediction_type") != "v_prediction":
        return output.clone()
    alpha_bar = scheduler.alphas_cumprod[int(timestep)].to(output.device)
    return alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * x_t


@contextmanager
def record_calls(policy: PipelinePolicy) -> Iterator[list[Call]]:
    """Within it, every forward pass of the policy's denoisers is appended to the list."""
    calls: list[Call] = []
    with ExitStack() as stack:
        for name, module in policy.modules.items():
            hook = functools.partial(_note, calls, name, inspect.signature(module.forward))
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield calls


def _note(
    calls: list[Call], name: str, signature: inspect.Signature, module: Any, args: tuple[Any, ...], kwargs: Any
) -> None:
    told = signature.bind(*args, **kwargs).arguments
    told = {**{n: v for n, v in told.items() if n != "kwargs"}, **told.get("kwargs", {})}
    calls.append(Call(name, {n: v.detach().clone() if isinstance(v, Tensor) else v for n, v in told.items()}))


@contextmanager
def record_decoded(policy: PipelinePolicy) -> Iterator[list[Tensor]]:
    """Within it, what the autoencoder is asked to decode is appended to the list."""
    vae, decoded = policy.pipeline.vae, list[Tensor]()
    original = vae.decode

    @functools.wraps(original)
    def decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        decoded.append(z.detach().float().clone())
        return original(z, *args, **kwargs)

    vae.decode = decode
    try:
        yield decoded
    finally:
        del vae.decode  # the class's own shows again


@torch.no_grad()
def trace_policy_step(policy: PipelinePolicy, x_t: Tensor, step: int, condition: Any) -> Step:
    """One deterministic step of the policy itself from x_t (B, *S)."""
    rows = torch.full((len(x_t),), step, dtype=torch.int64, device=x_t.device)
    with record_calls(policy) as calls:
        prediction = policy.predict(x_t, rows, condition)
    silent = torch.zeros(len(x_t), device=x_t.device)
    x_next = policy.dynamics.transition(x_t, prediction, rows, silent).mean
    return Step(x_t, x_next, prediction, tuple(calls))
