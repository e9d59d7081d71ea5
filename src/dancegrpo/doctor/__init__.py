"""`dancegrpo doctor`: what the machine has, whether a recipe's parts are here, and whether the run will fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dancegrpo.config import RunConfig, load_config
from dancegrpo.doctor.machine import describe_machine, host_memory
from dancegrpo.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch

    from dancegrpo.doctor.calibrate import Speed
    from dancegrpo.doctor.predict import Prediction, Predictor

__all__ = ["Diagnosis", "diagnose"]

LOAD_RATE = 1e9
"""Bytes per second at which weights are taken to come from the disk."""


@dataclass
class Diagnosis:
    """What was found. phases: name, peak_bytes, host_bytes, seconds (None = not known); sizes in bytes.

    capacity: bytes of the device that the run may use. notes: what the prediction does not know.
    """

    machine: dict[str, Any]
    checks: list[dict[str, Any]] = field(default_factory=list)
    device: str = ""
    capacity: int = 0
    phases: list[dict[str, Any]] = field(default_factory=list)
    resident: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    iteration_seconds: float | None = None
    run_seconds: float | None = None
    cost: float | None = None
    fits: bool | None = None
    advice: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing is missing, and it fits."""
        return all(check["ok"] for check in self.checks) and self.fits is not False


def diagnose(
    recipe: str | Path | RunConfig | None = None,
    overrides: Sequence[str] = (),
    *,
    memory: float | None = None,
    tflops: float | None = None,
    price_per_hour: float | None = None,
    calibration: float = 10.0,
) -> Diagnosis:
    """The machine, and what a run of `recipe` would need of it. Loads no weights of a large model.

    memory: plan for an accelerator of so many GB instead of this machine's device. tflops: plan with so many 1e12
    operations per second reached. price_per_hour: of the device, in any currency. calibration: seconds of it.
    Raises a DanceError for a recipe that cannot be.
    """
    for name, value in (("memory", memory), ("tflops", tflops), ("price-per-hour", price_per_hour)):
        if value is not None and not value > 0:
            raise ConfigError(f"--{name} {value:g} is not above 0: give a positive number")
    if recipe is None:
        return Diagnosis(describe_machine(Path("runs")))
    config = load_config(recipe, overrides)
    found = Diagnosis(describe_machine(Path(config.output)))
    _examine(found, config, memory, tflops, calibration)
    if price_per_hour is not None and found.run_seconds is not None:
        found.cost = found.run_seconds / 3600 * price_per_hour
    return found


def _examine(
    found: Diagnosis, config: RunConfig, memory: float | None, tflops: float | None, calibration: float
) -> None:
    from dancegrpo.doctor.advice import advise
    from dancegrpo.doctor.architectures import architecture
    from dancegrpo.doctor.checks import check_disk, check_run
    from dancegrpo.doctor.predict import PHASES, Predictor

    found.checks = [check.as_json() for check in check_run(config)]
    device, found.capacity = _device(config, found, memory)
    found.device = f"{device.type} of {memory:g} GB, planned" if memory else str(device)
    try:
        sizes = architecture(config.model)
    except ModelError as error:
        found.notes.append(f"no prediction: {error}")
        return
    found.notes.append(f"sizes from {sizes.source}")
    with quiet():
        predictor = Predictor(sizes, device)
        prediction = predictor(config)
        found.checks.append(check_disk(config, prediction.checkpoint_bytes).as_json())
        seconds = _seconds(found, config, predictor, prediction, memory, tflops, calibration)
        found.resident, found.parameters = prediction.resident, prediction.parameters
        found.phases = [
            {
                "name": name,
                "peak_bytes": prediction.peak[name],
                "host_bytes": prediction.host.get(name, 0),
                "seconds": None if seconds is None else seconds.phases.get(name),
            }
            for name in PHASES
        ]
        hosted = max(prediction.host.values(), default=0)
        found.fits = max(prediction.peak.values()) <= found.capacity and hosted <= host_memory()[0]
        if max(prediction.peak.values()) > found.capacity:
            found.advice = [advice.as_json() for advice in advise(config, predictor, found.capacity)]
    if hosted > host_memory()[0]:
        found.notes.append(f"the host's memory is too small: {hosted / 1e9:.1f} GB are needed while loading")
    if config.parallel.fsdp > 1:
        found.notes.append(f"parallel.fsdp={config.parallel.fsdp}: predicted is one process with all the weights")
    _note_judges(found, config)


def _device(config: RunConfig, found: Diagnosis, memory: float | None) -> tuple[torch.device, int]:
    """The device of a run and what it may use: all that is free, on the CPU and on an accelerator."""
    import torch

    from dancegrpo.policies.pipeline import resolve_device

    if memory is not None:
        return torch.device("cuda"), int(memory * 1e9)
    device = resolve_device(config.model.device)
    known = [entry["free"] for entry in found.machine["accelerators"] if entry["free"]]
    free = known[device.index or 0] if device.type == "cuda" and known else found.machine["ram"]["free"]
    return device, int(free)


def _seconds(
    found: Diagnosis,
    config: RunConfig,
    predictor: Predictor,
    prediction: Prediction,
    memory: float | None,
    tflops: float | None,
    calibration: float,
) -> Any:
    from dancegrpo.doctor.seconds import by_operations, by_trial, is_small, run_seconds

    if memory is not None and tflops is None:
        found.notes.append("no seconds for a planned device: give --tflops")
        return None
    speed = _speed(config, predictor, tflops, calibration)
    if tflops is None and is_small(prediction) and predictor.architecture.folder is not None:
        seconds = by_trial(config, prediction, speed)
        found.notes.append("seconds of networks timed here, one repetition of each phase")
    else:
        seconds = by_operations(prediction, speed, LOAD_RATE)
        found.notes.append("seconds are operations over the speed reached: passes over elements are not in them")
    found.iteration_seconds = seconds.iteration
    found.run_seconds = run_seconds(config, seconds, prediction)
    return seconds


def _speed(config: RunConfig, predictor: Predictor, tflops: float | None, calibration: float) -> Speed:
    from dancegrpo.doctor.calibrate import Speed, calibrate
    from dancegrpo.doctor.counting import KINDS
    from dancegrpo.policies.pipeline import DTYPES

    if tflops is not None:
        return Speed(dict.fromkeys(KINDS, tflops * 1e12), LOAD_RATE)
    return calibrate(predictor.device, DTYPES[config.model.dtype], Path(config.output), calibration)


def _note_judges(found: Diagnosis, config: RunConfig) -> None:
    from dancegrpo.doctor.judges import PARAMETERS, SHARE

    for name, judge in config.rewards.items():
        if judge.judge in PARAMETERS:
            found.notes.append(
                f"judge {name} ({judge.judge}): its weights, and {SHARE:.0%} of them for activations; no seconds"
            )


def quiet() -> Any:
    """Within it, the libraries' notices and warnings about networks without values are not shown."""
    import warnings
    from contextlib import ExitStack

    stack = ExitStack()
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")
    return stack
