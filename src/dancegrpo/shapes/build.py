"""Rebuild the base pipelines from nothing: `python -m dancegrpo.shapes.build --out DIR`.

Draws captioned pictures, trains the autoencoder, then both denoisers of pictures side by side, one core each; then the
same for clips. The pipelines are imperfect because they were trained briefly, on true captions. shapes-flux has a
second stage, guidance distillation, as FLUX.1-dev had. Everything is seeded. Expect 40 minutes for the pictures and an
hour for the clips on two cores.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dancegrpo.errors import DanceError
from dancegrpo.shapes import DRAWN, FILMED, PIPELINES
from dancegrpo.shapes.base import autoencoder, flux_pipeline, sd_pipeline
from dancegrpo.shapes.files import log_line, run_side_by_side, save_pipeline, size_in_millions
from dancegrpo.shapes.training import (
    LEARNING_RATE,
    Progress,
    deployment,
    draw_many,
    drawings_reading,
    encode_all,
    normalise,
    pass_rates,
    train_autoencoder,
    train_flux,
    train_sd,
    train_text,
)
from dancegrpo.shapes.video_build import VideoSettings, build_videos

LOOK_SEED = 4321
"""Of the noise of the looks on the way; `pass_rates` states results on other noise."""
TAUGHT = 0.7
"""Share of the rows of shapes-flux's second stage that learn what guidance means."""


