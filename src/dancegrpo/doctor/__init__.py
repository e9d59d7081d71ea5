"""`dancegrpo doctor`: what the machine has, whether a recipe's parts are here, and whether the run will fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    from dancegrpo.doctor.seconds import Seconds

__all__ = ["Diagnosis", "Plan", "diagnose"]

LOAD_RATE = 1e9
"""Bytes per second at which weights are taken to come from the disk."""


@dataclass
class Diagnosis:
    """What was found. phases: name, peak_bytes, host_bytes, seconds (None = not known); sizes in bytes, of one GPU.

    gpus: that share the run. capacity: bytes of a device that the run may use. traffic: bytes that a GPU receives from
    others in an iteration. iteration_seconds: of computing; communication_seconds: of the traffic, were none of it
    hidden behind computing; run_seconds: of the run, with both. notes: what the prediction does not know.
    """

    machine: dict[str, Any]
    checks: list[dict[str, Any]] = field(default_factory=list)
    device: str = ""
    gpus: int = 1
    capacity: int = 0
    phases: list[dict[str, Any]] = field(default_factory=list)
    resident: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    traffic: dict[str, int] = field(default_factory=dict)
    iteration_seconds: float | None = None
    communication_seconds: float | None = None
    run_seconds: float | None = None
    cost: float | None = None
    fits: bool | None = None
    advice: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing is missing, and it fits."""
        return all(check["ok"] for check in self.checks) and self.fits is not False


@dataclass(frozen=True)
class Plan:
    """What a run is planned for, instead of this machine. memory: GB of an accelerator. gpus: that share the run; None
    = as few as its `parallel` settings need. tflops: 1e12 operations per second that each reaches. network: 1e9 bytes
    per second that each receives from the others. price_per_hour: of one, in any currency. calibration: seconds of it.
    """

    memory: float | None = None
    gpus: int | None = None
    tflops: float | None = None
    network: float | None = None
    price_per_hour: float | None = None
    calibration: float = 10.0

    def __post_init__(self) -> None:
        for name in ("memory", "gpus", "tflops", "network", "price_per_hour"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"--{name.replace('_', '-')} {value:g} is not above 0: give a positive number")


def diagnose(
    recipe: str | Path | RunConfig | None = None, overrides: Sequence[str] = (), plan: Plan | None = None
) -> Diagnosis:
    """The machine, and what a run of `recipe` would need of it. Loads no weights of a large model.

    Raises a DanceError for a recipe that cannot be.
    """
    plan = plan or Plan()
    if recipe is None:
        return Diagnosis(describe_machine(Path("runs")))
    config = load_config(recipe, overrides)
    found = Diagnosis(describe_machine(Path(config.output)))
    _examine(found, config, plan)
    if plan.price_per_hour is not None and found.run_seconds is not None:
        found.cost = found.run_seconds / 3600 * plan.price_per_hour * found.gpus
    return found


def _examine(found: Diagnosis, config: RunConfig, plan: Plan) -> None:
    from dancegrpo.doctor.advice import advise
    from dancegrpo.doctor.architectures import architecture
    from dancegrpo.doctor.checks import check_disk, check_run
    from dancegrpo.doctor.predict import Predictor

    found.checks = [check.as_json() for check in check_run(config)]
    device, found.capacity = _device(config, found, plan.memory)
    found.device = f"{device.type} of {plan.memory:g} GB, planned" if plan.memory else str(device)
    try:
        sizes = architecture(config.model)
    except ModelError as error:
        found.notes.append(f"no prediction: {error}")
        return
    found.notes.append(f"sizes: {sizes.source}")
    with quiet():
        predictor = Predictor(sizes, device, plan.gpus)
        prediction = predictor(config)
        found.checks.append(check_disk(config, prediction.checkpoint_bytes).as_json())
        _tell(found, config, plan, predictor, prediction)
        if max(prediction.peak.values()) > found.capacity:
            found.advice = [advice.as_json() for advice in advise(config, predictor, found.capacity)]
    _note_judges(found, config, device)


def _tell(found: Diagnosis, config: RunConfig, plan: Plan, predictor: Predictor, prediction: Prediction) -> None:
    """Writes a prediction into a diagnosis."""
    from dancegrpo.doctor.places import PHASES

    seconds = _seconds(found, config, plan, predictor, prediction)
    found.gpus, found.traffic = prediction.layout.gpus, prediction.traffic
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
    hosted, room = max(prediction.host.values(), default=0), host_memory()[0]
    found.fits = max(prediction.peak.values()) <= found.capacity
    if plan.memory is not None and hosted > room:  # the planned accelerator is in a machine of its own
        found.notes.append(
            f"its host needs {hosted / 1e9:.1f} GB while loading, for each GPU; here are {room / 1e9:.1f}"
        )
    elif hosted > room:
        found.fits = False
        found.notes.append(f"the host's memory of {room / 1e9:.1f} GB is too small: loading needs {hosted / 1e9:.1f}")


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
    found: Diagnosis, config: RunConfig, plan: Plan, predictor: Predictor, prediction: Prediction
) -> Seconds | None:
    from dancegrpo.doctor.calibrate import write_rate
    from dancegrpo.doctor.seconds import by_operations, by_trial, is_small, run_seconds

    if plan.memory is not None and plan.tflops is None:
        found.notes.append("no seconds for a planned device: give --tflops")
        return None
    if plan.tflops is None and is_small(prediction) and predictor.architecture.folder is not None:
        seconds = by_trial(config, prediction, write_rate(Path(config.output)), plan.calibration)
        found.notes.append("seconds: the networks were timed here, a batch of each phase")
    else:
        seconds = by_operations(prediction, _speed(config, predictor, plan), LOAD_RATE)
        found.notes.append("seconds are operations over the speed reached: passes over elements are not in them")
    found.iteration_seconds = seconds.iteration
    told = run_seconds(config, seconds, prediction)
    if prediction.layout.gpus > 1 and plan.network is None:
        found.notes.append("communication is not in the seconds: give --network")
    elif prediction.layout.gpus > 1 and plan.network is not None and told is not None:
        found.communication_seconds = sum(prediction.traffic.values()) / (plan.network * 1e9)
        told += config.iterations * found.communication_seconds
    found.run_seconds = told
    return seconds


def _speed(config: RunConfig, predictor: Predictor, plan: Plan) -> Speed:
    from dancegrpo.doctor.calibrate import Speed, calibrate
    from dancegrpo.doctor.counting import KINDS
    from dancegrpo.policies.pipeline import DTYPES

    if plan.tflops is not None:
        return Speed(dict.fromkeys(KINDS, plan.tflops * 1e12), LOAD_RATE)
    return calibrate(predictor.device, DTYPES[config.model.dtype], Path(config.output), plan.calibration)


def _note_judges(found: Diagnosis, config: RunConfig, device: torch.device) -> None:
    from dancegrpo.doctor.judges import PARAMETERS, SHARE, elsewhere

    for name, judge in config.rewards.items():
        if elsewhere(judge, device):
            found.notes.append(f"judge {name} ({judge.judge}) is put elsewhere: neither its memory nor its seconds")
        elif judge.judge in PARAMETERS:
            found.notes.append(
                f"judge {name} ({judge.judge}): its weights, and {SHARE:.0%} of them for activations; no seconds"
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Within it, the libraries' notices and warnings about networks without values are not shown."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
