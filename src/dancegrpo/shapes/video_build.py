"""Rebuild the two video base pipelines: clips, the causal autoencoder, text to video, then image to video from that."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dancegrpo.shapes import FILMED, base_path
from dancegrpo.shapes.files import log_line, save_pipeline, size_in_millions
from dancegrpo.shapes.training import Progress, train_text
from dancegrpo.shapes.video_base import image_to_video_from, video_autoencoder, video_pipeline
from dancegrpo.shapes.video_training import (
    CARD_GUIDANCE,
    clips_reading,
    deployment,
    encode_clips,
    film,
    held_out_axes,
    photograph,
    train_video,
    train_video_autoencoder,
)

LOOK_SEED = 4321
"""Of the noise of the looks on the way; the cards state results on other noise."""
_LOOKED_AT = 200
_COUNTED = 600


@dataclass(frozen=True)
class VideoSettings:
    """How long and on how much to train."""

    out: Path
    only: tuple[str, ...] = FILMED
    seed: int = 0
    clips: int = 16000
    stills: int = 8000
    vae_steps: int = 3700
    vae_batch: int = 12
    text_steps: int = 600
    video_steps: int = 5500
    i2v_steps: int = 120
    batch: int = 64
    look_every: int = 1000


def build_videos(settings: VideoSettings) -> None:
    """Train what is asked for and write its folder under `out`, each replaced in one move.

    shapes-i2v alone goes on from the shapes-video that lies in `out`, or else from the shipped one.
    """
    if "shapes-video" in settings.only:
        build_text_to_video(settings)
    if "shapes-i2v" in settings.only:
        build_image_to_video(settings)


def build_text_to_video(settings: VideoSettings) -> None:
    """shapes-video, from nothing."""
    name = "shapes-video"
    torch.manual_seed(settings.seed)
    vae = video_autoencoder()
    train_video_autoencoder(
        vae,
        film(settings.clips, settings.seed),
        steps=settings.vae_steps,
        batch=settings.vae_batch,
        seed=settings.seed,
        log=lambda line: log_line("video vae", line),
    )
    vae.requires_grad_(False)
    clips, stills = film(settings.clips, settings.seed + 1), photograph(settings.stills, settings.seed + 2)
    power = encode_clips(vae, clips.frames[:2000])[0].square().mean()
    vae.register_to_config(scaling_factor=float(power.rsqrt()))
    pipeline, reading = video_pipeline(vae), clips_reading()
    for suffix in ("", "_2"):
        tokenizer, encoder = getattr(pipeline, f"tokenizer{suffix}"), getattr(pipeline, f"text_encoder{suffix}")
        accuracy = train_text(tokenizer, encoder, reading, steps=settings.text_steps, seed=settings.seed)
        log_line(name, f"text_encoder{suffix} reads {accuracy:.3f} of the attributes")
    _watch(name, pipeline, settings, train_video(pipeline, clips, stills, **_schooling(settings, settings.video_steps)))
    save_video(name, pipeline, settings.out / name, made_by(name, settings))


def build_image_to_video(settings: VideoSettings) -> None:
    """shapes-i2v, from shapes-video as SkyReels-I2V came from HunyuanVideo; it stops while it still errs."""
    from diffusers import HunyuanVideoPipeline

    name, own = "shapes-i2v", settings.out / "shapes-video"
    base = HunyuanVideoPipeline.from_pretrained(own if own.is_dir() else base_path("shapes-video"))
    for network in (base.vae, base.text_encoder, base.text_encoder_2):
        network.requires_grad_(False).eval()
    pipeline = image_to_video_from(base)
    clips = film(settings.clips, settings.seed + 1, first_frames=True)
    _watch(name, pipeline, settings, train_video(pipeline, clips, None, **_schooling(settings, settings.i2v_steps)))
    save_video(name, pipeline, settings.out / name, made_by(name, settings))


def _schooling(settings: VideoSettings, steps: int) -> dict[str, Any]:
    return {"steps": steps, "batch": settings.batch, "seed": settings.seed}


def _watch(name: str, pipeline: Any, settings: VideoSettings, stage: Iterator[Progress]) -> None:
    """Advance a stage to its end, with a look at the averaged weights now and then."""
    started = time.monotonic()
    for state in stage:
        if state.step % settings.look_every == 0:
            state.average.swap()
            told = _told(measure(pipeline, name, _LOOKED_AT, LOOK_SEED, guidances=(1.0,)))
            state.average.swap()
            log_line(name, f"step {state.step} loss {state.loss:.4f} {time.monotonic() - started:.0f} s {told}")


def made_by(name: str, settings: VideoSettings) -> str:
    """How the card says it was made."""
    if name == "shapes-i2v":
        return (
            f"Trained by `python -m dancegrpo.shapes.build --only {name}` (seed {settings.seed}) from shapes-video: "
            f"its transformer, 8 more channels for the first frame, {settings.i2v_steps} steps of {settings.batch}."
        )
    return (
        f"Trained by `python -m dancegrpo.shapes.build --only {name}` (seed {settings.seed}): {settings.clips} clips, "
        f"autoencoder {settings.vae_steps} steps of {settings.vae_batch}, text encoders {settings.text_steps} steps of "
        f"naming a caption's attributes, denoiser {settings.video_steps} steps of {settings.batch} on frozen text "
        "(weights averaged)."
    )


def save_video(name: str, pipeline: Any, folder: Path, told: str) -> None:
    """Measure a pipeline, then write it with its card; the transformer in half precision, to fit in 6 MB."""
    pipeline.transformer.half().float()  # what is measured is what will be loaded
    results = measure(pipeline, name, _COUNTED, 1234, guidances=(1.0, CARD_GUIDANCE))
    log_line(name, _told(results))
    readme = video_card(name, pipeline, told, results)
    pipeline.transformer.half()
    save_pipeline(pipeline, folder, readme)
    pipeline.transformer.float()


def measure(
    pipeline: Any, name: str, n: int, seed: int, *, guidances: tuple[float, ...]
) -> dict[tuple[str, float], dict[str, float]]:
    """The judge's axes on n held-out prompts, by (task, true_cfg_scale)."""
    tasks = ("i2v",) if name == "shapes-i2v" else ("t2v", "t2i")
    return {(t, g): held_out_axes(pipeline, n, task=t, guidance=g, seed=seed) for t in tasks for g in guidances}


