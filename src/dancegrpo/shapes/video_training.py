"""Supervised training of the video base pipelines on true captions: the causal autoencoder, then each denoiser."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dancegrpo.prompts import Prompt
from dancegrpo.shapes.clips import (
    COLORS,
    DIRECTIONS,
    FRAMES,
    RADII,
    SHAPES,
    SIZE,
    SPEEDS,
    ClipScene,
    all_clip_scenes,
    all_still_scenes,
    clip_prompts,
    draw_clip,
    draw_clips,
    i2v_prompts,
    sample_clip,
    sample_still,
    still_prompts,
)
from dancegrpo.shapes.motion import judge_clips
from dancegrpo.shapes.training import (
    DROPPED_CAPTIONS,
    Log,
    Progress,
    Reading,
    distinct_captions,
    text_states,
    text_tokens,
    to_model,
    train_denoiser,
)
from dancegrpo.shapes.video_base import FLOW_SHIFT, TEMPLATE

KL_WEIGHT = 3e-3
STEPS = 8
"""Sampling steps at which the cards state what the pipelines can do."""
CARD_GUIDANCE = 2.0
"""The true_cfg_scale of the cards' figures."""
_STILLS_EVERY = 4
"""Every fourth batch is of stills: with one frame the same networks make pictures."""


@dataclass(frozen=True)
class Footage:
    """N captioned clips: frames (N, 3, F, 32, 32) uint8, and of each its scene."""

    frames: Tensor
    scenes: tuple[ClipScene, ...]


def film(n: int, seed: int, *, first_frames: bool = False) -> Footage:
    """`n` clips of both splits; first_frames: of one object, with captions that name the motion alone."""
    rng = np.random.default_rng(seed)
    scenes = [sample_clip(rng, image=first_frames) for _ in range(n)]
    frames = torch.from_numpy(draw_clips(scenes, rng)).permute(0, 4, 1, 2, 3).contiguous()
    return Footage(frames, tuple(scenes))


def photograph(n: int, seed: int) -> Footage:
    """`n` stills of both splits, as clips of one frame."""
    rng = np.random.default_rng(seed)
    scenes = [sample_still(rng) for _ in range(n)]
    stills = np.stack([draw_clip(scene, rng) for scene in scenes])
    return Footage(torch.from_numpy(stills).permute(0, 4, 1, 2, 3).contiguous(), tuple(scenes))


# ---------------------------------------------------------------------------------------------------------- autoencoder


def train_video_autoencoder(vae: Any, data: Footage, *, steps: int, batch: int, seed: int, log: Log) -> None:
    """Reconstruction (`clip_error`) with a KL term per latent element; every fourth batch is of single frames.

    Networks compute in bfloat16 where that is fast; the weights are float32.
    """
    draws = torch.Generator().manual_seed(seed)
    vae.to(memory_format=torch.channels_last_3d).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, weight_decay=0.0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    started = time.monotonic()
    for step in range(1, steps + 1):
        still = step % _STILLS_EVERY == 0
        chosen = torch.randint(len(data.frames), (4 * batch if still else batch,), generator=draws)
        clips = data.frames[chosen]
        clips = clips[:, :, step // _STILLS_EVERY % FRAMES, None] if still else clips
        clips = to_model(clips).contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(clips).latent_dist
            mean, std = posterior.mean.float(), posterior.std.float()
            made = vae.decode(mean + std * torch.randn(mean.shape, generator=draws)).sample.float()
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
        # Ramped up: at full weight from the start the latents may stay empty.
        error = clip_error(made, clips)
        loss = error + KL_WEIGHT * min(1.0, 2 * step / steps) * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 20) == 0 or step == steps:
            told = ", ".join(f"{axis} {value:.3f}" for axis, value in reconstruction(vae, data, 64).items())
            log(f"{step}/{steps} error {float(error):.4f} reconstructions: {told} {time.monotonic() - started:.0f} s")
    vae.to(memory_format=torch.contiguous_format).eval()


