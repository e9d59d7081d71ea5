"""Likely causes, in plain words: from what the pipeline did and what the policy did at the first step that differs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dancegrpo.policies.pipeline import PipelinePolicy
from dancegrpo.sde import FlowDynamics
from dancegrpo.validate.trace import Call, Step, Trace

SHIFTS = (1, -1, 2, -2)
TIMES = ("timestep", "timesteps", "t")


def random_parts(policy: PipelinePolicy) -> str:
    """The layers that make a forward pass random, or "" where there are none."""
    active = [
        f"{name}.{path} (p={layer.p:g})"
        for name, module in policy.modules.items()
        for path, layer in module.named_modules()
        if isinstance(layer, torch.nn.Dropout) and layer.training and layer.p > 0
    ]
    if not active:
        return ""
    more = f" and {len(active) - 1} more" if len(active) > 1 else ""
    return f"dropout is on in {active[0]}{more}: the networks must stay in evaluation mode, call module.eval()"


def of_start(ours: Tensor, theirs: Tensor) -> str:
    """Why sampling begins from other latents than the pipeline's."""
    if ours.shape != theirs.shape:
        return f"latent_shape {list(ours.shape[1:])} is not what the scheduler steps on, {list(theirs.shape[1:])}"
    slope, offset, rest = affine(ours, theirs)
    if rest < 1e-4:
        return f"the pipeline starts from {1 / slope:.4g} times the noise: scale it in `start`"
    return "the pipeline starts from other latents than the noise it is given: do the same in `start`"


def of_step(policy: PipelinePolicy, trace: Trace, index: int, ours: Step) -> str:
    """Why step `index` leads elsewhere than the pipeline's, from the same latents. Source before effect."""
    theirs = trace.steps[index]
    return (
        random_parts(policy)
        or _of_schedule(policy, trace)
        or _of_calls(policy, trace, index, ours.calls)
        or _of_prediction(policy, ours.prediction, theirs.prediction)
        or "from the same prediction another step: leave `dynamics` to the library, or give it the right schedule"
    )


def _of_schedule(policy: PipelinePolicy, trace: Trace) -> str:
    if trace.schedule is None:
        return ""
    is_flow = isinstance(policy.dynamics, FlowDynamics)
    ours = policy.dynamics.sigmas if isinstance(policy.dynamics, FlowDynamics) else policy.dynamics.timesteps
    ours, theirs = ours.double().cpu(), trace.schedule.double().cpu()
    if len(ours) != len(theirs):
        return f"the schedule has {len(ours)} entries, the pipeline's {len(theirs)}: see `_schedule`"
    if torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6):
        return ""
    what = "sigma" if is_flow else "timestep"
    for shift in SHIFTS:
        n = len(ours)
        a, b = (ours[: n - shift], theirs[shift:n]) if shift > 0 else (ours[-shift:], theirs[: n + shift])
        a, b = a[:-1], b[:-1]  # whatever its shift, a schedule ends at 0
        if len(a) > 1 and torch.allclose(a, b, rtol=1e-5, atol=1e-6):
            return f"schedule off by one: our {what} k is the pipeline's {what} k{shift:+d}"
    shown = [", ".join(f"{value:.4g}" for value in values[:5].tolist()) for values in (ours, theirs)]
    return f"the schedule differs: our {what}s {shown[0]}, the pipeline's {shown[1]}: give `_schedule` its arguments"


def _of_calls(policy: PipelinePolicy, trace: Trace, index: int, ours: Sequence[Call]) -> str:
    theirs = trace.steps[index].calls
    if [call.network for call in ours] != [call.network for call in theirs] or _rows(ours) != _rows(theirs):
        return _of_counts(ours, theirs)
    for a, b in zip(ours, theirs, strict=True):
        differing = [name for name, value in b.tensors.items() if _differs(a.arguments.get(name), value)]
        extra = sorted(a.tensors.keys() - b.tensors.keys())
        order = sorted(differing, key=lambda name: (name not in TIMES, name != "guidance"))
        for name in order:
            return _of_argument(policy, trace, index, name, a.arguments.get(name), b.tensors[name])
        if extra:
            return f"the network is given `{extra[0]}`, which the pipeline does not give it"
    return ""


def _rows(calls: Sequence[Call]) -> list[int]:
    """Rows of each call: those of its largest tensor."""
    return [len(max(call.tensors.values(), key=Tensor.numel)) if call.tensors else 0 for call in calls]


def _of_counts(ours: Sequence[Call], theirs: Sequence[Call]) -> str:
    if sum(_rows(ours)) != sum(_rows(theirs)):
        return (
            f"guidance: the pipeline evaluates {sum(_rows(theirs))} rows per sample, `predict` {sum(_rows(ours))}; "
            "let `guided` and `predict` follow its rule"
        )
    told = [f"{len(calls)} of {', '.join(sorted({call.network for call in calls}))}" for calls in (ours, theirs)]
    return f"`predict` makes {told[0]} calls, the pipeline {told[1]}: evaluate the branches and networks as it does"


