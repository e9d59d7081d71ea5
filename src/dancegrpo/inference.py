"""What is done with a run's weights afterwards: draw, measure, export. Also with a recipe's untrained pipeline."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dancegrpo import evaluate
from dancegrpo.checkpoint import Checkpoint, iterations, load, load_latest
from dancegrpo.config import RunConfig, diff_configs, load_config
from dancegrpo.errors import CheckpointError, ConfigError, PromptError
from dancegrpo.health import use_threads
from dancegrpo.media import require_numbers, save_image
from dancegrpo.policies import ModelCard, Policy, load_policy
from dancegrpo.policies.export import plain
from dancegrpo.prompts import Prompt, open_prompts
from dancegrpo.rewards import load_judges
from dancegrpo.run_folder import RunFolder
from dancegrpo.sharding import laid_out
from dancegrpo.statistics import Comparison, Summary, compare, summarize
from dancegrpo.video import save_clip

USED = ("weights", "ema")
"""Kinds of a checkpoint's tensors that are read: not the optimizer's."""
Form = Literal["png", "webp", "mp4"]


@dataclass(frozen=True)
class Trained:
    """A policy with the weights of a run (or of a recipe's base, where `run` is None)."""

    config: RunConfig
    policy: Policy
    run: RunFolder | None
    iteration: int


def load_trained(
    source: str, overrides: Sequence[str] = (), *, ema: bool = True, checkpoint: str = "latest"
) -> Trained:
    """A run folder's weights (the moving average where it kept one and `ema`), or a recipe's base.

    checkpoint: `latest`, `best` (measured so on held-out prompts), or after how many iterations.
    """
    path = Path(source)
    if not path.is_dir():
        if checkpoint != "latest":
            raise ConfigError(f"--checkpoint {checkpoint} is for a run's folder: {source} is a recipe, leave it away")
        config = load_config(source, overrides)
        use_threads(config.threads)
        return Trained(config, load_policy(config.model, config.rollout), None, 0)
    run = RunFolder.open(path)
    config = load_config(run.config_file, overrides)
    use_threads(config.threads)
    policy = load_policy(config.model, config.rollout)
    found = _checkpoint(run, checkpoint)
    _load_weights(policy, found, ema=ema)
    return Trained(config, policy, run, found.iteration)


def _checkpoint(run: RunFolder, which: str) -> Checkpoint:
    if which == "latest":
        damaged: list[str] = []
        found = load_latest(run.path, damaged.append, kinds=USED)
        for warning in damaged:
            warnings.warn(warning, stacklevel=2)
        if found is None:
            raise CheckpointError(f"{run.path} has no whole checkpoint: let the run reach one first")
        return found
    if which == "best":
        best = evaluate.best_iteration(run, run.config(), iterations(run.path, abandoned=True))
        if best is None:
            raise CheckpointError(
                f"no checkpoint of {run.path} was measured on held-out prompts: use --checkpoint latest"
            )
        number = best
    elif which.isdecimal():
        number = int(which)
    else:
        raise ConfigError(f"--checkpoint {which!r}: use best, latest, or after how many iterations")
    return load(run.path, number, kinds=USED)


COMPARED = ("model.", "rollout.", "rewards.", "prompts.", "seed")
"""Settings that make what a run measured at its start another quantity than what is measured now."""


@torch.no_grad()
def _load_weights(policy: Policy, checkpoint: Checkpoint, *, ema: bool) -> None:
    weights = (checkpoint.tensors.get("ema") if ema else None) or checkpoint.tensors["weights"]
    trainable = policy.trainable()
    odd = list(trainable.keys() ^ weights.keys())
    odd += [name for name in trainable.keys() & weights.keys() if trainable[name].shape != weights[name].shape]
    if odd:
        raise CheckpointError(
            f"the run's weights do not fit this model ({min(odd)} and {len(odd) - 1} more): leave model.path and "
            "model.lora as the run had them"
        )
    for name, parameter in trainable.items():
        parameter.copy_(laid_out(weights[name], parameter))


def draw(
    source: str,
    texts: Sequence[str],
    *,
    count: int,
    seed: int,
    out: Path,
    form: Form | None = None,
    image: Path | None = None,
    checkpoint: str = "latest",
) -> list[Path]:
    """`count` samples of each text (of four held-out prompts where none is given), as out/PROMPT-NUMBER.SUFFIX.

    form: PNG or WebP for pictures, mp4 or WebP for clips, the first of each by default; PNG and WebP lose nothing.
    image: the picture from which an image-to-video model animates every text. Raises ConfigError for a form that cannot
    hold what the model makes, PromptError for an image that is missing or out of place, MediaError for media with NaN.
    """
    if image is not None and not texts:
        raise PromptError(
            f"--image {image} goes with --prompt: held-out prompts have images of their own, leave it away"
        )
    if image is not None and not image.is_file():
        raise PromptError(f"--image {image} does not exist: name a picture file")
    trained = load_trained(source, checkpoint=checkpoint)
    config = trained.config
    form = _form(form, config.model.num_frames)
    if texts:
        _match_image(image, trained)
        prompts = [Prompt(number, text, config.prompts.negative, image) for number, text in enumerate(texts)]
    else:
        source_of = config.prompts.evaluation or config.prompts.train
        known = open_prompts(source_of, **config.prompts.reading())
        prompts = [known[index] for index in range(min(4, len(known)))]
    repeated = [prompt for prompt in prompts for _ in range(count)]
    files = [out / f"{index // count:03d}-{index % count:02d}.{form}" for index in range(len(repeated))]
    media = evaluate.pictures(trained.policy, repeated, seed=seed, batch_size=config.evaluation.batch_size)
    for file, frames in zip(files, (sample for _, batch in media for sample in batch), strict=True):
        require_numbers(frames, str(file))
        _save(frames, file, config.model.fps)
    return files


def _match_image(image: Path | None, trained: Trained) -> None:
    path, wanted = trained.config.model.path, trained.policy.takes_image
    if wanted and image is None:
        raise PromptError(f"{path} animates images: name the first frame with --image FILE")
    if not wanted and image is not None:
        raise PromptError(f"--image {image} would do nothing: {path} animates no images, leave it away")


def _form(form: Form | None, num_frames: int) -> Form:
    if num_frames > 1 and form == "png":
        raise ConfigError(f"--format png holds one frame, model.num_frames={num_frames} makes clips: use mp4 or webp")
    if num_frames == 1 and form == "mp4":
        raise ConfigError("--format mp4 is for clips, model.num_frames=1 makes pictures: use png or webp")
    return form or ("mp4" if num_frames > 1 else "png")


def _save(frames: Tensor, file: Path, fps: float) -> None:
    """(F, 3, H, W) in [0, 1]."""
    if file.suffix == ".png":
        save_image(frames[0], file)
    else:
        save_clip(frames, file, fps)


def measure(source: str, overrides: Sequence[str] = (), *, checkpoint: str = "latest") -> tuple[dict[str, Any], str]:
    """Held-out scores as (JSON-able result, printed table), compared with the start where the run measured the same."""
    trained = load_trained(source, overrides, checkpoint=checkpoint)
    config = trained.config
    if not config.evaluation.num_prompts or not config.prompts.evaluation:
        raise ConfigError(f"{source} has no held-out prompts: set prompts.evaluation=FILE and evaluation.num_prompts=N")
    prompts = evaluate.held_out(config)
    judges = load_judges(config.rewards).to(trained.policy.device).for_evaluation()
    settings = config.evaluation
    record = evaluate.evaluate(trained.policy, judges, prompts, seed=settings.seed, batch_size=settings.batch_size)
    summary, comparison = summarize({"iteration": trained.iteration, **record}), None
    if trained.run is not None and trained.run.evaluation_file(0).is_file():
        before = json.loads(trained.run.evaluation_file(0).read_text(encoding="utf-8"))
        same = not any(key.startswith(COMPARED) for key in diff_configs(trained.run.config(), config))
        if same and all(before.get(key) == record[key] for key in ("sampling", "prompt_ids", "texts")):
            comparison = compare(before, record)
    return _as_json(trained, summary, comparison), _as_table(summary, comparison)


def _as_json(trained: Trained, summary: Summary, comparison: Comparison | None) -> dict[str, Any]:
    result: dict[str, Any] = {"iteration": trained.iteration, "means": summary.means, "invalid": summary.invalid}
    for column, rate in summary.passes.items():
        result[column] = {"rate": rate.rate, "low": rate.low, "high": rate.high, "total": rate.total}
        result[f"{column}/tasks"] = {task: r.rate for task, r in summary.tasks.get(column, {}).items()}
        result[f"{column}/task_mean"] = summary.task_mean(column)
    if comparison is not None:
        gains = {
            c: {"before": g.before, "after": g.after, "gain": g.gain, "low": g.low, "high": g.high, "n": g.n}
            for c, g in comparison.overall.items()
        }
        tasks = {c: {task: g.gain for task, g in held.items()} for c, held in comparison.tasks.items()}
        result["gain"], result["gain_by_task"] = gains, tasks
    return result


def _as_table(summary: Summary, comparison: Comparison | None) -> str:
    lines = []
    for column, mean in summary.means.items():
        line = f"{column:24} {'no valid score' if mean is None else f'{mean:.4f}'}"
        if comparison is not None and column in comparison.overall:
            gain = comparison.overall[column]
            line += (
                f"   start {gain.before:.4f}   gain {gain.gain:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}], n={gain.n}"
            )
        lines.append(line)
        if (mean_of_tasks := summary.task_mean(column)) is not None:
            lines.append(f"{'  mean of the tasks':24} {mean_of_tasks:.4f}")
        for task, rate in summary.tasks.get(column, {}).items():
            line = f"  {task:22} {rate.rate:.4f} [{rate.low:.4f}, {rate.high:.4f}]"
            if comparison is not None and task in comparison.tasks.get(column, {}):
                gain = comparison.tasks[column][task]
                line += f"   gain {gain.gain:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"
            lines.append(line)
    return "\n".join(lines)


def export(run_dir: Path, out: Path, *, ema: bool = True, checkpoint: str = "latest") -> Path:
    """Writes the run's weights so that diffusers alone loads them, with a model card."""
    trained = load_trained(str(run_dir), ema=ema, checkpoint=checkpoint)
    config = trained.config
    card = ModelCard(
        base_model=config.model.path,
        recipe=config.name,
        iterations=trained.iteration,
        judges=tuple(f"{n} ({r.judge}, weight {r.weight:g})" for n, r in config.rewards.items() if r.weight),
        notes=_measured(run_dir, trained.iteration, ema=ema),
    )
    trained.policy.export(out, card)
    return out


def _measured(run_dir: Path, iteration: int, *, ema: bool) -> str:
    """Held-out results of these very weights beside the start's, as Markdown; "" where the run did not measure them."""
    files = [RunFolder.open(run_dir).evaluation_file(number) for number in (0, iteration)]
    if iteration == 0 or not all(file.is_file() for file in files):
        return ""
    before, after = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    if after["weights"] == "ema" and not ema:
        return ""  # what was measured is the average, not these
    rows = [
        f"| {plain(column)} | {g.before:.4f} | {g.after:.4f} | {g.gain:+.4f} [{g.low:+.4f}, {g.high:+.4f}] |"
        for column, g in compare(before, after).overall.items()
    ]
    head = ["## Held-out prompts", "", "| judge | base | this | gain (95 % paired bootstrap) |", "|---|---|---|---|"]
    count = len(after["prompt_ids"])
    return "\n".join([*head, *rows, "", f"{count} prompts that were not trained on, with fixed noise."])
