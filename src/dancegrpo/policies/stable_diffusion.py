"""Stable Diffusion 1.x and 2.x: a UNet on (C, h, w) latents that predicts noise or v, with two-branch guidance."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from dancegrpo.config import ModelConfig, RolloutConfig
from dancegrpo.errors import ConfigError, ModelError
from dancegrpo.policies.base import Condition
from dancegrpo.policies.export import Usage
from dancegrpo.policies.pipeline import PipelinePolicy
from dancegrpo.prompts import Prompt
from dancegrpo.sde import DiffusionDynamics, diffusion_alpha_bar


class StableDiffusionPolicy(PipelinePolicy):
    """`StableDiffusionPipeline`. Latents (C, h, w); `predict` gives the noise epsilon, whatever the UNet predicts.

    Whichever scheduler the checkpoint ships, sampling follows DDIM on its noise schedule and timestep spacing: the
    sampler with a known density per step. At noise level 0 that is the pipeline with a `DDIMScheduler`, bit for bit
    for epsilon prediction; with "trailing" or "linspace" spacing only where num_steps divides the training steps.
    """

    denoiser: ClassVar[str] = "unet"
    components: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder")
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    dynamics: DiffusionDynamics

    @property
    def guided(self) -> bool:
        """The pipeline's rule: a scale of 1 or less turns guidance off."""
        return self.model.guidance_scale > 1

    def _check(self, model: ModelConfig, rollout: RolloutConfig) -> None:
        factor, config = self.pipeline.vae_scale_factor, self.module.config
        if model.height % factor or model.width % factor:
            raise ConfigError(
                f"model size {model.width}x{model.height} must be multiples of {factor} for this pipeline."
            )
        if model.max_sequence_length is not None:
            raise ConfigError("model.max_sequence_length is for T5 encoders, Stable Diffusion has none: remove it.")
        if rollout.shift is not None:
            raise ConfigError(f"rollout.shift={rollout.shift} is for rectified flow, not Stable Diffusion: remove it.")
        if config.in_channels != self.pipeline.vae.config.latent_channels or config.time_cond_proj_dim is not None:
            raise ModelError(f"the UNet of {self.folder} is an inpainting or distilled one: use a text-to-image base.")
        self.latent_shape = (config.in_channels, model.height // factor, model.width // factor)

    def _dynamics(self, rollout: RolloutConfig) -> DiffusionDynamics:
        from diffusers import DDIMScheduler

        sde = "ddim" if rollout.sde == "auto" else rollout.sde
        if sde not in ("ddim", "paper"):
            raise ConfigError(f"rollout.sde={sde} is for rectified flow; for Stable Diffusion use auto, ddim or paper.")
        # Latents have no bounds to be clipped to; DDIM's default would clip them where the shipped config is silent.
        scheduler = DDIMScheduler.from_config(self.pipeline.scheduler.config, clip_sample=False, thresholding=False)
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

    def _encode_settings(self) -> tuple[object, ...]:
        return self.model.dtype, self.guided

    def _encode(self, prompt: Prompt) -> Condition:
        text, negative = self.pipeline.encode_prompt(prompt.text, self.device, 1, self.guided, prompt.negative)
        tensors = {"encoder_hidden_states": text}
        return Condition(tensors | {"negative_encoder_hidden_states": negative} if self.guided else tensors)

    def predict(self, x_t: Tensor, step: Tensor, condition: Condition) -> Tensor:
        """epsilon, guided: negative + scale (positive - negative), both in one batch. See `Policy.predict`."""
        text, timestep, x = condition.tensors["encoder_hidden_states"], self.dynamics.timesteps[step], x_t
        if self.guided:
            text = torch.cat([condition.tensors["negative_encoder_hidden_states"], text])
            timestep, x = torch.cat([timestep] * 2), torch.cat([x_t] * 2)
        with self.autocast():
            out = self._active(x, timestep, encoder_hidden_states=text, return_dict=False)[0].float()
        if self.guided:
            negative, positive = out.chunk(2)
            out = negative + self.model.guidance_scale * (positive - negative)
        return out if self.prediction_type == "epsilon" else self._epsilon(x_t, out, step)

    def _epsilon(self, x_t: Tensor, v: Tensor, step: Tensor) -> Tensor:
        """v = sqrt(alpha_bar) epsilon - sqrt(1 - alpha_bar) x0, solved for epsilon at x_t (arXiv:2202.00512)."""
        alpha_bar = self.dynamics.alpha_bar[step].reshape(-1, 1, 1, 1)
        return alpha_bar.sqrt() * v + (1 - alpha_bar).sqrt() * x_t

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> (B, 1, 3, H, W): see `Policy.decode`."""
        return self._decode(latents / self.pipeline.vae.config.scaling_factor)

    def _usage(self) -> Usage:
        model, steps = self.model, self.dynamics.num_steps
        arguments: dict[str, float] = {"height": model.height, "width": model.width, "num_inference_steps": steps}
        arguments |= {"guidance_scale": model.guidance_scale}
        return Usage("DDIMScheduler", ".from_config(pipe.scheduler.config, clip_sample=False)", arguments)
