"""Brief supervised training of the base pipelines on true captions: the autoencoder, then each denoiser."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dancegrpo.prompts import Prompt
from dancegrpo.shapes.base import FLOW_SHIFT, FLUX_GUIDANCE, TEXT_TOKENS
from dancegrpo.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    RELATIONS,
    SHAPES,
    SIZE,
    TASKS,
    Scene,
    all_scenes,
    draw,
    prompts,
    sample_scene,
)
from dancegrpo.shapes.verifier import judge

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FluxPipeline, StableDiffusionPipeline

Log = Callable[[str], None]
DROPPED_CAPTIONS = 0.1
"""Share of captions replaced by the empty one, for classifier-free guidance."""
KL_WEIGHT = 5e-3
"""Large enough that each latent element carries about one nat: then the decoder forgives an imperfect denoiser."""
LEARNING_RATE = 2e-3
"""Of the denoisers, after a warm-up of 100 steps."""
MAX_GUIDANCE = 4.5
"""Of what shapes-flux's guidance embedding is taught."""
COOL_DOWN = 0.5
"""Share of the denoiser's steps over which the rate falls to zero."""


@dataclass(frozen=True)
class Drawings:
    """N captioned drawings. images: (N, 3, 64, 64) uint8."""

    images: Tensor
    captions: tuple[str, ...]
    prompts: tuple[Prompt, ...]


def draw_many(n: int, seed: int) -> Drawings:
    """`n` drawings of scenes from both splits, the same ones for the same seed."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(n)]
    images = np.empty((n, SIZE, SIZE, 3), np.uint8)
    for image, scene in zip(images, scenes, strict=True):
        image[:] = draw(scene, rng)
    requests = tuple(Prompt(i, scene.caption, metadata=scene.to_metadata()) for i, scene in enumerate(scenes))
    return Drawings(
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), tuple(p.text for p in requests), requests
    )


def to_model(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float [-1, 1]."""
    return images.float() / 127.5 - 1


class Average:
    """Exponential moving average of weights, with a short memory at first."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.live = list(model.parameters())
        self.mean = [p.detach().clone() for p in self.live]
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        """Take the live weights in; call after each optimizer step."""
        self.updates += 1
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.live], 1 - keep)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averaged and the live weights; call again to undo."""
        for mean, live in zip(self.mean, self.live, strict=True):
            kept = live.clone()
            live.copy_(mean)
            mean.copy_(kept)


@dataclass(frozen=True)
class Progress:
    """After `step` updates: the recent mean loss, and the averaged weights for whoever wants to look at them."""

    step: int
    loss: float
    average: Average


# ---------------------------------------------------------------------------------------------------------- autoencoder


def train_autoencoder(vae: AutoencoderKL, data: Drawings, *, steps: int, batch: int, seed: int, log: Log) -> None:
    """Reconstruction (`picture_error`) with a KL term per latent element.

    Small batches: the number of updates, not of pictures, is what it lacks.
    """
    draws = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    started = time.monotonic()
    vae.train()
    for step in range(1, steps + 1):
        images = to_model(data.images[torch.randint(len(data.images), (batch,), generator=draws)])
        images = images.contiguous(memory_format=torch.channels_last)  # an eighth faster on CPUs
        posterior = vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=draws)
        error = picture_error(vae.decode(latents).sample, images)
        # Ramped up: at full weight from the start the latents may stay empty.
        loss = error + KL_WEIGHT * min(1.0, 2 * step / steps) * posterior.kl().mean() / latents[0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 20) == 0 or step == steps:
            passed = reconstruction_rate(vae, data, 200)
            seconds = time.monotonic() - started
            log(f"{step}/{steps} error {error.item():.4f} reconstructions passing {passed:.3f} {seconds:.0f} s")
    vae.eval()


def picture_error(made: Tensor, images: Tensor) -> Tensor:
    """L2 and some L1, objects weighted 5 to 1 and colour differences 3 to 1.

    Without the weights the flat background and the brightness are all that is learned for minutes: grey objects.
    """
    objects = ((images - images[:, :, :1, :1]).abs().amax(dim=1, keepdim=True) > 0.1).float()
    error = made - images
    tint = error - error.mean(dim=1, keepdim=True)
    return ((1 + 4 * objects) * (error.square() + 2 * tint.square() + 0.3 * error.abs())).mean()


