"""Qwen-Image: a transformer on packed latents that predicts a rectified flow's velocity, with norm-keeping guidance."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dancegrpo.errors import ConfigError, ModelError
from dancegrpo.policies.base import Condition
from dancegrpo.policies.context import filled
from dancegrpo.policies.flow import FlowPolicy, resolution_mu
from dancegrpo.policies.guidance import NEGATIVE, guide
from dancegrpo.policies.matching import require_text_width
from dancegrpo.prompts import Prompt
from dancegrpo.settings import ModelConfig, RolloutConfig

TEXT, MASK = "encoder_hidden_states", "encoder_hidden_states_mask"


class QwenImagePolicy(FlowPolicy):
    """`QwenImagePipeline`. Latents are the pipeline's packed ones, (h/2 * w/2, 4C); `predict` gives the velocity.

    A condition carries as many text tokens as its prompt has, and a mask; padding is never seen by the network, so that
    a prompt is told the same in any company. `true_cfg_scale` over 1 turns guidance on, also for an empty negative
    prompt; the guided velocity of each patch keeps the conditional one's norm.
    """

    denoisers: ClassVar[tuple[str, ...]] = ("transformer",)
    components: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder")
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    settings: ClassVar[tuple[str, ...]] = ("max_sequence_length", "true_cfg_scale")
    timestep_unit: ClassVar[float] = 1.0

    @property
    def guided(self) -> bool:
        """The pipeline's rule: a scale of 1 or less turns guidance off."""
        return self.model.true_cfg_scale > 1

    @property
    def max_sequence_length(self) -> int:
        """Text tokens per prompt; 512 is the pipeline's default, 1024 its bound."""
        return self.model.max_sequence_length or 512

    def _check(self, model: ModelConfig, rollout: RolloutConfig) -> None:
        transformer, vae = self.module, self.pipeline.vae.config
        config = transformer.config
        rows, columns = self._grid(2 * self.pipeline.vae_scale_factor)
        if self.max_sequence_length > 1024:
            raise ConfigError(
                f"model.max_sequence_length={self.max_sequence_length} is over Qwen-Image's bound: use at most 1024."
            )
        if not config.in_channels == config.patch_size**2 * transformer.out_channels == 4 * vae.z_dim:
            raise ModelError(f"the transformer of {self.folder} takes more than latents: use a text-to-image base.")
        if config.guidance_embeds or config.use_additional_t_cond or config.use_layer3d_rope:
            raise ModelError(f"the transformer of {self.folder} is a distilled or layered one: use Qwen-Image's base.")
        width = self.pipeline.text_encoder.config.get_text_config().hidden_size
        require_text_width(self.folder, "text encoder", width, "transformer", config.joint_attention_dim)
        self.latent_shape = (rows * columns, config.in_channels)
        self._img_shape = (1, rows, columns)

    @property
    def token_grid(self) -> tuple[int, ...]:
        """See `PipelinePolicy.token_grid`."""
        return self._img_shape[1:]

    def _schedule(self, num_steps: int, scheduler: Any) -> dict[str, Any]:
        sigmas = np.linspace(1.0, 1 / num_steps, num_steps)
        return {"sigmas": sigmas, "mu": resolution_mu(self.latent_shape[0], scheduler)}

    def _encode_settings(self) -> tuple[object, ...]:
        return self.model.dtype, self.guided, self.max_sequence_length

    def _encode(self, prompt: Prompt) -> Condition:
        tensors = self._encode_text(prompt.text)
        if self.guided:
            tensors |= {NEGATIVE + name: tensor for name, tensor in self._encode_text(prompt.negative).items()}
        return Condition(tensors)

    def _encode_text(self, text: str) -> dict[str, Tensor]:
        states, mask = self.pipeline.encode_prompt(
            text, device=self.device, max_sequence_length=self.max_sequence_length
        )
        # The pipeline leaves out a mask of ones; in a batch with longer prompts it will be needed.
        whole = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        return {TEXT: states, MASK: whole if mask is None else mask.bool()}

    def predict(self, x_t: Tensor, step: Tensor, condition: Condition) -> Tensor:
        """The velocity x1 - x0, (B, seq, 4C), in two passes where it is guided: see `Policy.predict`.

        guided: v = negative + scale (positive - negative), times |positive| / |v| for each patch.
        """
        positive = self._velocity(x_t, step, condition)
        if not self.guided:
            return positive
        negative = self._velocity(x_t, step, condition, NEGATIVE)
        guided = guide(negative, positive, self.model.true_cfg_scale)
        return guided * (torch.norm(positive, dim=-1, keepdim=True) / torch.norm(guided, dim=-1, keepdim=True))

    def _velocity(self, x_t: Tensor, step: Tensor, condition: Condition, prefix: str = "") -> Tensor:
        text, mask = _trimmed(condition.tensors[prefix + TEXT], condition.tensors[prefix + MASK], self.context)
        with self.autocast():
            velocity = self.network()(
                hidden_states=x_t,
                timestep=self._timesteps[step],
                encoder_hidden_states=text,
                encoder_hidden_states_mask=mask,
                img_shapes=[[self._img_shape]] * len(x_t),
                return_dict=False,
            )[0]
        return velocity.float()

    def decode(self, latents: Tensor, condition: Condition) -> Tensor:
        """Packed latents (B, seq, 4C) -> (B, 1, 3, H, W): see `Policy.decode`."""
        model, pipeline = self.model, self.pipeline
        unpacked = pipeline._unpack_latents(latents, model.height, model.width, pipeline.vae_scale_factor)
        mean, std = self._moments(latents.device)
        # Divided by 1 / std, not multiplied by std: the pipeline's arithmetic, to the last bit.
        scaled = (unpacked / (1 / std) + mean).to(pipeline.vae.dtype)
        with self._awake("vae"):
            picture = pipeline.vae.decode(scaled, return_dict=False)[0][:, :, 0].float()
        return pipeline.image_processor.postprocess(picture, output_type="pt").unsqueeze(1)

    def latents(self, media: Tensor, condition: Condition) -> Tensor:
        """(B, 1, 3, H, W) -> packed latents (B, seq, 4C): see `Policy.latents`."""
        mean, std = self._moments(self.device)
        scaled = ((self._mode(media) - mean) * (1 / std))[:, :, 0]
        return self.pipeline._pack_latents(scaled, *scaled.shape)

    def _moments(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the autoencoder's latents, (1, C, 1, 1, 1) each."""
        config = self.pipeline.vae.config
        mean, std = (
            torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, std

    def _arguments(self) -> dict[str, object]:
        # In the pipeline, guidance takes a negative prompt, be it an empty one.
        guided = {"true_cfg_scale": self.model.true_cfg_scale, "negative_prompt": ""} if self.guided else {}
        return guided | {"max_sequence_length": self.max_sequence_length}


def _trimmed(text: Tensor, mask: Tensor, degree: int) -> tuple[Tensor, Tensor | None]:
    """text (B, L, D), mask (B, L), True first -> both without the tokens that no row has; None for a mask of ones.

    degree: the ranks over which they will be split: their length becomes a multiple of it.

    Rows of equal length are then told to the network as the pipeline does, bit for bit, whatever longer prompts the
    condition was put together with.
    """
    shortest, longest = torch.stack(mask.sum(1).aminmax()).tolist()  # one wait for the device, not two
    whole = shortest == longest and longest % degree == 0
    text, mask = filled(text[:, :longest], mask[:, :longest], degree)
    return text, None if whole else mask