def _differs(ours: Any, theirs: Tensor) -> bool:
    if not isinstance(ours, Tensor):
        return True
    try:
        a, b = torch.broadcast_tensors(ours.float(), theirs.float())
    except RuntimeError:
        return True
    return not torch.equal(a, b) and not torch.allclose(a, b, rtol=1e-6, atol=1e-7)


def _of_argument(policy: PipelinePolicy, trace: Trace, index: int, name: str, ours: Any, theirs: Tensor) -> str:
    if not isinstance(ours, Tensor):
        return f"`predict` does not give the network `{name}`, which the pipeline does"
    if name in TIMES:
        return _of_time(trace, index, float(ours.flatten()[0]), float(theirs.flatten()[0]), name)
    if name == "guidance":
        told = f"{float(ours.flatten()[0]):g} where the pipeline says {float(theirs.flatten()[0]):g}"
        return f"guidance: the network is told {told}"
    if ours.shape != theirs.shape:
        return f"`{name}` has shape {list(ours.shape)} where the pipeline's has {list(theirs.shape)}"
    largest = f"by up to {float((ours.float() - theirs.float()).abs().max()):.3g}"
    if theirs.shape[1:] == policy.latent_shape:
        return f"the network's input `{name}` differs {largest}: scale or pack the latents as the pipeline does"
    return f"condition: `{name}` differs {largest}: take it from the pipeline's own encode_prompt, with its settings"


def _of_time(trace: Trace, index: int, ours: float, theirs: float, name: str) -> str:
    for shift in SHIFTS:
        if 0 <= index + shift < len(trace.steps):
            other = trace.steps[index + shift].calls[0].tensors.get(name)
            if other is not None and abs(float(other.flatten()[0]) - ours) <= 1e-5 * max(abs(ours), 1e-3):
                return f"schedule off by one: at step {index} the network is told the timestep of step {index + shift}"
    for scale in (1.0, 1000.0):
        if abs(ours + theirs - scale) <= 1e-5 * scale and abs(ours - theirs) > 1e-5 * scale:
            return f"the timestep is reversed: {ours:g} where the pipeline says {theirs:g}"
    ratio = f", {ours / theirs:.4g} times as much" if theirs else ""
    return f"timestep scale: the network is told {ours:g} where the pipeline says {theirs:g}{ratio}"


def _of_prediction(policy: PipelinePolicy, ours: Tensor, theirs: Tensor) -> str:
    if ours.shape != theirs.shape:
        return f"`predict` gives shape {list(ours.shape)} where the scheduler is given {list(theirs.shape)}"
    if torch.equal(ours, theirs):
        return ""
    a, b = ours.double().flatten(), theirs.double().flatten()
    if not bool(a.isfinite().all()):
        return "`predict` is not finite"
    cosine = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
    size = float(a.norm() / b.norm())
    told = f"cosine {cosine:.3f} with what the pipeline steps along, {size:.3g} times its length"
    if cosine < -0.99:
        return f"the sign is flipped: `predict` must give noise minus data ({told})"
    if cosine > 0.9999 and abs(size - 1) > 1e-4:
        return f"the prediction is scaled ({told}): undo it in `predict`"
    if policy.guided:
        return f"guidance: the branches are combined in another way than the pipeline's ({told})"
    return f"from the same network calls `predict` makes another prediction ({told}): convert the output as it does"


def of_media(ours: Tensor | None, theirs: Tensor | None, config: Any) -> str:
    """Why the same latents decode to other media. ours, theirs: what the autoencoder was given."""
    if ours is None or theirs is None:
        return "the latents are decoded in another way than the pipeline's"
    if ours.shape != theirs.shape:
        shapes = f"{list(ours.shape)}, by the pipeline {list(theirs.shape)}"
        return f"the decoder is given latents of shape {shapes}: unpack them in `decode`"
    if torch.equal(ours, theirs):
        return "from the same decoder output other media: use `self._decode`, which processes it as the pipeline does"
    slope, offset, rest = affine(ours, theirs)
    names = ("scaling_factor", "shift_factor")
    known = ", ".join(f"{name} {config[name]:g}" for name in names if config.get(name) is not None)
    if rest < 1e-3:
        return (
            f"scaling factor: the decoder is given {slope:.4g} times the pipeline's latents {offset:+.3g}; undo the "
            f"autoencoder's scaling in `decode` ({known or 'latents_mean and latents_std'})"
        )
    return (
        "the decoder is given other latents: undo the autoencoder's scaling per channel, and the packing, in `decode`"
    )


def affine(ours: Tensor, theirs: Tensor) -> tuple[float, float, float]:
    """(slope, offset, residual) of ours = slope * theirs + offset by least squares; residual relative to ours."""
    a, b = ours.double().flatten(), theirs.double().flatten()
    spread = (b - b.mean()).square().sum()
    slope = float(((a - a.mean()) * (b - b.mean())).sum() / spread) if spread > 0 else 0.0
    offset = float(a.mean() - slope * b.mean())
    rest = float((a - slope * b - offset).norm() / a.norm().clamp(min=1e-12))
    return slope, offset, rest
