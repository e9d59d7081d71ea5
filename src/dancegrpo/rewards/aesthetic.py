"""LAION's aesthetic predictors: a small head on a CLIP's image embedding, trained on people's ratings from 1 to 10."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import NOT_FINITE, Scores, as_pictures
from dancegrpo.rewards.clip_score import HUB_MODEL, load_clip
from dancegrpo.rewards.weights import NetworkReward, check_placement, check_tensors, fetch, read_tensors

HUB_HEAD = ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")
"""Hub repository and file with the head published as sac+logos+ava1-l14-linearMSE.pth."""
_HIDDEN = (1024, 128, 64, 16, 1)


class AestheticReward(NetworkReward):
    """How beautiful a picture is, whatever was asked for: a rating around 1 to 10, unbounded. Prompts are not read.

    head: path of `sac+logos+ava1-l14-linearMSE.pth` (five layers) or of `sa_0_4_vit_l_14_linear.pth` (one); None = the
    former, fetched once. model: the CLIP ViT-L/14 under it, as in `ClipScoreReward`.
    batch_size, dtype, device: as in `NetworkReward`; the head always computes in float32.
    Raises RewardError for a head or a CLIP that is missing or does not fit.
    """

    name = "aesthetic"
    differentiable = True
    pictures_only = True

    def __init__(
        self,
        head: str | Path | None = None,
        model: str | Path = HUB_MODEL,
        batch_size: int = 32,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        check_placement(self.name, batch_size, dtype)
        clip = load_clip(self.name, model)
        self.preprocessing = clip.preprocessing
        path = fetch(*HUB_HEAD, option="head") if head is None else head
        network = AestheticNetwork(clip.model, load_head(path, clip.model.config.projection_dim))
        # A rating near 5 in bfloat16 has steps of 0.03, as large as the differences in a group.
        super().__init__(network, batch_size=batch_size, dtype=dtype, device=device, full_precision="head")

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score B pictures, media (B, 1, 3, H, W)."""
        pixels = self.preprocessing(as_pictures(media).to(self.device))
        values = self.model(pixels).to(media.device)
        return Scores(values, torch.ones_like(values, dtype=torch.bool)).mask(~values.isfinite(), NOT_FINITE)


class AestheticNetwork(nn.Module):
    """The image half of a `transformers.CLIPModel` and a head on its embedding of unit length."""

    def __init__(self, clip: Any, head: nn.Module) -> None:
        super().__init__()
        self.vision, self.projection, self.head = clip.vision_model, clip.visual_projection, head

    def forward(self, pixels: Tensor) -> Tensor:
        """(N,) float32 ratings. pixels: (N, 3, side, side), preprocessed."""
        pooled = self.vision(pixels.to(self.projection.weight.dtype)).pooler_output
        return self.head(F.normalize(self.projection(pooled).float(), dim=-1))[:, 0]


def load_head(path: str | Path, width: int) -> nn.Module:
    """The head in a published file, of one layer or five; (N, width) -> (N, 1). RewardError where it does not fit.

    Between the five layers lie only dropouts, which are off here: no activation.
    """
    tensors = read_tensors(path)
    if any(key.startswith("layers.") for key in tensors):
        expected = mlp_layout("layers.", width)
        check_tensors(tensors, expected, path)
        return build_mlp(tensors, "layers.", width)
    check_tensors(tensors, {"weight": (1, width), "bias": (1,)}, path)
    head = nn.Linear(width, 1)
    head.load_state_dict(tensors)
    return head


def mlp_layout(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the five layers, numbered as in the published files, whose odd numbers are dropouts."""
    sizes = (width, *_HIDDEN)
    shapes: dict[str, tuple[int, ...]] = {}
    for i, number in enumerate(_NUMBERS):
        shapes[f"{prefix}{number}.weight"] = (sizes[i + 1], sizes[i])
        shapes[f"{prefix}{number}.bias"] = (sizes[i + 1],)
    return shapes


_NUMBERS = (0, 2, 4, 6, 7)


def build_mlp(tensors: Mapping[str, Tensor], prefix: str, width: int) -> nn.Sequential:
    """The five layers of `mlp_layout` with these weights, in float32."""
    sizes = (width, *_HIDDEN)
    layers = nn.Sequential(*(nn.Linear(sizes[i], sizes[i + 1]) for i in range(len(_HIDDEN))))
    names = {f"{i}.{kind}": f"{prefix}{n}.{kind}" for i, n in enumerate(_NUMBERS) for kind in ("weight", "bias")}
    layers.load_state_dict({own: tensors[theirs] for own, theirs in names.items()})
    return layers
