"""Wan 2.1 and 2.2: video transformers that predict a rectified flow's velocity, from text or a picture and text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from dancegrpo.errors import ConfigError, ModelError
from dancegrpo.policies.base import Condition
from dancegrpo.policies.export import Task, Usage
from dancegrpo.policies.flow import FlowPolicy
from dancegrpo.policies.matching import require_text_width
from dancegrpo.prompts import Prompt
from dancegrpo.sde import FlowDynamics
from dancegrpo.settings import ModelConfig, RolloutConfig


class WanPolicy(FlowPolicy):
    """`WanPipeline`. Latents (C, T, h, w), T = 1 + (F - 1) / 4 for F frames; one frame makes a picture.

    Wan 2.2's larger checkpoints hold two networks: `transformer` for timesteps from boundary_ratio x 1000 up,
    `transformer_2` below. Both are trained, and a batch asks one of them alone (`bucket`).

    Checkpoints ship UniPC. Sampling takes Euler steps instead; without `rollout.shift` at noise level 0 that is the
    pipeline with `FlowMatchEulerDiscreteScheduler(shift=flow_shift)`, bit for bit. That schedule shifts its end twice:
    at shift 3 the last step starts from sigma 0.009, too low to remove the noise of the step before. With
    `rollout.shift` it is linspace(1, 0, T + 1), shifted once, as in the published run: prefer it for training.
    """

    denoisers: ClassVar[tuple[str, ...]] = ("transformer", "transformer_2")
    components: ClassVar[tuple[str, ...]] = ("transformer", "transformer_2", "vae", "text_encoder")
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    vae_dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    settings: ClassVar[tuple[str, ...]] = ("num_frames", "max_sequence_length", "guidance_scale_2")
    task: ClassVar[Task] = "text-to-video"

    @property
    def guided(self) -> bool:
        """The pipeline's rule: the first network's scale decides for both, 1 or less turns guidance off."""
        return self.model.guidance_scale > 1

    @property
    def max_sequence_length(self) -> int:
        """Text tokens per prompt, padding included; 512 is the pipeline's default. The padding is attended to."""
        return self.model.max_sequence_length or 512

    @property
    def exact(self) -> bool:
        """A schedule with a shift of the run's own is rounded in float32, the scheduler's in float64."""
        return super().exact and self._shift is None

    # --- Checks and schedule ------------------------------------------------------------------------------------------

    def _check(self, model: ModelConfig, rollout: RolloutConfig) -> None:
        vae = self.pipeline.vae.config
        if "transformer" not in self.modules:
            raise ModelError(f"{self.folder} has no transformer, which the first step needs: use a complete checkpoint")
        for name, module in self.modules.items():
            self._check_network(name, module)
        self._check_guidance(model)
        first: Any = self.module
        patch, spatial = first.config.patch_size, vae.scale_factor_spatial
        factor = math.lcm(16, spatial * patch[1], spatial * patch[2])
        rows, columns = (cells * (factor // spatial) for cells in self._grid(factor))
        frames = self._latent_frames(vae.scale_factor_temporal, self._least_frames)
        self.latent_shape = (vae.z_dim, frames, rows, columns)
        self._mean, inverse = (
            torch.tensor(values, device=self.device).reshape(1, -1, 1, 1, 1)
            for values in (vae.latents_mean, vae.latents_std)
        )
        self._inverse_std = 1.0 / inverse  # the pipeline divides by the inverse: the last bit depends on it
        # Wan 2.2 5B is told the time of each token; only frames that are given (image-to-video) have one of their own.
        tokens = self.latent_shape[1], -(-rows // 2) * -(-columns // 2)
        self._token_times = torch.ones(tokens, device=self.device) if self._expand else None

    @property
    def token_grid(self) -> tuple[int, ...]:
        """See `PipelinePolicy.token_grid`; a frame that is given is one of them."""
        network, factor = self.module, self.pipeline.vae.config.scale_factor_temporal
        _, _, *grid = self.latent_shape
        patches = network.config["patch_size"]
        return tuple(n // p for n, p in zip((self._latent_frames(factor), *grid), patches, strict=True))

    def context_plan(self) -> Mapping[str, Any]:
        """See `PipelinePolicy.context_plan`: diffusers', whose first part is of times that tokens have of their own."""
        plan = super().context_plan() or {}
        return {name: part for name, part in plan.items() if name or self._expand}

    @property
    def _expand(self) -> bool:
        return bool(self.pipeline.config.expand_timesteps)

    @property
    def _least_frames(self) -> int:
        """The shortest clip, in frames."""
        return 1

    def _image_channels(self) -> int:
        """Channels of the network's input beside the noisy latent."""
        return 0

    def _check_network(self, name: str, module: Any) -> None:
        channels, text = self.pipeline.vae.config.z_dim, self.pipeline.text_encoder.config.d_model
        config, needed = module.config, channels + self._image_channels()
        if (config.in_channels, config.out_channels) != (needed, channels):
            raise ModelError(
                f"the {name} of {self.folder} maps {config.in_channels} channels to {config.out_channels}, "
                f"{self.task} needs {needed} to {channels}: use a base for {type(self.pipeline).__name__}"
            )
        require_text_width(self.folder, "text_encoder", text, name, config.text_dim)

    def _check_guidance(self, model: ModelConfig) -> None:
        second = model.guidance_scale_2
        if second is None:
            return
        if "transformer_2" not in self.modules:
            raise ConfigError(
                f"model.guidance_scale_2={second} is for a second network, which {self.folder} lacks: remove it"
            )
        if not self.guided:
            raise ConfigError(
                f"model.guidance_scale_2={second} does nothing while guidance is off "
                f"(model.guidance_scale={model.guidance_scale}): remove it, or set both above 1"
            )

    def _dynamics(self, rollout: RolloutConfig) -> FlowDynamics:
        dynamics = super()._dynamics(rollout)
        self._stage = self._stages()
        self._company: int | None = None
        return dynamics

    def _stages(self) -> Tensor:
        """Which of `denoisers` each step asks: (T,) int64 on the CPU. Raises ModelError without the second's."""
        ratio = self.pipeline.config.boundary_ratio
        if ratio is None and "transformer_2" in self.modules:
            raise ModelError(
                f"{self.folder} has a transformer_2, but no boundary_ratio in its model_index.json: set it (0.875, say)"
            )
        times = self._timesteps.cpu()
        boundary = (ratio or 0) * self.pipeline.scheduler.config.get("num_train_timesteps", 1000)
        stage = (~(times >= boundary)).long()
        later = stage.nonzero().flatten().tolist()
        if later and "transformer_2" not in self.modules:
            raise ModelError(
                f"{self.folder} has no transformer_2, which steps {later[0]} to {later[-1]} need "
                f"(boundary_ratio={ratio}): use a complete checkpoint"
            )
        return stage

    def bucket(self, step: Tensor) -> Tensor:
        """0 where `transformer` is asked, 1 where `transformer_2` is: see `Policy.bucket`."""
        return self._stage.to(step.device)[step]

    def _schedule(self, num_steps: int, scheduler: Any) -> dict[str, Any]:
        return {"num_inference_steps": num_steps}

    def _euler(self) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        config = self.pipeline.scheduler.config
        if "flow_shift" not in config:  # it ships Flow-Euler itself
            return super()._euler()
        return FlowMatchEulerDiscreteScheduler(config.num_train_timesteps, shift=config.flow_shift)

    def pipeline_scheduler(self) -> Any:
        """Flow-Euler on the shipped shift or the run's: see `PipelinePolicy.pipeline_scheduler`."""
        scheduler = super().pipeline_scheduler()
        if self._shift is not None:
            scheduler.sigma_min = 1 / self.dynamics.num_steps
        return scheduler

    # --- Encode, predict, decode --------------------------------------------------------------------------------------

    def _encode_settings(self) -> tuple[object, ...]:
        return self.model.dtype, self.max_sequence_length, self.guided

    def _encode(self, prompt: Prompt) -> Condition:
        text, negative = self.pipeline.encode_prompt(
            prompt.text,
            prompt.negative,
            self.guided,
            max_sequence_length=self.max_sequence_length,
            device=self.device,
        )
        tensors = {"encoder_hidden_states": text}
        return Condition(tensors | {"negative_encoder_hidden_states": negative} if self.guided else tensors)

    def predict(self, x_t: Tensor, step: Tensor, condition: Condition) -> Tensor:
        """The velocity (B, C, T, h, w): see `Policy.predict`. Guided: negative + scale (positive - negative).

        Raises ValueError for steps of both networks in one batch.
        """
        stage, told = self._one_stage(step), condition.tensors
        network = self.network(self.denoisers[stage])
        call = self._inputs(x_t, self._timesteps[step], told) | {"return_dict": False}
        with self.autocast():
            out = network(encoder_hidden_states=told["encoder_hidden_states"], **call)[0].float()
            if self.guided:
                negative = network(encoder_hidden_states=told["negative_encoder_hidden_states"], **call)[0].float()
                second, scale = self.model.guidance_scale_2, self.model.guidance_scale
                out = negative + (second if stage == 1 and second is not None else scale) * (out - negative)
        return out[:, :, out.shape[2] - x_t.shape[2] :]  # without frames that are given

    @contextmanager
    def company(self, bucket: int | None) -> Iterator[None]:
        """See `Policy.company`."""
        self._company = bucket
        try:
            yield
        finally:
            self._company = None

    def _one_stage(self, step: Tensor) -> int:
        if self._company is not None:
            return self._company
        stages = self.bucket(step).unique().tolist()
        if len(stages) > 1:
            raise ValueError(f"steps {step.tolist()} are of both networks: split the batch by `bucket`.")
        return int(stages[0])

    def _inputs(self, x_t: Tensor, times: Tensor, told: Any) -> dict[str, Tensor]:
        """What the network gets besides the text. times: (B,), 0 to 1000."""
        return {"hidden_states": x_t, "timestep": self._per_token(times)}

    def _per_token(self, times: Tensor) -> Tensor:
        return times if self._token_times is None else self._token_times.flatten() * times[:, None]

    def decode(self, latents: Tensor, condition: Condition) -> Tensor:
        """Latents (B, C, T, h, w) -> (B, F, 3, H, W): see `Policy.decode`."""
        return self._decode(latents / self._inverse_std + self._mean)

    def latents(self, media: Tensor, condition: Condition) -> Tensor:
        """(B, F, 3, H, W) -> latents (B, C, T, h, w): see `Policy.latents`."""
        return (self._mode(media) - self._mean) * self._inverse_std

    # --- Export -------------------------------------------------------------------------------------------------------

    def _arguments(self) -> dict[str, object]:
        model = self.model
        arguments: dict[str, object] = {"num_frames": model.num_frames, "guidance_scale": model.guidance_scale}
        if model.guidance_scale_2 is not None:
            arguments |= {"guidance_scale_2": model.guidance_scale_2}
        return arguments | {"max_sequence_length": self.max_sequence_length}

    def _usage(self) -> Usage:
        usage, config, setup = super()._usage(), self.pipeline.scheduler.config, []
        if self._shift is not None:
            # The pipeline hands no sigmas to its scheduler; this is where it would take its own last one from.
            setup += [f"pipe.scheduler.sigma_min = 1 / {self.dynamics.num_steps}  # one step of the run's schedule"]
        elif "flow_shift" in config:
            usage = replace(
                usage, scheduler="FlowMatchEulerDiscreteScheduler", construct=f"(shift={config.flow_shift})"
            )
        if self.model.lora is not None and "transformer_2" in self.modules:
            own = 'weight_name="transformer_2_lora_weights.safetensors", load_into_transformer_2=True'
            setup += [f'pipe.load_lora_weights("path/to/this/folder", {own})']
        return replace(usage, setup=tuple(setup))

    def load_adapters(self, folder: Path) -> None:
        """See `PipelinePolicy.load_adapters`: the second network's lie in a file of their own."""
        super().load_adapters(folder)
        if "transformer_2" in self.modules:
            second = {"weight_name": "transformer_2_lora_weights.safetensors", "load_into_transformer_2": True}
            self.pipeline.load_lora_weights(folder, **second)


class WanImagePolicy(WanPolicy):
    """`WanImageToVideoPipeline`: the clip continues a picture, the prompt's image.

    The network reads cat(latents, mask, image latents) in the channels; Wan 2.1 attends to the picture's CLIP states
    too. Wan 2.2 5B (expand_timesteps) is given the picture as the first latent frame instead: that frame is no part
    of the state, whose latents are (C, T - 1, h, w).
    """

    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer", "image_encoder", "image_processor", "vae")
    task: ClassVar[Task] = "image-to-video"

    @property
    def takes_image(self) -> bool:
        """Always."""
        return True

    def _image_channels(self) -> int:
        vae = self.pipeline.vae.config
        return 0 if self._expand else vae.scale_factor_temporal + vae.z_dim

    def _check(self, model: ModelConfig, rollout: RolloutConfig) -> None:
        super()._check(model, rollout)
        if self._reads_clip() and self.pipeline.image_encoder is None:
            raise ModelError(
                f"{self.folder} has no image_encoder, which its transformer needs: use a complete checkpoint"
            )
        channels, frames, rows, columns = self.latent_shape
        step = self.pipeline.vae.config.scale_factor_temporal
        if self._token_times is not None:
            if frames == 1:
                least = self._least_frames
                raise ConfigError(
                    f"model.num_frames={model.num_frames} is the given picture alone here: use {least} or more"
                )
            self._token_times[0] = 0  # the given frame is clean
            self.latent_shape = (channels, frames - 1, rows, columns)
        # Which of the frames behind a latent frame are given: all that the first one stands for, and no other.
        self._mask = torch.zeros(1, step, frames, rows, columns, device=self.device)
        self._mask[:, :, 0] = 1

    @property
    def _least_frames(self) -> int:
        return 1 + self.pipeline.vae.config.scale_factor_temporal if self._expand else 1

    def _reads_clip(self) -> bool:
        """The pipeline's rule: its first network decides."""
        first: Any = self.module
        return first.config.image_dim is not None

    def _encode_settings(self) -> tuple[object, ...]:
        model = self.model
        size = model.height, model.width, model.num_frames, model.vae_tiling
        return *super()._encode_settings(), *size, self._expand, self._reads_clip()

    def _encode(self, prompt: Prompt) -> Condition:
        """Text, and `image_latents` (1, C, T, h, w), or (1, C, 1, h, w) with expand_timesteps: normalised, float32."""
        from dancegrpo.media import reference_image

        image, model = reference_image(prompt), self.model
        pixels = self.pipeline.video_processor.preprocess(image, height=model.height, width=model.width)
        # No noise is to be drawn, and none has a use here.
        options = {"dtype": torch.float32, "device": self.device, "latents": torch.zeros(1, device=self.device)}
        size = 1, self.latent_shape[0], model.height, model.width, model.num_frames
        given = self.pipeline.prepare_latents(pixels.to(self.device), *size, **options)[1]
        tensors = {"image_latents": given[:, -self.latent_shape[0] :]}
        if self._reads_clip():
            tensors["encoder_hidden_states_image"] = self.pipeline.encode_image(image, self.device)
        return Condition({**super()._encode(prompt).tensors, **tensors})

    def _inputs(self, x_t: Tensor, times: Tensor, told: Any) -> dict[str, Tensor]:
        given = told["image_latents"]
        if self._expand:
            seen = torch.cat([given, x_t], dim=2)
        else:
            seen = torch.cat([x_t, self._mask.expand(len(x_t), -1, -1, -1, -1), given], dim=1)
        inputs = {"hidden_states": seen, "timestep": self._per_token(times)}
        if self._reads_clip():
            inputs["encoder_hidden_states_image"] = told["encoder_hidden_states_image"]
        return inputs

    def decode(self, latents: Tensor, condition: Condition) -> Tensor:
        """Latents (B, C, T, h, w), or (B, C, T - 1, h, w) with expand_timesteps, which the given frame goes before."""
        if self._expand:
            latents = torch.cat([condition.tensors["image_latents"], latents], dim=2)
        return super().decode(latents, condition)

    def latents(self, media: Tensor, condition: Condition) -> Tensor:
        """(B, F, 3, H, W) -> latents (B, *S): see `Policy.latents`. The given frame is left out with the state's."""
        latents = super().latents(media, condition)
        return latents[:, :, 1:] if self._expand else latents

    def pipeline_state(self, latents: Tensor) -> Tensor:
        """See `PipelinePolicy.pipeline_state`; with expand_timesteps the first frame is the picture's."""
        return latents[:, :, -self.latent_shape[1] :]

    def pipeline_arguments(self, prompts: Sequence[Prompt], noise: Tensor) -> dict[str, Any]:
        """See `PipelinePolicy.pipeline_arguments`. ValueError for several images: the pipeline takes one a call."""
        if len({prompt.request()[2] for prompt in prompts}) > 1:
            raise ValueError("WanImageToVideoPipeline animates one image a call: call it for each image.")
        if self._expand:  # it draws the given frame too, and throws it away
            noise = torch.cat([torch.zeros_like(noise[:, :, :1]), noise], dim=2)
        arguments = super().pipeline_arguments(prompts, noise)
        image = arguments["image"]
        return arguments | {"image": image[0] if isinstance(image, list) else image}

    @torch.no_grad()
    def run_pipeline(self, prompts: Sequence[Prompt], noise: Tensor, scheduler: Any) -> Tensor:
        """See `PipelinePolicy.run_pipeline`; prompts with images of their own are drawn one by one."""
        if len({prompt.request()[2] for prompt in prompts}) == 1:
            return super().run_pipeline(prompts, noise, scheduler)
        clips = []
        for row, prompt in enumerate(prompts):
            clips.append(super().run_pipeline([prompt], noise[row : row + 1], scheduler))
        return torch.cat(clips)
