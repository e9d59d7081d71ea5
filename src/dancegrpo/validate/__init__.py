"""Is this policy the pipeline it wraps, and can it be trained? `dancegrpo validate MODEL`."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL.Image import Image

    from dancegrpo.config import RunConfig
    from dancegrpo.policies.pipeline import PipelinePolicy
    from dancegrpo.prompts import Prompt
    from dancegrpo.validate.checks import Outcome, Subject

TEXTS = ("a red circle", "two blue squares above a green triangle on a white background")
"""The two prompts: of different length, short enough for any text encoder."""


@dataclass(frozen=True)
class Check:
    """One row of the table. value: what was measured. step: where it first failed. cause: in plain words."""

    name: str
    result: Literal["ok", "failed"]
    value: str
    seconds: float
    step: int | None = None
    cause: str = ""


@dataclass(frozen=True)
class Report:
    """What `validate` found. settings: size, steps, dtype and device that it was measured at."""

    model: str
    pipeline: str
    policy: str
    settings: dict[str, Any]
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.result == "ok" for check in self.checks)


def validate(model: str, overrides: Sequence[str] = (), *, seed: int = 0, **size: Any) -> Report:
    """Checks the policy of a folder, a shipped pipeline or a hub id. overrides: `key=value` as for a recipe.

    size: height, width, frames, steps, dtype and device; None = the smallest size that the family accepts, 4 steps,
    float32, `auto`. Raises ModelError or ConfigError, as `load_policy` does, for what cannot be loaded at all.
    """
    subject = _subject(_config(model, overrides, seed, size))
    policy = subject.policy
    used = policy.model
    settings = {name: getattr(used, name) for name in ("height", "width", "num_frames", "dtype", "guidance_scale")}
    settings |= {"steps": policy.dynamics.num_steps, "device": str(policy.device), "seed": seed}
    told = model, type(policy.pipeline).__name__, f"{type(policy).__module__}.{type(policy).__name__}", settings
    del policy  # the last check needs the memory
    return Report(*told, tuple(_run(name, check) for name, check in _checks(subject).items()))


def _subject(config: RunConfig) -> Subject:
    from dancegrpo.health import use_threads
    from dancegrpo.policies.loading import load_smallest
    from dancegrpo.validate.checks import Subject

    use_threads(config.threads)
    fixed = config.model.model_fields_set & {"height", "width", "num_frames"}
    policy = load_smallest(config.model, config.rollout, keep=fixed)
    return Subject(policy, config, _prompts(policy))


def _config(model: str, overrides: Sequence[str], seed: int, size: dict[str, Any]) -> RunConfig:
    from dancegrpo.config import load_config

    names = {"height": "height", "width": "width", "frames": "num_frames", "dtype": "dtype", "device": "device"}
    chosen = {names[name]: value for name, value in size.items() if name in names and value is not None}
    settings: dict[str, Any] = {
        "name": "validate",
        "seed": seed,
        "model": {"path": model, **chosen},
        "prompts": {"train": "none.txt", "per_iteration": 2},
        # All but the last step are trained, by every sample.
        "rollout": {"group_size": 2, "num_steps": size.get("steps") or 4, "timesteps": {"fraction": 1.0}},
        "rewards": {"none": {"judge": "python:none"}},
    }
    return load_config(settings, overrides)


def _prompts(policy: PipelinePolicy) -> list[Prompt]:
    from dancegrpo.prompts import Prompt

    model = policy.model
    image = _picture(model.width, model.height) if policy.takes_image else None
    return [Prompt(index, text, "a blurry photo", image) for index, text in enumerate(TEXTS)]


def _picture(width: int, height: int) -> Image:
    """A reference image: a coloured gradient with a bright square off its middle."""
    import numpy as np
    from PIL import Image

    rows, columns = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    pixels = np.stack([rows, columns, 1 - rows], axis=-1)
    pixels[height // 4 : height // 2, width // 4 : width // 2] = 1.0
    return Image.fromarray((255 * pixels).round().astype(np.uint8))


def _checks(subject: Subject) -> dict[str, Callable[[], Outcome]]:
    """The checks by name, in the order of causes: a port is mended from the top."""
    from dancegrpo.validate import checks

    def free() -> None:
        del subject.policy
        for name in ("condition", "trace", "trajectory", "algorithm"):
            vars(subject).pop(name, None)

    return {
        "latents equal the pipeline's": lambda: checks.equals_pipeline(subject),
        "decoding equals the pipeline's": lambda: checks.decodes(subject),
        "log-probs are finite": lambda: checks.finite_log_probs(subject),
        "replay gives ratio 1": lambda: checks.replays(subject),
        "gradients reach all weights": lambda: checks.gradients_reach_all(subject),
        "a batch equals one by one": lambda: checks.batches_equal_singles(subject),
        "LoRA export round-trips": lambda: checks.lora_round_trips(subject, free),
    }


def _run(name: str, check: Callable[[], Outcome]) -> Check:
    from dancegrpo.dotted import first_line
    from dancegrpo.errors import DanceError
    from dancegrpo.validate.checks import Outcome

    start = time.perf_counter()
    try:
        outcome = check()
    except Exception as error:  # a port under way may raise anything, and the other checks still tell something
        said = " ".join(str(error).split()) if isinstance(error, DanceError) else first_line(error)
        outcome = Outcome(False, "-", None, said)
    seconds = time.perf_counter() - start
    return Check(name, "ok" if outcome.ok else "failed", outcome.value, seconds, outcome.step, outcome.cause)


def as_json(report: Report) -> dict[str, Any]:
    """The report as one JSON object."""
    return {**asdict(report), "ok": report.ok}


def as_table(report: Report, width: int | None = None) -> str:
    """The report for people: a table, and below it each failure with its step and likely cause."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = io.StringIO()
    # Files and pipes get lines that are as long as they need to be.
    console = Console(file=out, width=width or max(100, Console().width), highlight=False)
    settings = report.settings
    frames = f", {settings['num_frames']} frames" if settings["num_frames"] > 1 else ""
    size = f"{settings['width']}x{settings['height']}{frames}, {settings['steps']} steps"
    console.print(
        Text(f"{report.pipeline} by {report.policy}: {size}, {settings['dtype']} on {settings['device']}"),
        soft_wrap=True,
    )
    table = Table("check", "result", "value", "seconds")
    for check in report.checks:
        table.add_row(check.name, check.result, Text(check.value), f"{check.seconds:.1f}")
    console.print(table)
    for check in report.checks:
        if check.result == "failed":
            where = "" if check.step is None else f", first at step {check.step}"
            console.print(Text(f"{check.name}: failed{where}\n  {check.cause}"), soft_wrap=True)
    console.print("all checks passed" if report.ok else "not ready: mend the first failure first")
    return out.getvalue().rstrip()
