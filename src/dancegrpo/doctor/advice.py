"""What to change so that a run fits: every saving is a prediction of its own, made with that setting."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from dancegrpo.config import RunConfig, load_config
from dancegrpo.doctor.judges import CLIPS
from dancegrpo.doctor.predict import Prediction, Predictor
from dancegrpo.errors import DanceError


@dataclass(frozen=True)
class Advice:
    """One change, in its place among those before it. before, after: peaks in bytes over all phases."""

    setting: str
    before: int
    after: int
    phase: str
    costs: str

    def as_json(self) -> dict[str, Any]:
        """The same as a JSON object."""
        return asdict(self)


def advise(config: RunConfig, predictor: Predictor, capacity: int, rounds: int = 8) -> list[Advice]:
    """Changes until it fits `capacity` bytes, or none helps any more.

    In each round the first kind of change that lowers the peak is taken: those that leave the results as they are come
    before those that cost time, precision or freedom.
    """
    found: list[Advice] = []
    prediction = predictor(config)
    for _ in range(rounds):
        if total(prediction) <= capacity:
            break
        step = _best(config, predictor, prediction)
        if step is None:
            break
        advice, config, prediction = step
        found.append(advice)
    return found


def total(prediction: Prediction) -> int:
    """The highest peak of any phase."""
    return max(prediction.peak.values())


def _best(config: RunConfig, predictor: Predictor, now: Prediction) -> tuple[Advice, RunConfig, Prediction] | None:
    before, phase = total(now), max(now.peak, key=lambda name: now.peak[name])
    for override, costs in _changes(config, predictor.device.type, phase, now.layout.gpus):
        try:
            changed = load_config(config, [override])
            prediction = predictor(changed)
        except DanceError:  # this model or algorithm cannot
            continue
        if total(prediction) < 0.99 * before:
            return Advice(override, before, total(prediction), phase, costs), changed, prediction
    return None


def _changes(config: RunConfig, device: str, phase: str, gpus: int) -> Iterator[tuple[str, str]]:
    """(setting, what it costs) that could help the phase with the highest peak, the gentlest first."""
    yield from _same_results(config, device, phase, gpus)
    model = config.model
    if phase == "decode" and not model.vae_tiling:
        yield "model.vae_tiling=true", "faint seams"
    if model.dtype == "float32":
        yield "model.dtype=bfloat16", "precision of the networks' arithmetic"
    for name, judge in config.rewards.items():
        if judge.judge in CLIPS and judge.options.get("dtype", "float32") == "float32":
            yield f"rewards.{name}.options.dtype=bfloat16", "precision of the judge's arithmetic"
    if model.lora is None:
        yield "model.lora={rank: 128, alpha: 256}", "trains adapters, not all weights"
    elif model.quantize is None and config.parallel.fsdp == 1:
        yield "model.quantize=int8", "rounding of the frozen weights; some time"


def _same_results(config: RunConfig, device: str, phase: str, gpus: int) -> Iterator[tuple[str, str]]:
    """Those that leave a run's results as they are, to rounding."""
    model, micro, batch = config.model, config.update.micro_batch_size, config.rollout.batch_size
    if 2 * config.parallel.fsdp <= gpus and gpus % (2 * config.parallel.fsdp) == 0:
        yield f"parallel.fsdp={2 * config.parallel.fsdp}", "gathers of weights between the GPUs"
    if device != "cpu" and not model.offload:
        yield "model.offload=true", "copies of the encoders and the decoder when they work"
    if device != "cpu" and config.rollout.store == "device" and phase in ("rollout", "decode", "score", "update"):
        yield "rollout.store=host", "copies over the bus"
    if phase == "update" and not model.gradient_checkpointing:
        yield "model.gradient_checkpointing=true", "about a third more time in the update"
    if phase == "update" and config.parallel.fsdp > 1 and config.parallel.reduce == "once":
        yield "parallel.reduce=each", "sums of gradients after every micro-batch"
    if phase == "update" and micro > 1:
        yield f"update.micro_batch_size={micro // 2}", "some speed on a large device; the same gradient"
    if phase == "decode" and not model.vae_slicing:
        yield "model.vae_slicing=true", "some time"
    if phase in ("rollout", "decode", "score") and batch > 1:
        yield f"rollout.batch_size={batch // 2}", "some speed on a large device; the same samples to rounding"