@torch.no_grad()
def reconstruction_rate(vae: AutoencoderKL, data: Drawings, n: int) -> float:
    """Share of n drawings that still pass the exact verdict after encoding (mean) and decoding."""
    latents = vae.encode(to_model(data.images[:n])).latent_dist.mean
    images = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    return float(judge(images.numpy(), data.prompts[:n]).exact.mean())


@torch.no_grad()
def encode_all(vae: AutoencoderKL, data: Drawings, batch: int = 64) -> Tensor:
    """Posterior means, (N, 8, 8, 8). The denoisers learn these: the posterior's noise would only blur their aim."""
    return torch.cat([vae.encode(to_model(images)).latent_dist.mean for images in data.images.split(batch)])


def normalise(vae: AutoencoderKL, latents: Tensor, *, shift: bool) -> None:
    """Set the config's factors so that (latents - shift) * scale has unit mean square; without shift, shift is none."""
    center = latents.mean() if shift else torch.zeros(())
    power = (latents - center).square().mean()
    vae.register_to_config(scaling_factor=float(power.rsqrt()), shift_factor=float(center) if shift else None)


# -------------------------------------------------------------------------------------------------------- text encoders

_ATTRIBUTE_SIZES = (len(SHAPES), len(COLORS) + 1, len(SHAPES) + 1, len(COLORS) + 1, 4, len(RELATIONS) + 1, 4)


def attributes(scene: Scene) -> tuple[int, ...]:
    """What a caption says, as class numbers: both shapes and colours, count, relation, background; 0 = not said."""
    first = scene.entities[0]
    second = scene.entities[1] if scene.task != "counting" and len(scene.entities) == 2 else None
    return (
        SHAPES.index(first.shape),
        _number(COLORS, first.color),
        _number(SHAPES, second.shape if second else None),
        _number(COLORS, second.color if second else None),
        len(scene.entities) - 1,
        _number(RELATIONS, scene.relation),
        _number(BACKGROUNDS, scene.background),
    )


def _number(names: Iterable[str], name: str | None) -> int:
    return 0 if name is None else list(names).index(name) + 1


@dataclass(frozen=True)
class Reading:
    """What a text encoder must learn to read: captions, and of each the class number of every attribute.

    targets: (N, A) int64. sizes: number of classes of each of the A attributes.
    """

    captions: tuple[str, ...]
    targets: Tensor
    sizes: tuple[int, ...]


def drawings_reading() -> Reading:
    """All captions of the drawings."""
    scenes = all_scenes()
    captions = tuple(scene.caption for scene in scenes)
    return Reading(captions, torch.tensor([attributes(scene) for scene in scenes]), _ATTRIBUTE_SIZES)


def train_text(tokenizer: Any, encoder: Any, reading: Reading, *, steps: int, seed: int) -> float:
    """Teach an encoder to read: linear heads on its tokens must recover every attribute. Returns their accuracy.

    Real pipelines, too, come with encoders that were trained on other tasks before; without this, minutes of training
    the denoiser go by before it notices the words. A causal encoder answers where the whole caption has been seen:
    CLIP at the end token and the padding behind it, Llama at the last word; T5 wherever there is text.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = text_tokens(tokenizer, list(reading.captions))
    answers = _answers(tokenizer, encoder, ids)
    heads = nn.Linear(encoder.config.hidden_size, sum(reading.sizes))
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-3)
    right = 0.0
    for step in range(1, steps + 1):
        chosen = torch.randint(len(ids), (96,), generator=generator)
        tokens = text_states(tokenizer, encoder, ids[chosen])
        row, position = answers[chosen].nonzero(as_tuple=True)
        logits = heads(tokens[row, position]).split(reading.sizes, dim=-1)
        wanted = reading.targets[chosen][row].unbind(-1)
        loss = torch.stack([F.cross_entropy(x, y) for x, y in zip(logits, wanted, strict=True)]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / 50, 3 * (1 - step / steps) + 0.01)
        optimizer.step()
        hits = torch.stack([x.argmax(-1) == y for x, y in zip(logits, wanted, strict=True)])
        right += (hits.float().mean().item() - right) / min(step, 50)
    encoder.requires_grad_(False).eval()
    return right


def text_states(tokenizer: Any, encoder: Any, ids: Tensor) -> Tensor:
    """The states (N, 16, D) that a denoiser is given: the last ones, or Llama's before its last two layers."""
    if encoder.config.model_type != "llama":
        return encoder(ids).last_hidden_state
    mask = ids != tokenizer.pad_token_id
    return encoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-3]