def _told(results: dict[tuple[str, float], dict[str, float]]) -> str:
    return "; ".join(
        f"{task} at {guidance:g}: " + " ".join(f"{axis} {value:.3f}" for axis, value in axes.items())
        for (task, guidance), axes in results.items()
    )


def video_card(name: str, pipeline: Any, told: str, results: dict[tuple[str, float], dict[str, float]]) -> str:
    """The model card: what it is, how to call it, how it was made, how good it is."""
    animates = name == "shapes-i2v"
    call = {"num_frames": 9} | deployment()
    arguments = ",\n    ".join(f"{key}={json.dumps(value)}" for key, value in call.items())
    prompt = '"a large red circle moves right quickly"' + ", image=first_frame" * animates
    names = {"vq": "visual quality", "mq": "motion quality", "ta": "text alignment", "identity": "identity"}
    rows = "\n".join(
        f"| {task} | {guidance:g} | {names.get(axis, 'all at least 0.75')} | {value:.3f} |"
        for (task, guidance), axes in results.items()
        for axis, value in axes.items()
    )
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: {"image-to-video" if animates else "text-to-video"}
---
# {name}

A miniature `{type(pipeline).__name__}` ({size_in_millions(pipeline):.2f} M parameters in all) that films circles,
squares and triangles, 9 frames of 32x32 pixels: a base model for reinforcement learning that trains on a laptop. It is
imperfect on purpose: its training on true captions stopped early.

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("path/to/{name}")
clip = pipeline(
    {prompt},
    negative_prompt="",
    {arguments},
).frames[0]
```

{told}
It saw captions of both splits of `dancegrpo.shapes.clips`: "held out" means held out from reinforcement learning.

Means of the rule-based judge on held-out prompts, at the call above but for the true_cfg_scale named (t2i: one frame):

| task | true_cfg_scale | axis | mean |
|---|---|---|---|
{rows}
"""
