"""HunyuanVideo: a transformer on latents (C, T, h, w) that predicts a rectified flow's velocity; clips or pictures.

Guidance is embedded by the network, times 1000, and may come with classifier-free guidance in two passes. A negative
prompt that a prompt does not bring is the empty one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from dancegrpo.distributed import World
from dancegrpo.errors import ConfigError, ModelError
from dancegrpo.media import reference_image
from dancegrpo.policies.base import Condition
from dancegrpo.policies.context import filled, hunyuan_plan, split_text_masks
from dancegrpo.policies.export import Task
from dancegrpo.policies.flow import FlowPolicy
from dancegrpo.policies.guidance import guide
from dancegrpo.prompts import Prompt
from dancegrpo.settings import ModelConfig, RolloutConfig

TEXT = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections")
"""What the network reads of a prompt: the language model's states, their mask, and CLIP's pooled state."""


class HunyuanVideoPolicy(FlowPolicy):
    """`HunyuanVideoPipeline`: text to video, and text to image with one frame.

    Latents (C, T, h, w), T = 1 + (num_frames - 1) / 4. They stay float32 between steps in every dtype; the pipeline
    rounds them to the model's.
    """

    denoisers: ClassVar[tuple[str, ...]] = ("transformer",)
    components: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder", "text_encoder_2")
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    settings: ClassVar[tuple[str, ...]] = ("num_frames", "max_sequence_length", "true_cfg_scale", "prompt_template")
    task: ClassVar[Task] = "text-to-video"
    input_channels: ClassVar[dict[str | None, tuple[int, int]]] = {None: (1, 0)}
    """By the transformer's `image_condition_type`: (a, b) where it takes a C + b channels for latents of C."""

    @property
    def guided(self) -> bool:
        """The pipeline's rule: a scale of 1 or less turns classifier-free guidance off."""
        return self.model.true_cfg_scale > 1

    @property
    def max_sequence_length(self) -> int:
        """Tokens of a prompt, padding included; the template's come on top."""
        return self.model.max_sequence_length or 256

    @property
    def _least_frames(self) -> int:
        """The shortest clip, in frames."""
        return 1

    def _check(self, model: ModelConfig, rollout: RolloutConfig) -> None:
        self._check_transformer()
        self._check_text_encoders()
        self._check_template(model)
        transformer: Any = self.module
        ratio = self.pipeline.vae_scale_factor_spatial
        cell = math.lcm(16, ratio * transformer.config.patch_size)  # 16: the pipeline's own rule
        frames = self._latent_frames(self.pipeline.vae_scale_factor_temporal, self._least_frames)
        rows, columns = (cells * (cell // ratio) for cells in self._grid(cell))
        self.latent_shape = (self.pipeline.vae.config.latent_channels, frames, rows, columns)
        # Rounded as the pipeline rounds it: the network embeds the value by sines that know 6000 from bfloat16's 6016.
        guidance = (torch.tensor([model.guidance_scale], dtype=self.dtype) * 1000.0).float().to(self.device)
        self._guidance = guidance if transformer.config.guidance_embeds else None

    def _check_transformer(self) -> None:
        """Raises ModelError for a transformer that another pipeline of the family hands its inputs."""
        transformer: Any = self.module
        config, channels = transformer.config, self.pipeline.vae.config.latent_channels
        kind, taken, given = config.image_condition_type, config.in_channels, config.out_channels or config.in_channels
        times, more = self.input_channels.get(kind, (0, 0))
        if (taken, given) != (times * channels + more, channels):
            family = type(self.pipeline).__name__
            raise ModelError(
                f"the transformer of {self.folder} (image_condition_type={kind}, {taken} channels in, {given} out) is "
                f"none of a {family} on {channels} latent channels: load the checkpoint by the pipeline it was made for"
            )

    def _check_text_encoders(self) -> None:
        """Raises ModelError for text encoders and a tokenizer that the transformer was not made for."""
        transformer: Any = self.module
        for name, reads in (("text_encoder", "text_embed_dim"), ("text_encoder_2", "pooled_projection_dim")):
            width = getattr(self.pipeline, name).config.get_text_config().hidden_size
            if width != transformer.config[reads]:
                raise ModelError(
                    f"{self.folder / name} gives text of width {width}, but the transformer reads {reads}="
                    f"{transformer.config[reads]}: put the text encoder there that it was trained with"
                )
        if self.pipeline.tokenizer.padding_side != "right":
            raise ModelError(
                f"{self.folder / 'tokenizer'} pads on the left, the transformer masks the right: set padding_side to "
                "right in its tokenizer_config.json"
            )

    def _check_template(self, model: ModelConfig) -> None:
        template = model.prompt_template
        if template and not self.takes_image:
            for name in ("image_emb_start", "image_emb_end", "image_emb_len"):
                if (value := getattr(template, name)) is not None:
                    family = type(self.pipeline).__name__
                    raise ConfigError(f"model.prompt_template.{name}={value} is not known to {family}: remove it")

    @property
    def token_grid(self) -> tuple[int, ...]:
        """See `PipelinePolicy.token_grid`; a frame that is given is one of them."""
        config, (_, _, rows, columns) = self.module.config, self.latent_shape
        frames = self._latent_frames(self.pipeline.vae_scale_factor_temporal)
        return frames // config["patch_size_t"], rows // config["patch_size"], columns // config["patch_size"]

    def context_plan(self) -> Mapping[str, Any]:
        """See `PipelinePolicy.context_plan`: diffusers has none. Padded prompts need `split_text_masks` beside it."""
        return hunyuan_plan()

    def _split(self, network: Any, world: World) -> None:
        split_text_masks(network, world)
        super()._split(network, world)

    def _schedule(self, num_steps: int, scheduler: Any) -> dict[str, Any]:
        return {"sigmas": np.linspace(1.0, 0.0, num_steps + 1)[:-1]}

    def _encode_settings(self) -> tuple[object, ...]:
        return self.model.dtype, self.max_sequence_length, self.guided, self.model.prompt_template

    def _encode(self, prompt: Prompt) -> Condition:
        tensors = self._text(prompt.text)
        return Condition(tensors | _negative(self._text(prompt.negative)) if self.guided else tensors)

    def _text(self, text: str, **options: Any) -> dict[str, Tensor]:
        """One text -> TEXT's tensors: states (1, L, D), mask (1, L), pooled (1, P); options: of `encode_prompt`."""
        template = self.model.prompt_template
        if template is not None:
            options["prompt_template"] = template.model_dump(exclude_none=True)
        states, pooled, mask = self.pipeline.encode_prompt(
            prompt=text, device=self.device, max_sequence_length=self.max_sequence_length, **options
        )
        if not mask.any():
            # The network averages over the tokens that the mask leaves: over none of them that is NaN.
            raise ConfigError(
                f"the template leaves no token of the prompt {text!r}: lower model.prompt_template.crop_start, or end "
                "the template with one"
            )
        return dict(zip(TEXT, (states, mask, pooled), strict=True))

    def predict(self, x_t: Tensor, step: Tensor, condition: Condition) -> Tensor:
        """The velocity x1 - x0, (B, C, T, h, w): see `Policy.predict`.

        With classifier-free guidance, negative + scale (positive - negative) from two passes, as in the pipeline.
        """
        shown = self._input(x_t, condition)
        velocity = self._velocity(shown, step, [condition.tensors[name] for name in TEXT])
        if self.guided:
            negative = self._velocity(shown, step, [condition.tensors[f"negative_{name}"] for name in TEXT])
            velocity = guide(negative, velocity, self.model.true_cfg_scale)
        return velocity

    def _velocity(self, shown: Tensor, step: Tensor, text: list[Tensor]) -> Tensor:
        states, mask, pooled = text
        text = [*filled(states, mask, self.context), pooled]
        with self.autocast():
            velocity = self.network()(
                hidden_states=shown,
                timestep=self._timesteps[step],
                guidance=None if self._guidance is None else self._guidance.expand(len(shown)),
                return_dict=False,
                **dict(zip(TEXT, text, strict=True)),
            )[0]
        return velocity.float()

    def _input(self, x_t: Tensor, condition: Condition) -> Tensor:
        """What the network is shown of the latents (B, *S) and, in image-to-video, of the image."""
        return x_t

    def decode(self, latents: Tensor, condition: Condition) -> Tensor:
        """Latents (B, C, T, h, w) -> (B, F, 3, H, W): see `Policy.decode`."""
        return self._decode(latents / self.pipeline.vae.config.scaling_factor)

    def latents(self, media: Tensor, condition: Condition) -> Tensor:
        """(B, num_frames, 3, H, W) -> latents (B, C, T, h, w): see `Policy.latents`."""
        return self._mode(media) * self.pipeline.vae.config.scaling_factor

    def _arguments(self) -> dict[str, object]:
        model = self.model
        arguments: dict[str, object] = {"num_frames": model.num_frames, "guidance_scale": model.guidance_scale}
        arguments |= {"true_cfg_scale": model.true_cfg_scale, "max_sequence_length": self.max_sequence_length}
        if self.guided:
            arguments["negative_prompt"] = ""  # the pipeline guides only where it is given one
        if model.prompt_template is not None:
            arguments["prompt_template"] = model.prompt_template.model_dump(exclude_none=True)
        return arguments


class HunyuanVideoImagePolicy(HunyuanVideoPolicy):
    """What the image-to-video pipelines share: the image is encoded once per prompt, and the condition carries it."""

    task: ClassVar[Task] = "image-to-video"
    text_parts: ClassVar[tuple[str, ...]] = (*HunyuanVideoPolicy.text_parts, "vae")

    @property
    def takes_image(self) -> bool:
        """See `Policy.takes_image`."""
        return True

    def _encode_settings(self) -> tuple[object, ...]:
        model = self.model
        return *super()._encode_settings(), model.height, model.width, model.vae_tiling

    def _image_distribution(self, prompt: Prompt) -> Any:
        """The autoencoder's posterior of the prompt's image, one frame of the run's size: latents (1, C, 1, h, w)."""
        vae = self.pipeline.vae
        image = self.pipeline.video_processor.preprocess(reference_image(prompt), self.model.height, self.model.width)
        return vae.encode(image.to(self.device, vae.dtype).unsqueeze(2)).latent_dist

    def _scaled(self, latents: Tensor) -> dict[str, Tensor]:
        return {"image_latents": latents.float() * self.pipeline.vae.config.scaling_factor}


class HunyuanVideoImageToVideoPolicy(HunyuanVideoImagePolicy):
    """`HunyuanVideoImageToVideoPipeline`, with either of the ways in which the transformer sees the image.

    `token_replace`: the image is the first latent frame, so only the others are sampled: latents are (C, T-1, h, w),
    and decoding puts the image's back. `latent_concat`: the image stands in further channels, latents are (C, T, h, w),
    and the pipeline drops the first four frames of what it decodes: a clip has num_frames - 4.
    """

    text_parts: ClassVar[tuple[str, ...]] = (*HunyuanVideoImagePolicy.text_parts, "image_processor")
    input_channels: ClassVar[dict[str | None, tuple[int, int]]] = {"latent_concat": (2, 1), "token_replace": (1, 0)}
    dropped_frames: ClassVar[int] = 4
    """Decoded frames that the pipeline does not show under `latent_concat`."""

    def _check(self, model: ModelConfig, rollout: RolloutConfig) -> None:
        transformer: Any = self.module
        self._replaces = transformer.config.image_condition_type == "token_replace"
        if model.num_frames <= self._given_frames:
            reason = "the first frame is the image's" if self._replaces else "the first 4 are dropped"
            raise ConfigError(
                f"model.num_frames={model.num_frames} leaves no frame, as {reason}: use at least {self._least_frames}"
            )
        super()._check(model, rollout)
        if self._replaces:
            channels, frames, *grid = self.latent_shape
            self.latent_shape = (channels, frames - 1, *grid)

    @property
    def _given_frames(self) -> int:
        """Frames of a clip that no latent is sampled for, or that are not shown."""
        return 1 if self._replaces else self.dropped_frames

    @property
    def _least_frames(self) -> int:
        step = self.pipeline.vae_scale_factor_temporal
        return 1 + math.ceil(self._given_frames / step) * step

    def _encode_settings(self) -> tuple[object, ...]:
        return *super()._encode_settings(), self._replaces

    def _encode(self, prompt: Prompt) -> Condition:
        from PIL import Image

        # The pipeline shows the language model every 4th (replace) or 2nd token of the image, and of the black one
        # that stands for no image always every 2nd.
        tensors = self._text(
            prompt.text, image=reference_image(prompt), image_embed_interleave=4 if self._replaces else 2
        )
        if self.guided:
            black = Image.new("RGB", (self.model.width, self.model.height), 0)
            tensors |= _negative(self._text(prompt.negative, image=black))
        return Condition(tensors | self._scaled(self._image_distribution(prompt).mode()))

    def _text(self, text: str, **options: Any) -> dict[str, Tensor]:
        try:
            return super()._text(text, **options)
        except (ValueError, IndexError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"model.prompt_template does not fit the text encoder of {self.folder} ({reason}): set its "
                "image_emb_len to the tokens of an image, image_emb_start and image_emb_end to where they lie"
            ) from error

    def start(self, noise: Tensor, condition: Condition) -> Tensor:
        """noise (B, *S) -> .999 noise + .001 image, whose latents stand still: the pipeline's start."""
        share = torch.tensor(0.999, device=noise.device)
        return noise * share + condition.tensors["image_latents"] * (1 - share)

    def _input(self, x_t: Tensor, condition: Condition) -> Tensor:
        image = condition.tensors["image_latents"]
        if self._replaces:
            return torch.cat([image, x_t], dim=2)
        frames = x_t.shape[2]
        return torch.cat([x_t, first_frame(image, frames), first_frame(torch.ones_like(image[:, :1]), frames)], dim=1)

    def _velocity(self, shown: Tensor, step: Tensor, text: list[Tensor]) -> Tensor:
        velocity = super()._velocity(shown, step, text)
        return velocity[:, :, 1:] if self._replaces else velocity

    def decode(self, latents: Tensor, condition: Condition) -> Tensor:
        """Latents (B, *S) -> (B, F, 3, H, W), F = num_frames, or num_frames - 4 with `latent_concat`."""
        if self._replaces:
            return super().decode(torch.cat([condition.tensors["image_latents"], latents], dim=2), condition)
        return super().decode(latents, condition)[:, self.dropped_frames :]

    def latents(self, media: Tensor, condition: Condition) -> Tensor:
        """(B, num_frames, 3, H, W) -> latents (B, *S): see `Policy.latents`.

        Under `token_replace` the frame that the image stands for is left out; under `latent_concat` a clip needs all of
        num_frames, 4 more than `decode` shows.
        """
        latents = super().latents(media, condition)
        return latents[:, :, 1:] if self._replaces else latents


def first_frame(image: Tensor, frames: int) -> Tensor:
    """(B, C, 1, h, w) -> (B, C, frames, h, w): the image, then zeros."""
    return pad(image, (0, 0, 0, 0, 0, frames - 1))


def _negative(text: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"negative_{name}": tensor for name, tensor in text.items()}