def clip_error(made: Tensor, clips: Tensor) -> Tensor:
    """L2 and some L1, objects weighted 5 to 1 and colour differences 3 to 1, as for drawings. (B, 3, F, H, W)."""
    objects = ((clips - clips[:, :, :1, :1, :1]).abs().amax(dim=1, keepdim=True) > 0.1).float()
    error = made - clips
    tint = error - error.mean(dim=1, keepdim=True)
    return ((1 + 4 * objects) * (error.square() + 2 * tint.square() + 0.3 * error.abs())).mean()


@torch.no_grad()
def reconstruction(vae: Any, data: Footage, n: int) -> dict[str, float]:
    """The judge's axes, and the share that is all right, of n clips after encoding (mean) and decoding."""
    posterior = vae.encode(to_model(data.frames[:n])).latent_dist
    clips = (vae.decode(posterior.mean).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 1, 3, 4)
    return axes(clips, [_request(i, scene) for i, scene in enumerate(data.scenes[:n])])


def _request(index: int, scene: ClipScene) -> Prompt:
    return Prompt(index, scene.caption, metadata=scene.to_metadata())


@torch.no_grad()
def encode_clips(vae: Any, frames: Tensor, batch: int = 64) -> tuple[Tensor, Tensor]:
    """Posterior means and deviations, (N, 8, T, 8, 8) each, of frames (N, 3, F, 32, 32) uint8."""
    parts = [vae.encode(to_model(clips)).latent_dist for clips in frames.split(batch)]
    return torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts])


# -------------------------------------------------------------------------------------------------------- text encoders


def clips_reading() -> Reading:
    """All captions of clips and stills; those of first frames are among them."""
    known = {scene.caption: scene for scene in (*all_clip_scenes(), *all_still_scenes())}
    targets = torch.tensor([_attributes(scene) for scene in known.values()])
    sizes = tuple(int(column.max()) + 1 for column in targets.unbind(dim=1))
    return Reading(tuple(known), targets, sizes)


def _attributes(scene: ClipScene) -> tuple[int, ...]:
    """What a caption says, as class numbers; 0 = not said."""
    told = [(_number(SHAPES, entity.shape), _number(COLORS, entity.color)) for entity in scene.objects]
    kinds = told + [(0, 0)] * (2 - len(told))
    return (
        *(number for kind in kinds for number in kind),
        ("move", "bounce", "cross", "single", "pair").index(scene.task),
        _number(DIRECTIONS, scene.direction),
        _number(RADII, scene.size),
        _number(SPEEDS, scene.speed),
    )


def _number(names: Any, name: str | None) -> int:
    return 0 if name is None else list(names).index(name) + 1


# ------------------------------------------------------------------------------------------------------------ denoisers


def train_video(
    pipeline: Any, clips: Footage, stills: Footage | None, *, steps: int, batch: int, seed: int
) -> Iterator[Progress]:
    """Flow matching, x_t = (1 - s) x0 + s noise, target noise - x0 (arXiv:2210.02747), a tenth of the captions emptied.

    stills: every fourth batch is of these (text-to-image), None = of clips alone. A pipeline that takes an image is
    shown the first frame's latent, sampled from its posterior as the pipeline samples it. s is uniform, then shifted as
    the sampler's schedule is. Yields after every step; when exhausted, the pipeline holds the averaged weights.
    """
    vae, animates = pipeline.vae, "Image" in type(pipeline).__name__
    scale = vae.config.scaling_factor
    sets = [(encode_clips(vae, clips.frames)[0] * scale, clips.scenes)]
    if stills is not None:
        sets.append((encode_clips(vae, stills.frames)[0] * scale, stills.scenes))
    shown = [part * scale for part in encode_clips(vae, clips.frames[:, :, :1])] if animates else []
    told = _reader(pipeline, [scene.caption for _, scenes in sets for scene in scenes])

    def loss(generator: torch.Generator) -> Tensor:
        which = int(len(sets) > 1 and torch.randint(_STILLS_EVERY, (), generator=generator) == 0)
        latents, size = sets[which][0], batch * (2 if which else 1)
        chosen = torch.randint(len(latents), (size,), generator=generator)
        x0 = latents[chosen]
        sigma = torch.rand(size, generator=generator)
        sigma = FLOW_SHIFT * sigma / (1 + (FLOW_SHIFT - 1) * sigma)
        noise = torch.randn(x0.shape, generator=generator)
        x = x0 + sigma.reshape(-1, 1, 1, 1, 1) * (noise - x0)
        if shown:
            mean, std = (part[chosen] for part in shown)
            image = mean + std * torch.randn(mean.shape, generator=generator)
            x = torch.cat([x, F.pad(image, (0, 0, 0, 0, 0, x.shape[2] - 1))], dim=1)
        empty = torch.rand(size, generator=generator) < DROPPED_CAPTIONS
        conditions = told(chosen + which * len(sets[0][0]), empty)
        return F.mse_loss(pipeline.transformer(x, 1000 * sigma, **conditions).sample, noise - x0)

    yield from train_denoiser(pipeline.transformer, loss, steps=steps, seed=seed)


