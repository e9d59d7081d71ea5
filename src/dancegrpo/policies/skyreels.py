"""SkyReels-V1 image-to-video: HunyuanVideo with the image's latents beside the clip's, channel by channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dancegrpo.noise import generator
from dancegrpo.policies.base import Condition
from dancegrpo.policies.hunyuan_video import HunyuanVideoImagePolicy, first_frame
from dancegrpo.prompts import Prompt


class SkyreelsPolicy(HunyuanVideoImagePolicy):
    """`HunyuanSkyreelsImageToVideoPipeline`, usually with classifier-free guidance (`model.true_cfg_scale`).

    Latents (C, T, h, w). The pipeline draws the image's latents from the autoencoder's posterior, anew in each call;
    here the draw is keyed by the prompt, so that a prompt has one image in all of a run.
    """

    input_channels: ClassVar[dict[str | None, tuple[int, int]]] = {None: (2, 0)}

    def _encode(self, prompt: Prompt) -> Condition:
        image = self._scaled(self._image_distribution(prompt).sample(image_generator(prompt)))
        return Condition({**super()._encode(prompt).tensors, **image})

    def pipeline_arguments(self, prompts: Sequence[Prompt], noise: Tensor) -> dict[str, Any]:
        """See `PipelinePolicy.pipeline_arguments`; the draws of the images are those of `encode`."""
        return super().pipeline_arguments(prompts, noise) | {"generator": [image_generator(p) for p in prompts]}

    def _input(self, x_t: Tensor, condition: Condition) -> Tensor:
        return torch.cat([x_t, first_frame(condition.tensors["image_latents"], x_t.shape[2])], dim=1)


def image_generator(prompt: Prompt) -> torch.Generator:
    """Where the noise of an image's latents comes from: the prompt's own text and picture."""
    return generator(0, f"image {prompt.request()!r}")