def _answers(tokenizer: Any, encoder: Any, ids: Tensor) -> Tensor:
    """(N, 16) bool: the positions where an encoder has seen the caption."""
    text = ids != tokenizer.pad_token_id
    if encoder.config.model_type == "llama":
        return text & ~torch.cat([text[:, 1:], text.new_zeros(len(text), 1)], dim=1)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        return (ids == tokenizer.eos_token_id).cumsum(dim=1) > 0
    return text


# ------------------------------------------------------------------------------------------------------------ denoisers


def train_flux(
    pipeline: FluxPipeline,
    latents: Tensor,
    captions: Sequence[str],
    *,
    steps: int,
    batch: int,
    seed: int,
    taught: float = 0.0,
    rate: float = LEARNING_RATE,
) -> Iterator[Progress]:
    """Flow matching, x_t = (1 - s) x0 + s noise, target noise - x0 (arXiv:2210.02747); the text encoders learn too.

    s is uniform, then shifted as the sampler's schedule is. A tenth of the captions is emptied. Guidance is 1, but for
    a share `taught` of the rows: these give the guidance embedding its meaning, one call for what would be two of
    classifier-free guidance. They regress u + (w - 1) (v(caption) - v("")), w uniform in [1, MAX_GUIDANCE], v the
    averaged model itself at guidance 1 (guidance distillation, arXiv:2210.03142, with a moving teacher).
    Yields after every step; when exhausted, the pipeline holds the averaged weights.
    """
    distinct, index_of = distinct_captions(captions)
    told, empty = _flux_reader(pipeline, [*distinct, ""]), len(distinct)
    shift, scale = pipeline.vae.config.shift_factor, pipeline.vae.config.scaling_factor
    live = nn.ModuleList([pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2])
    live.requires_grad_(True)
    teacher = copy.deepcopy(live).requires_grad_(False)
    plain = batch - round(taught * batch)

    def loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        x0 = pipeline._pack_latents((latents[chosen] - shift) * scale, batch, *latents.shape[1:])
        sigma = torch.rand(batch, generator=generator)
        sigma = FLOW_SHIFT * sigma / (1 + (FLOW_SHIFT - 1) * sigma)
        noise = torch.randn(x0.shape, generator=generator)
        x, target, row = x0 + sigma[:, None, None] * (noise - x0), noise - x0, index_of[chosen]
        row[: round(DROPPED_CAPTIONS * batch)] = empty
        guidance = 1 + (MAX_GUIDANCE - 1) * torch.rand(batch, generator=generator)
        guidance[:plain] = 1.0
        if plain < batch:
            with torch.no_grad():
                rows = torch.cat([row[plain:], torch.full((batch - plain,), empty)])
                twice, sigmas = torch.cat([x[plain:]] * 2), torch.cat([sigma[plain:]] * 2)
                with_text, without = told(teacher, twice, sigmas, rows, torch.ones(len(rows))).chunk(2)
                target[plain:] += (guidance[plain:] - 1)[:, None, None] * (with_text - without)
        return F.mse_loss(told(live, x, sigma, row, guidance), target)

    for progress in train_denoiser(live, loss, steps=steps, seed=seed, rate=rate):
        if taught:
            with torch.no_grad():
                torch._foreach_copy_(list(teacher.parameters()), progress.average.mean)
        yield progress
    live.requires_grad_(False)


def _flux_reader(pipeline: FluxPipeline, captions: list[str]) -> Callable[..., Tensor]:
    """`velocity(networks, x, sigma, row, guidance)` at the captions of these rows; networks: transformer, CLIP, T5."""
    clip_ids, t5_ids = text_tokens(pipeline.tokenizer, captions), text_tokens(pipeline.tokenizer_2, captions)
    image_ids = pipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)
    text_ids = torch.zeros(TEXT_TOKENS, 3)

    def velocity(networks: nn.ModuleList, x: Tensor, sigma: Tensor, row: Tensor, guidance: Tensor) -> Tensor:
        transformer, clip, t5 = networks
        return transformer(
            hidden_states=x,
            timestep=sigma,
            guidance=guidance,
            pooled_projections=clip(clip_ids[row]).pooler_output,
            encoder_hidden_states=t5(t5_ids[row]).last_hidden_state,
            txt_ids=text_ids,
            img_ids=image_ids,
        ).sample

    return velocity


