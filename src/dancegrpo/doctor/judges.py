"""The judges of a run without their weights: bytes, and one batch of those whose network is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dancegrpo.doctor.pretend import Pretender
from dancegrpo.dotted import import_dotted
from dancegrpo.errors import RewardError
from dancegrpo.rewards.blip import BLIP_LARGE, ImageRewardNetwork
from dancegrpo.rewards.catalog import CATALOG
from dancegrpo.rewards.open_clip import VIT_H_14, Architecture, Tower, build_clip
from dancegrpo.rewards.weights import DTYPES
from dancegrpo.settings import RewardConfig

VIT_L_14 = Architecture(Tower(1024, 4096, 24, 16), Tower(768, 3072, 12, 12), 768, 224, 14, 77, 49408, quick_gelu=True)
"""OpenAI's CLIP ViT-L/14."""
CLIPS = {"hps": VIT_H_14, "pickscore": VIT_H_14, "clip": VIT_L_14, "aesthetic": VIT_L_14}
"""The networks of the judges that are built here, ImageReward's apart."""
_BATCHES = {"hps": 32, "pickscore": 32, "clip": 32, "aesthetic": 32, "imagereward": 16, "videoalign": 4}
PARAMETERS = {
    "videoalign": 2_208_985_600,
    "visionreward": 12_500_000_000,
    "geneval": 497_000_000,
}
"""Weights of the judges whose networks are not built here: rounded, but for VideoAlign's Qwen2-VL-2B."""
SHARE = 0.25
"""Activations of those judges, as a share of their weights: a rule of thumb, not a count."""


@dataclass
class JudgeNetwork:
    """What a judge lays on the device. batch: samples at once, None = all. pictures: it sees (N, 3, side, side)."""

    name: str
    batch: int | None
    network: nn.Module | None = None
    parameter_bytes: int = 0
    activation_bytes: int = 0
    side: int = 224

    def look(self, media: Tensor) -> Tensor:
        """Scores (N,) of media (N, F, 3, H, W), through the network where it is known."""
        pictures = media.flatten(0, 1).float()
        if self.network is None:
            return pictures.flatten(1).mean(1)
        network: Any = self.network
        shown = nn.functional.interpolate(pictures, size=(self.side, self.side), mode="bicubic", antialias=True)
        if isinstance(network, ImageRewardNetwork):
            ids = torch.ones(len(shown), 35, dtype=torch.int64)
            return network(shown, ids, torch.ones_like(ids)).reshape(len(shown), -1).mean(1)
        return network.get_image_features(shown.to(network.dtype)).pooler_output.float().mean(1)


def judge_network(name: str, config: RewardConfig, pretender: Pretender, device: torch.device) -> JudgeNetwork:
    """A judge of a recipe, its weights not looked for; one that is put elsewhere lays nothing on `device`."""
    kind, options = config.judge, config.options
    dtype = DTYPES[str(options.get("dtype", "float32"))]
    given = options.get("batch_size")
    batch = given if isinstance(given, int) else _BATCHES.get(kind)
    if elsewhere(config, device):
        return JudgeNetwork(name, batch)
    sizes = _shipped_clip(options) if kind in CLIPS else None
    if kind in CLIPS and sizes is None:
        clip = torch.nn.Module.to(build_clip(CLIPS[kind]), dtype).eval().requires_grad_(False)
        return JudgeNetwork(name, batch, pretender.dress(clip))
    if kind == "imagereward":
        with torch.device("meta"):
            blip = ImageRewardNetwork(BLIP_LARGE)
        return JudgeNetwork(name, batch, pretender.dress(blip.to(dtype).eval().requires_grad_(False)))
    if kind in PARAMETERS:
        size = PARAMETERS[kind] * dtype.itemsize
        return JudgeNetwork(name, batch, None, size, int(SHARE * size))
    return JudgeNetwork(name, batch or _own_batch(kind))


def elsewhere(config: RewardConfig, device: torch.device) -> bool:
    """Whether the recipe puts a judge on another kind of device than the run's."""
    place = getattr(config, "device", None) or config.options.get("device")
    return isinstance(place, str) and place.split(":")[0] != device.type


def _own_batch(kind: str) -> int | None:
    if kind not in CATALOG:
        return None
    found = getattr(import_dotted(CATALOG[kind].target, f"judge {kind!r}", RewardError), "batch_size", None)
    return found if isinstance(found, int) else None


def _shipped_clip(options: Any) -> str | None:
    """The miniature judge that an option names: small beside everything else."""
    from dancegrpo.shapes import JUDGES

    named = [str(value) for key, value in options.items() if key in ("weights", "model", "processor")]
    return next((value for value in named if value in JUDGES), None)
