"""Stable Diffusion 1.x and 2.x: a UNet on (C, h, w) latents that predicts noise or v, with two-branch guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dancegrpo.errors import ConfigError, ModelError
from dancegrpo.policies.base import Condition
from dancegrpo.policies.export import Usage
from dancegrpo.policies.guidance import both_branches, combine
from dancegrpo.policies.matching import require_text_width
from dancegrpo.policies.pipeline import PipelinePolicy
from dancegrpo.prompts import Prompt
from dancegrpo.sde import DiffusionDynamics, diffusion_alpha_bar
from dancegrpo.settings import ModelConfig, RolloutConfig


class StableDiffusionPolicy(PipelinePolicy):
    """`StableDiffusionPipeline`. Latents (C, h, w); `predict` gives the noise epsilon, whatever the UNet predicts.

    Whichever scheduler the checkpoint ships, sampling follows DDIM on its noise schedule and timestep spacing: the
    sampler with a known density per step. At noise level 0 that is the pipeline with a `DDIMScheduler`, bit for bit
    for epsilon prediction; with "trailing" or "linspace" spacing only where num_steps divides the training steps.
    """

    denoisers: ClassVar[tuple[str, ...]] = ("unet",)
    components: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder")
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    dynamics: DiffusionDynamics

    @property
    def guided(self) -> bool:
        """The pipeline's rule: a scale of 1 or less turns guidance off."""
        return self.model.guidance_scale > 1

    def _check(self, model: ModelConfig, rollout: RolloutConfig) -> None:
        config = self.module.config
        if rollout.shift is not None:
            raise ConfigError(f"rollout.shift={rollout.shift} is for rectified flow, not Stable Diffusion: remove it.")
        if config.in_channels != self.pipeline.vae.config.latent_channels or config.time_cond_proj_dim is not None:
            raise ModelError(f"the UNet of {self.folder} is an inpainting or distilled one: use a text-to-image base.")
        self.latent_shape = (config.in_channels, *self._grid(self.pipeline.vae_scale_factor))
        self._check_text(config)

    def _check_text(self, unet: Any) -> None:
        width = self.pipeline.text_encoder.config.hidden_size
        require_text_width(self.folder, "text encoder", width, "UNet", unet.cross_attention_dim)

    def _dynamics(self, rollout: RolloutConfig) -> DiffusionDynamics:
        sde = "ddim" if rollout.sde == "auto" else rollout.sde
        if sde not in ("ddim", "paper"):
            raise ConfigError(f"rollout.sde={sde} is for rectified flow; for Stable Diffusion use auto, ddim or paper.")
        scheduler = self.pipeline_scheduler()
        self.prediction_type = scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ModelError(
                f"{self.folder} has prediction_type={self.prediction_type}: use a model that predicts epsilon or v."
            )
        try:
            scheduler.set_timesteps(rollout.num_steps)
            timesteps = scheduler.timesteps
            alpha_bar = diffusion_alpha_bar(scheduler.alphas_cumprod, timesteps, scheduler.final_alpha_cumprod)
            return DiffusionDynamics(timesteps, alpha_bar, sde)
        except (ValueError, IndexError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(
                f"no schedule of {rollout.num_steps} steps from the scheduler of {self.folder}: {reason}"
            ) from error

    def pipeline_scheduler(self) -> Any:
        """DDIM on the shipped noise schedule: see `PipelinePolicy.pipeline_scheduler`."""
        from diffusers import DDIMScheduler

        if "sigma_data" in self.pipeline.scheduler.config:
            raise ModelError(
                f"the UNet of {self.folder} is preconditioned (EDM), DDIM cannot sample it: use another base."
            )
        # Latents have no bounds to be clipped to; DDIM's default would clip them where the shipped config is silent.
        return DDIMScheduler.from_config(self.pipeline.scheduler.config, clip_sample=False, thresholding=False)

    @property
    def exact(self) -> bool:
        """To the last bit for epsilon; a predicted v is solved for epsilon, which rounds."""
        return super().exact and self.prediction_type == "epsilon"

    def _encode_settings(self) -> tuple[object, ...]:
        return self.model.dtype, self.guided

    def _encode(self, prompt: Prompt) -> Condition:
        text, negative = self.pipeline.encode_prompt(prompt.text, self.device, 1, self.guided, prompt.negative)
        tensors = {"encoder_hidden_states": text}
        return Condition(tensors | {"negative_encoder_hidden_states": negative} if self.guided else tensors)

    def predict(self, x_t: Tensor, step: Tensor, condition: Condition) -> Tensor:
        """epsilon, guided: negative + scale (positive - negative), both in one batch. See `Policy.predict`."""
        tensors, timestep, x = condition.tensors, self.dynamics.timesteps[step], x_t
        if self.guided:
            tensors, timestep, x = both_branches(tensors), torch.cat([timestep] * 2), torch.cat([x_t] * 2)
        with self.autocast():
            out = self.network()(x, timestep, return_dict=False, **self._told(tensors))[0].float()
        if self.guided:
            out = combine(out, self.model.guidance_scale)
        return out if self.prediction_type == "epsilon" else self._epsilon(x_t, out, step)

    def _told(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Conditions of N rows -> the UNet's arguments."""
        return dict(tensors)

    def _epsilon(self, x_t: Tensor, v: Tensor, step: Tensor) -> Tensor:
        """v = sqrt(alpha_bar) epsilon - sqrt(1 - alpha_bar) x0, solved for epsilon at x_t (arXiv:2202.00512)."""
        alpha_bar = self.dynamics.alpha_bar[step].reshape(-1, 1, 1, 1)
        return alpha_bar.sqrt() * v + (1 - alpha_bar).sqrt() * x_t

    def decode(self, latents: Tensor, condition: Condition) -> Tensor:
        """Latents (B, C, h, w) -> (B, 1, 3, H, W): see `Policy.decode`."""
        return self._decode(latents / self.pipeline.vae.config.scaling_factor)

    def latents(self, media: Tensor, condition: Condition) -> Tensor:
        """(B, 1, 3, H, W) -> latents (B, C, h, w): see `Policy.latents`."""
        return self._mode(media, pictures=True) * self.pipeline.vae.config.scaling_factor

    def _usage(self) -> Usage:
        model, steps = self.model, self.dynamics.num_steps
        arguments: dict[str, object] = {"height": model.height, "width": model.width, "num_inference_steps": steps}
        arguments |= {"guidance_scale": model.guidance_scale}
        return Usage("DDIMScheduler", ".from_config(pipe.scheduler.config, clip_sample=False)", arguments)


class StableDiffusionXLPolicy(StableDiffusionPolicy):
    """`StableDiffusionXLPipeline`, the base model alone: two text encoders, a pooled embedding and the picture's size.

    The sizes that the UNet is told (original, crop, target) are the pipeline's defaults: the run's own size, uncropped.
    A prompt without a negative one is guided by zeros where the checkpoint says so (`force_zeros_for_empty_prompt`),
    as in the pipeline. The invisible watermark that the pipeline can add is left off: no judge should see it.
    """

    components: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder", "text_encoder_2")
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

    def _check(self, model: ModelConfig, rollout: RolloutConfig) -> None:
        super()._check(model, rollout)
        if self.pipeline.vae.config.latents_mean is not None:
            raise ModelError(f"the latents of {self.folder} are normalised by mean and std: use an SDXL base.")
        self.pipeline.watermark = None
        sizes = [model.height, model.width, 0, 0, model.height, model.width]
        self._time_ids = torch.tensor([sizes], dtype=torch.float32, device=self.device)

    def _check_text(self, unet: Any) -> None:
        first, second = self.pipeline.text_encoder.config, self.pipeline.text_encoder_2.config
        widths = first.hidden_size + second.hidden_size
        require_text_width(self.folder, "pair of text encoders", widths, "UNet", unet.cross_attention_dim)
        if unet.addition_embed_type != "text_time":
            raise ModelError(f"the UNet of {self.folder} reads no picture sizes: use an SDXL base.")
        # A refiner reads five numbers about the picture, not six.
        pooled = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
        require_text_width(self.folder, "pooled text encoder", second.projection_dim, "UNet", pooled)

    def _encode_settings(self) -> tuple[object, ...]:
        return *super()._encode_settings(), self.pipeline.config.force_zeros_for_empty_prompt

    def _encode(self, prompt: Prompt) -> Condition:
        text, negative, pooled, negative_pooled = self.pipeline.encode_prompt(
            prompt.text,
            device=self.device,
            do_classifier_free_guidance=self.guided,
            negative_prompt=prompt.negative or None,
        )
        tensors = {"encoder_hidden_states": text, "text_embeds": pooled}
        if self.guided:
            tensors |= {"negative_encoder_hidden_states": negative, "negative_text_embeds": negative_pooled}
        return Condition(tensors)

    def pipeline_arguments(self, prompts: Sequence[Prompt], noise: Tensor) -> dict[str, Any]:
        """See `PipelinePolicy.pipeline_arguments`; an empty negative prompt is none."""
        arguments = super().pipeline_arguments(prompts, noise)
        if not any(arguments.get("negative_prompt", ())):
            arguments.pop("negative_prompt", None)
        return arguments

    def _told(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        text = tensors["encoder_hidden_states"]
        added = {"text_embeds": tensors["text_embeds"], "time_ids": self._time_ids.expand(len(text), -1)}
        return {"encoder_hidden_states": text, "added_cond_kwargs": added}