def train_sd(
    pipeline: StableDiffusionPipeline, latents: Tensor, captions: Sequence[str], *, steps: int, batch: int, seed: int
) -> Iterator[Progress]:
    """Noise prediction (arXiv:2006.11239), a tenth of the captions emptied. Yields as `train_flux`."""
    distinct, index_of = distinct_captions(captions)
    with torch.no_grad():
        words = pipeline.text_encoder(text_tokens(pipeline.tokenizer, [*distinct, ""])).last_hidden_state
    scale, scheduler = pipeline.vae.config.scaling_factor, pipeline.scheduler

    def loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        x0 = latents[chosen] * scale
        timestep = torch.randint(scheduler.config.num_train_timesteps, (batch,), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        kept = torch.rand(batch, generator=generator) >= DROPPED_CAPTIONS
        row = index_of[chosen].where(kept, len(distinct))
        return F.mse_loss(pipeline.unet(scheduler.add_noise(x0, noise, timestep), timestep, words[row]).sample, noise)

    yield from train_denoiser(pipeline.unet, loss, steps=steps, seed=seed)


def distinct_captions(captions: Sequence[str]) -> tuple[list[str], Tensor]:
    """The distinct captions, sorted, and the index into them of every caption."""
    distinct = sorted(set(captions))
    position = {caption: i for i, caption in enumerate(distinct)}
    return distinct, torch.tensor([position[caption] for caption in captions])


def text_tokens(tokenizer: Any, captions: list[str]) -> Tensor:
    """(N, 16) ids, padded and cut as the pipelines do it."""
    return tokenizer(
        captions, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def train_denoiser(
    model: nn.Module,
    loss: Callable[[torch.Generator], Tensor],
    *,
    steps: int,
    seed: int,
    rate: float = LEARNING_RATE,
) -> Iterator[Progress]:
    """AdamW at a constant rate that falls linearly to zero over the last `COOL_DOWN` of the steps."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 100, (1 - step / steps) / COOL_DOWN)
    )
    average, generator = Average(model, 0.99), torch.Generator().manual_seed(seed)
    recent = 0.0
    for step in range(1, steps + 1):
        value = loss(generator)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.update()
        recent += (value.item() - recent) / min(step, 100)
        yield Progress(step, recent, average)
    average.swap()


# ----------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def generate(pipeline: FluxPipeline | StableDiffusionPipeline, captions: Sequence[str], seed: int) -> Tensor:
    """(N, 3, 64, 64) in [0, 1] from the pipeline itself at its deployment settings, noise fixed by the seed."""
    settings = deployment(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    batches = [list(captions[i : i + 100]) for i in range(0, len(captions), 100)]
    made = [
        pipeline(batch, height=SIZE, width=SIZE, generator=generator, output_type="pt", **settings).images
        for batch in batches
    ]
    return torch.cat(made).float()


def deployment(pipeline: FluxPipeline | StableDiffusionPipeline) -> dict[str, Any]:
    """The call arguments at which the pass rates are stated."""
    if type(pipeline).__name__ == "FluxPipeline":
        return {"num_inference_steps": 8, "guidance_scale": FLUX_GUIDANCE, "max_sequence_length": TEXT_TOKENS}
    return {"num_inference_steps": 10, "guidance_scale": 1.5}


def pass_rates(pipeline: FluxPipeline | StableDiffusionPipeline, n: int, seed: int = 1234) -> dict[str, float]:
    """Held-out exact pass rate over `n` prompts: "all", then per task."""
    requests = prompts("heldout", n)
    exact = judge(generate(pipeline, [p.text for p in requests], seed).numpy(), requests).exact
    tasks = np.array([p.metadata["task"] for p in requests])
    return {"all": float(exact.mean())} | {task: float(exact[tasks == task].mean()) for task in TASKS}
