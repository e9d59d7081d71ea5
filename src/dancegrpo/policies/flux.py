"""FLUX.1: a transformer on packed latents that predicts a rectified flow's velocity, with embedded guidance."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dancegrpo.errors import ConfigError, ModelError
from dancegrpo.policies.base import Condition
from dancegrpo.policies.flow import FlowPolicy, resolution_mu
from dancegrpo.prompts import Prompt
from dancegrpo.settings import ModelConfig, RolloutConfig


class FluxPolicy(FlowPolicy):
    """`FluxPipeline`, guidance-distilled (dev) or not (schnell).

    Latents are the pipeline's packed ones, (h/2 * w/2, 4C): the space in which it takes `latents` and steps. (From a
    generator the pipeline draws them unpacked; packing only permutes, so the distribution is the same.) `predict`
    gives the velocity. Latents stay float32 between steps in every dtype; the pipeline rounds them to the model's.
    """

    denoisers: ClassVar[tuple[str, ...]] = ("transformer",)
    components: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder", "text_encoder_2")
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    settings: ClassVar[tuple[str, ...]] = ("max_sequence_length",)
    timestep_unit: ClassVar[float] = 1.0

    @property
    def max_sequence_length(self) -> int:
        """T5 tokens per prompt, padding included; 512 is the pipeline's default and its bound."""
        return self.model.max_sequence_length or 512

    def _check(self, model: ModelConfig, rollout: RolloutConfig) -> None:
        transformer: Any = self.module
        rows, columns = self._grid(2 * self.pipeline.vae_scale_factor)
        if self.max_sequence_length > 512:
            raise ConfigError(
                f"model.max_sequence_length={self.max_sequence_length} is over FLUX's bound: use at most 512."
            )
        channels = transformer.config.in_channels
        if not channels == transformer.out_channels == 4 * self.pipeline.vae.config.latent_channels:
            raise ModelError(f"the transformer of {self.folder} takes more than latents: use a text-to-image base.")
        self.latent_shape = (rows * columns, channels)
        # The first axis of an id is unused by text-to-image; text tokens sit at the origin, patches at (row, column).
        grid = torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns)))
        self._img_ids = grid.to(self.device)
        self._txt_ids = torch.zeros(self.max_sequence_length, 3, device=self.device)
        guidance = torch.tensor([model.guidance_scale], dtype=torch.float32, device=self.device)
        self._guidance = guidance if transformer.config.guidance_embeds else None

    @property
    def token_grid(self) -> tuple[int, ...]:
        """See `PipelinePolicy.token_grid`."""
        return self._grid(2 * self.pipeline.vae_scale_factor)

    def require_context(self, degree: int) -> None:
        """See `PipelinePolicy.require_context`; the text is split as well."""
        super().require_context(degree)
        if self.max_sequence_length % degree:
            near = max(1, round(self.max_sequence_length / degree)) * degree
            raise ConfigError(
                f"parallel.context={degree} does not divide model.max_sequence_length={self.max_sequence_length}: use "
                f"{near if near <= 512 else near - degree}"
            )

    def _schedule(self, num_steps: int, scheduler: Any) -> dict[str, Any]:
        sigmas = np.linspace(1.0, 1 / num_steps, num_steps)
        return {"sigmas": sigmas, "mu": resolution_mu(self.latent_shape[0], scheduler)}

    def _encode_settings(self) -> tuple[object, ...]:
        return self.model.dtype, self.max_sequence_length

    def _encode(self, prompt: Prompt) -> Condition:
        text, pooled, _ = self.pipeline.encode_prompt(
            prompt.text, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return Condition({"encoder_hidden_states": text, "pooled_projections": pooled})

    def predict(self, x_t: Tensor, step: Tensor, condition: Condition) -> Tensor:
        """The velocity x1 - x0, (B, seq, 4C): see `Policy.predict`. The guidance value goes in as it is."""
        with self.autocast():
            velocity = self.network()(
                hidden_states=x_t,
                timestep=self._timesteps[step],
                guidance=None if self._guidance is None else self._guidance.expand(len(x_t)),
                txt_ids=self._txt_ids,
                img_ids=self._img_ids,
                return_dict=False,
                **condition.tensors,
            )[0]
        return velocity.float()

    def decode(self, latents: Tensor, condition: Condition) -> Tensor:
        """Packed latents (B, seq, 4C) -> (B, 1, 3, H, W): see `Policy.decode`."""
        model, config = self.model, self.pipeline.vae.config
        unpacked = self.pipeline._unpack_latents(latents, model.height, model.width, self.pipeline.vae_scale_factor)
        return self._decode(unpacked / config.scaling_factor + config.shift_factor)

    def latents(self, media: Tensor, condition: Condition) -> Tensor:
        """(B, 1, 3, H, W) -> packed latents (B, seq, 4C): see `Policy.latents`."""
        config = self.pipeline.vae.config
        scaled = (self._mode(media, pictures=True) - config.shift_factor) * config.scaling_factor
        return self.pipeline._pack_latents(scaled, *scaled.shape)

    def _arguments(self) -> dict[str, object]:
        return {"guidance_scale": self.model.guidance_scale, "max_sequence_length": self.max_sequence_length}
