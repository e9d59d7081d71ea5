"""Stable Diffusion 3 and 3.5: a transformer on (C, h, w) latents that predicts velocity, with two-branch guidance."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dancegrpo.errors import ConfigError, ModelError
from dancegrpo.policies.base import Condition
from dancegrpo.policies.export import Usage
from dancegrpo.policies.flow import FlowPolicy, resolution_mu
from dancegrpo.policies.guidance import both_branches, combine
from dancegrpo.policies.matching import require_text_width
from dancegrpo.prompts import Prompt
from dancegrpo.settings import ModelConfig, RolloutConfig


class StableDiffusion3Policy(FlowPolicy):
    """`StableDiffusion3Pipeline`. Latents (C, h, w); `predict` gives the velocity.

    Two CLIP encoders are needed; a checkpoint without the third, T5, is told zeros in its place, as in the pipeline.
    The pipeline's own schedule ends with a step from almost no noise: the scheduler shifts its smallest sigma twice
    (4 steps at shift 3: 1, .858, .602, .009, 0). A run with `rollout.shift` has no such step.
    """

    denoisers: ClassVar[tuple[str, ...]] = ("transformer",)
    components: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder", "text_encoder_2")
    text_parts: ClassVar[tuple[str, ...]] = (
        *("text_encoder", "text_encoder_2", "text_encoder_3"),
        *("tokenizer", "tokenizer_2", "tokenizer_3"),
    )
    settings: ClassVar[tuple[str, ...]] = ("max_sequence_length",)

    @property
    def guided(self) -> bool:
        """The pipeline's rule: a scale of 1 or less turns guidance off."""
        return self.model.guidance_scale > 1

    @property
    def max_sequence_length(self) -> int:
        """T5 tokens per prompt, padding included; 256 is the pipeline's default, 512 its bound."""
        return self.model.max_sequence_length or 256

    def _check(self, model: ModelConfig, rollout: RolloutConfig) -> None:
        transformer: Any = self.module
        config, patch = transformer.config, transformer.config.patch_size
        rows, columns = self._grid(self.pipeline.vae_scale_factor * patch)
        if max(rows, columns) > config.pos_embed_max_size:
            bound = config.pos_embed_max_size * self.pipeline.vae_scale_factor * patch
            raise ConfigError(
                f"model size {model.width}x{model.height} is over this pipeline's bound: use at most {bound}."
            )
        if self.max_sequence_length > 512:
            raise ConfigError(
                f"model.max_sequence_length={self.max_sequence_length} is over this pipeline's bound: use at most 512."
            )
        if not config.in_channels == transformer.out_channels == self.pipeline.vae.config.latent_channels:
            raise ModelError(f"the transformer of {self.folder} takes more than latents: use a text-to-image base.")
        self.latent_shape = (config.in_channels, rows * patch, columns * patch)
        self._check_text(config)

    def _check_text(self, transformer: Any) -> None:
        pipeline, width = self.pipeline, transformer.joint_attention_dim
        first, second = pipeline.text_encoder.config, pipeline.text_encoder_2.config
        pooled = first.projection_dim + second.projection_dim
        require_text_width(
            self.folder, "pair of CLIP encoders", pooled, "transformer", transformer.pooled_projection_dim
        )
        # The pipeline fills CLIP's channels up to T5's; it would silently cut off what is over.
        both = first.hidden_size + second.hidden_size
        if both > width:
            require_text_width(self.folder, "pair of CLIP encoders", both, "transformer", width)
        if pipeline.text_encoder_3 is not None:
            t5 = pipeline.text_encoder_3.config.d_model
            require_text_width(self.folder, "third text encoder", t5, "transformer", width)

    def _schedule(self, num_steps: int, scheduler: Any) -> dict[str, Any]:
        patch, (_, height, width) = self.module.config.patch_size, self.latent_shape
        tokens = (height // patch) * (width // patch)
        dynamic = {"mu": resolution_mu(tokens, scheduler)} if scheduler.config.use_dynamic_shifting else {}
        return {"num_inference_steps": num_steps} | dynamic

    def _encode_settings(self) -> tuple[object, ...]:
        return self.model.dtype, self.guided, self.max_sequence_length

    def _encode(self, prompt: Prompt) -> Condition:
        text, negative, pooled, negative_pooled = self.pipeline.encode_prompt(
            *(prompt.text, None, None, self.device),
            do_classifier_free_guidance=self.guided,
            negative_prompt=prompt.negative,
            max_sequence_length=self.max_sequence_length,
        )
        tensors = {"encoder_hidden_states": text, "pooled_projections": pooled}
        if self.guided:
            tensors |= {"negative_encoder_hidden_states": negative, "negative_pooled_projections": negative_pooled}
        return Condition(tensors)

    def predict(self, x_t: Tensor, step: Tensor, condition: Condition) -> Tensor:
        """The velocity x1 - x0, with guidance from both branches in one batch: see `Policy.predict`."""
        tensors, timestep, x = condition.tensors, self._timesteps[step], x_t
        if self.guided:
            tensors, timestep, x = both_branches(tensors), torch.cat([timestep] * 2), torch.cat([x_t] * 2)
        with self.autocast():
            velocity = self.network()(hidden_states=x, timestep=timestep, return_dict=False, **tensors)[0].float()
        return combine(velocity, self.model.guidance_scale) if self.guided else velocity

    def decode(self, latents: Tensor, condition: Condition) -> Tensor:
        """Latents (B, C, h, w) -> (B, 1, 3, H, W): see `Policy.decode`."""
        config = self.pipeline.vae.config
        return self._decode(latents / config.scaling_factor + config.shift_factor)

    def latents(self, media: Tensor, condition: Condition) -> Tensor:
        """(B, 1, 3, H, W) -> latents (B, C, h, w): see `Policy.latents`."""
        config = self.pipeline.vae.config
        return (self._mode(media, pictures=True) - config.shift_factor) * config.scaling_factor

    def _arguments(self) -> dict[str, object]:
        model = self.model
        told: dict[str, object] = {"guidance_scale": model.guidance_scale}
        told |= {"max_sequence_length": self.max_sequence_length}
        # Without sigmas the pipeline takes its own, whose last lies elsewhere: see the class.
        return told if self._shift is None else told | {"sigmas": unshifted_sigmas(self.dynamics.num_steps)}

    def _usage(self) -> Usage:
        parts = ("text_encoder_3", "tokenizer_3")  # the only ones diffusers does not know to be optional
        return replace(super()._usage(), absent=tuple(p for p in parts if getattr(self.pipeline, p) is None))


def unshifted_sigmas(num_steps: int) -> list[float]:
    """1, (T-1)/T, ... 1/T: what a pipeline call takes as `sigmas`, in the fewest digits that give these float32."""
    import numpy as np

    exact = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)[:-1].float().numpy()
    return [float(np.format_float_positional(sigma, unique=True)) for sigma in exact]
