"""Reference images for image-to-video, drawn by a text-to-image pipeline before the training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from dancegrpo import evaluate
from dancegrpo.errors import ConfigError
from dancegrpo.files import write_atomically
from dancegrpo.inference import Trained, load_trained
from dancegrpo.media import save_image
from dancegrpo.prompts import Prompt, json_value, open_prompts

LISTING = "prompts.jsonl"


def make_images(
    source: str, model: str, overrides: Sequence[str] = (), *, seed: int, limit: int | None, out: Path
) -> Path:
    """Draws one picture per prompt into `out` and lists them in `out/prompts.jsonl`, which `open_prompts` reads.

    source: as in `open_prompts`; images that its prompts bring already are not looked at. model: a run folder, or a
    recipe for its untrained pipeline. limit: only so many prompts, the first; None = all. A picture's name tells what
    it was drawn from: a second call keeps the pictures that are there, redraws none, and another seed or model never
    passes for the first. Returns the listing, which is written last.

    Raises ConfigError for a model that takes images or makes clips and for an `out` that is no folder, and what
    `open_prompts` and `load_trained` raise.
    """
    trained = load_trained(model, overrides)
    if trained.policy.takes_image or trained.config.model.num_frames > 1:
        raise ConfigError(f"{model} makes clips: name a text-to-image model, or set model.num_frames=1")
    # The images that are about to be made may be the very ones the records name.
    prompts = open_prompts(source, **trained.config.prompts.reading() | {"image": None, "images": None})
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made a folder ({error.strerror}): name another") from error
    count = len(prompts) if limit is None else min(limit, len(prompts))
    size = trained.config.evaluation.batch_size
    for first in range(0, count, size):
        _draw(trained, [prompts[index] for index in range(first, min(first + size, count))], seed, out)

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(_line(prompts[index], _name(trained, prompts[index], seed)) for index in range(count))

    write_atomically(out / LISTING, write)
    return out / LISTING


def _draw(trained: Trained, batch: Sequence[Prompt], seed: int, out: Path) -> None:
    """Draws a batch of which a picture is missing: all of it, for a batch's size moves the last bits."""
    files = [out / _name(trained, prompt, seed) for prompt in batch]
    if all(file.is_file() for file in files):
        return
    drawn = evaluate.pictures(trained.policy, batch, seed=seed, batch_size=len(batch), start=batch[0].id)
    for file, frames in zip(files, (sample for _, media in drawn for sample in media), strict=True):
        save_image(frames[0], file)


def _name(trained: Trained, prompt: Prompt, seed: int) -> str:
    """A file name with a digest of all that the picture depends on."""
    config, run = trained.config, trained.run
    weights = None if run is None else (str(run.path.resolve()), trained.iteration)
    told = prompt.text, prompt.negative, seed, weights, config.model.model_dump(), config.rollout.model_dump()
    digest = hashlib.sha256(repr(told).encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{prompt.id:06d}-{digest}.png"


def _line(prompt: Prompt, name: str) -> str:
    negative = {"negative": prompt.negative} if prompt.negative else {}
    record = {"text": prompt.text, **negative, "image": name, "metadata": dict(prompt.metadata)}
    return json.dumps(record, default=json_value) + "\n"