@torch.no_grad()
def _reader(pipeline: Any, captions: Sequence[str]) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """`conditions(index, empty)`: what these captions tell the transformer. The text encoders stay as they are."""
    distinct, row_of = distinct_captions(captions)
    llama, clip = (text_tokens(t, [*distinct, ""]) for t in (pipeline.tokenizer, pipeline.tokenizer_2))
    states = text_states(pipeline.tokenizer, pipeline.text_encoder, llama)
    mask = (llama != pipeline.tokenizer.pad_token_id).long()
    pooled = pipeline.text_encoder_2(clip).pooler_output

    def conditions(index: Tensor, empty: Tensor) -> dict[str, Tensor]:
        row = row_of[index].masked_fill(empty, len(distinct))
        # No longer than the longest caption of the batch: what is masked out costs time all the same.
        longest = int(mask[row].sum(dim=1).max())
        text = {"encoder_hidden_states": states[row, :longest], "encoder_attention_mask": mask[row, :longest]}
        return text | {"pooled_projections": pooled[row]}

    return conditions


# ----------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def film_by(pipeline: Any, requests: Sequence[Prompt], seed: int, *, frames: int, guidance: float) -> Tensor:
    """(N, F, 3, 32, 32) in [0, 1] from the pipeline itself at its card's settings, noise fixed by the seed."""
    pipeline.set_progress_bar_config(disable=True)
    generator, made = torch.Generator().manual_seed(seed), []
    for first in range(0, len(requests), 64):
        batch = requests[first : first + 64]
        arguments = {} if batch[0].image is None else {"image": _pictures(batch)}
        call = deployment(guidance) | {"num_frames": frames, "negative_prompt": [""] * len(batch), **arguments}
        texts = [request.text for request in batch]
        made.append(pipeline(prompt=texts, generator=generator, output_type="pt", **call).frames)
    return torch.cat(made).float()


def _pictures(requests: Sequence[Prompt]) -> Tensor:
    pictures = np.stack([np.asarray(request.image) for request in requests])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def deployment(guidance: float = CARD_GUIDANCE) -> dict[str, Any]:
    """The call arguments at which the cards state what a pipeline can do; num_frames comes beside them."""
    call: dict[str, Any] = {"height": SIZE, "width": SIZE, "num_inference_steps": STEPS, "true_cfg_scale": guidance}
    return call | {"max_sequence_length": 16, "prompt_template": TEMPLATE}


def axes(media: Tensor, requests: Sequence[Prompt]) -> dict[str, float]:
    """Means of the judge's axes over clips (N, F, 3, 32, 32), and "pass", the share that is right in all."""
    verdict = judge_clips(media.numpy(), requests)
    animates, still = "start" in requests[0].metadata and requests[0].metadata["start"], media.shape[1] == 1
    names = ["vq", "ta"] if still else ["vq", "mq", "ta", *["identity"] * bool(animates)]
    return {name: float(getattr(verdict, name).mean()) for name in names} | {"pass": float(verdict.exact.mean())}


def held_out_axes(pipeline: Any, n: int, *, task: str, guidance: float, seed: int = 1234) -> dict[str, float]:
    """`axes` of `n` held-out prompts; task: t2v, t2i or i2v."""
    source = {"t2v": clip_prompts, "t2i": still_prompts, "i2v": i2v_prompts}[task]("heldout", n)
    requests = list(source)
    return axes(film_by(pipeline, requests, seed, frames=1 if task == "t2i" else FRAMES, guidance=guidance), requests)