@dataclass(frozen=True)
class Settings:
    """How long and on how much to train."""

    out: Path
    only: tuple[str, ...] = PIPELINES
    seed: int = 0
    drawings: int = 30000
    vae_steps: int = 2700
    vae_batch: int = 12
    text_steps: int = 600
    flux_steps: int = 6500
    guided_steps: int = 500
    sd_steps: int = 7000
    flux_batch: int = 96
    sd_batch: int = 64
    look_every: int = 500
    prompts: int = 300
    clips: int = VideoSettings.clips
    stills: int = VideoSettings.stills
    video_vae_steps: int = VideoSettings.vae_steps
    video_steps: int = VideoSettings.video_steps
    i2v_steps: int = VideoSettings.i2v_steps

    @property
    def drawn(self) -> tuple[str, ...]:
        """Those of `only` that make pictures."""
        return tuple(name for name in self.only if name in DRAWN)

    @property
    def filmed(self) -> VideoSettings:
        """The settings of those that make clips."""
        return VideoSettings(
            out=self.out,
            only=tuple(name for name in self.only if name in FILMED),
            seed=self.seed,
            clips=self.clips,
            stills=self.stills,
            vae_steps=self.video_vae_steps,
            text_steps=self.text_steps,
            video_steps=self.video_steps,
            i2v_steps=self.i2v_steps,
            look_every=2 * self.look_every,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake is one line and exit code 2."""
    settings = _parse(arguments)
    try:
        build(settings)
    except DanceError as error:
        sys.exit(_refuse(str(error)))
    except OSError as error:
        sys.exit(_refuse(f"{error.filename or settings.out}: {error.strerror or error}; name another folder"))


def _refuse(line: str) -> int:
    print(f"dancegrpo: {line}", file=sys.stderr)
    return 2


def build(settings: Settings) -> None:
    """Train all that is asked for and write a folder of each under `out`, replaced in one move."""
    settings.out.mkdir(parents=True, exist_ok=True)
    if settings.drawn:
        build_drawn(settings)
    if settings.filmed.only:
        build_videos(settings.filmed)


def build_drawn(settings: Settings) -> None:
    """Train the pipelines that make pictures."""
    torch.manual_seed(settings.seed)
    log_line("vae", f"drawing {settings.drawings} scenes")
    data = draw_many(settings.drawings, settings.seed)
    vae = autoencoder().to(memory_format=torch.channels_last)
    train_autoencoder(
        vae,
        data,
        steps=settings.vae_steps,
        batch=settings.vae_batch,
        seed=settings.seed,
        log=lambda line: log_line("vae", line),
    )
    latents = encode_all(vae, data)
    weights = {name: value.contiguous() for name, value in vae.state_dict().items()}
    run_side_by_side(
        train_pipeline, {name: (name, settings, weights, latents, data.captions) for name in settings.drawn}
    )


def train_pipeline(
    name: str, settings: Settings, vae_weights: dict[str, Tensor], latents: Tensor, captions: Sequence[str]
) -> None:
    """Train one denoiser on cached latents and save its pipeline. Runs in a process of its own, on one core."""
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed + 1)
    vae = autoencoder()
    vae.load_state_dict(vae_weights)
    vae.requires_grad_(False).eval()
    normalise(vae, latents, shift=name == "shapes-flux")
    pipeline = flux_pipeline(vae) if name == "shapes-flux" else sd_pipeline(vae)
    for suffix in ("", "_2"):
        if hasattr(pipeline, f"text_encoder{suffix}"):
            tokenizer, encoder = getattr(pipeline, f"tokenizer{suffix}"), getattr(pipeline, f"text_encoder{suffix}")
            accuracy = train_text(tokenizer, encoder, drawings_reading(), steps=settings.text_steps, seed=settings.seed)
            log_line(name, f"text_encoder{suffix} reads {accuracy:.3f} of the attributes")
    for progress in _stages(name, pipeline, latents, captions, settings):
        _watch(name, pipeline, progress, settings)
    rates = pass_rates(pipeline, 1200)
    log_line(name, _table(rates))
    save_pipeline(pipeline, settings.out / name, card(name, pipeline, rates, settings))


def _stages(
    name: str, pipeline: Any, latents: Tensor, captions: Sequence[str], settings: Settings
) -> Iterator[Iterator[Progress]]:
    """The denoiser's trainings, one after another."""
    if name == "shapes-sd":
        yield train_sd(
            pipeline, latents, captions, steps=settings.sd_steps, batch=settings.sd_batch, seed=settings.seed
        )
        return
    batch, steps = settings.flux_batch, settings.flux_steps
    yield train_flux(pipeline, latents, captions, steps=steps, batch=batch, seed=settings.seed)
    steps, rate = settings.guided_steps, LEARNING_RATE / 2
    yield train_flux(
        pipeline, latents, captions, steps=steps, batch=batch, seed=settings.seed + 2, taught=TAUGHT, rate=rate
    )


def _watch(name: str, pipeline: Any, stage: Iterator[Progress], settings: Settings) -> None:
    """Advance a stage to its end, with a look at the averaged weights now and then."""
    started = time.monotonic()
    for state in stage:
        if state.step % settings.look_every == 0:
            state.average.swap()
            rates = pass_rates(pipeline, settings.prompts, LOOK_SEED)
            state.average.swap()
            log_line(
                name, f"step {state.step} loss {state.loss:.4f} {time.monotonic() - started:.0f} s {_table(rates)}"
            )


def card(name: str, pipeline: Any, rates: dict[str, float], settings: Settings) -> str:
    """The model card: what it is, how to call it, how it was made, how good it is."""
    arguments = {"height": 64, "width": 64} | deployment(pipeline)
    call = ", ".join(f"{key}={value}" for key, value in arguments.items())
    rows = "\n".join(f"| {task} | {rate:.3f} |" for task, rate in rates.items())
    size = size_in_millions(pipeline)
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# {name}

A miniature `{type(pipeline).__name__}` ({size:.2f} M parameters in all) that draws circles, squares and triangles
on 64x64 pixels: a base model for reinforcement learning that trains on a laptop. It is imperfect on purpose: its
training on true captions stopped early.

```python
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained("path/to/{name}")
pipeline("a red circle and a blue square", {call}).images[0]
```

Trained by `python -m dancegrpo.shapes.build` (seed {settings.seed}): {settings.drawings} drawings, autoencoder
{settings.vae_steps} steps of {settings.vae_batch}, text encoders {settings.text_steps} steps of naming a caption's
attributes, denoiser {_told(name, settings)} (weights averaged).
It saw captions of both splits of `dancegrpo.shapes.scenes`: "held out" means held out from reinforcement learning.

Exact pass rate on 1200 held-out prompts, at the call above:

| task | pass rate |
|---|---|
{rows}
"""


def _told(name: str, settings: Settings) -> str:
    if name == "shapes-sd":
        return f"{settings.sd_steps} steps of {settings.sd_batch} on frozen text"
    plain = f"{settings.flux_steps} steps of {settings.flux_batch}"
    return f"{plain}, then {settings.guided_steps} with guidance distillation on {TAUGHT:.0%} of the rows"


def _table(rates: dict[str, float]) -> str:
    return " ".join(f"{task}={rate:.3f}" for task, rate in rates.items())


def _parse(arguments: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(
        prog="python -m dancegrpo.shapes.build",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the pipeline folders into")
    parser.add_argument("--only", nargs="+", choices=PIPELINES, default=PIPELINES, help="pipelines to build")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="of drawings, weights and training")
    parser.add_argument("--drawings", type=int, default=Settings.drawings, help="captioned pictures to draw")
    parser.add_argument("--vae-steps", type=int, default=Settings.vae_steps, help="autoencoder updates")
    parser.add_argument("--vae-batch", type=int, default=Settings.vae_batch, help="pictures per autoencoder update")
    parser.add_argument("--text-steps", type=int, default=Settings.text_steps, help="text encoder updates")
    parser.add_argument("--flux-steps", type=int, default=Settings.flux_steps, help="shapes-flux plain updates")
    parser.add_argument("--guided-steps", type=int, default=Settings.guided_steps, help="shapes-flux guided updates")
    parser.add_argument("--sd-steps", type=int, default=Settings.sd_steps, help="shapes-sd updates")
    parser.add_argument("--flux-batch", type=int, default=Settings.flux_batch, help="latents per shapes-flux update")
    parser.add_argument("--sd-batch", type=int, default=Settings.sd_batch, help="latents per shapes-sd update")
    parser.add_argument("--look-every", type=int, default=Settings.look_every, help="updates between two looks")
    parser.add_argument("--prompts", type=int, default=Settings.prompts, help="held-out prompts per look")
    parser.add_argument("--clips", type=int, default=Settings.clips, help="captioned clips to draw")
    parser.add_argument("--stills", type=int, default=Settings.stills, help="captioned stills to draw")
    parser.add_argument(
        "--video-vae-steps", type=int, default=Settings.video_vae_steps, help="video autoencoder updates"
    )
    parser.add_argument("--video-steps", type=int, default=Settings.video_steps, help="shapes-video updates")
    parser.add_argument("--i2v-steps", type=int, default=Settings.i2v_steps, help="shapes-i2v updates")
    chosen = vars(parser.parse_args(arguments))
    for name, value in chosen.items():
        if isinstance(value, int) and name != "seed" and value < 1:
            parser.error(f"--{name.replace('_', '-')}={value} is too few: use 1 or more")
    return Settings(**(chosen | {"only": tuple(chosen["only"])}))


if __name__ == "__main__":
    main()
