"""ImageReward's network: BLIP's image encoder, its text encoder that looks at the image, and a head on the first token.

The published checkpoint's tensors are loaded strictly into transformers' BLIP modules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mode
from typing import Any

import torch
from torch import Tensor, nn

from dancegrpo.errors import RewardError
from dancegrpo.rewards.aesthetic import build_mlp, mlp_layout
from dancegrpo.rewards.weights import check_tensors


@dataclass(frozen=True)
class BlipSizes:
    """Widths in channels, image and patch in pixels, context in tokens. The MLPs of both towers are 4 times wider."""

    vision: int
    vision_layers: int
    vision_heads: int
    text: int
    text_layers: int
    text_heads: int
    image: int
    patch: int
    context: int
    vocabulary: int


BLIP_LARGE = BlipSizes(1024, 24, 16, 768, 12, 12, 224, 16, 512, 30524)
"""ImageReward v1.0: ViT-L/16 at 224 px under a BERT-base."""

_UNUSED = re.compile(r"blip\.(text_encoder\.embeddings\.position_ids|(vision|text)_proj\.(weight|bias))")
"""Tensors of the published file that the score does not depend on: BLIP's contrastive heads and a counting buffer."""
_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
_VISION_BLOCK = {
    "norm1": "layer_norm1",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


class ImageRewardNetwork(nn.Module):
    """BLIP and the head, built without storage: `load_image_reward` fills it."""

    def __init__(self, sizes: BlipSizes) -> None:
        super().__init__()
        from transformers import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        with torch.device("meta"):
            self.vision = BlipVisionModel(_vision_config(sizes))
            self.text = BlipTextModel(_text_config(sizes), add_pooling_layer=False)
        self.head: nn.Module = nn.Identity()

    def forward(self, pixels: Tensor, token_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(N,) float32, as the head gives them. pixels: (N, 3, side, side). token_ids, attention_mask: (N, tokens)."""
        seen = self.vision(pixels.to(self.vision.dtype)).last_hidden_state
        read = self.text(token_ids, attention_mask=attention_mask, encoder_hidden_states=seen).last_hidden_state
        return self.head(read[:, 0].float())[:, 0]


def load_image_reward(tensors: Mapping[str, Tensor], sizes: BlipSizes, path: str | Path) -> ImageRewardNetwork:
    """The network in evaluation mode, of a published file's tensors. path: where they came from.

    Raises RewardError for any missing, extra or misshapen tensor, by name.
    """
    needed = {name: tensor for name, tensor in tensors.items() if not _UNUSED.fullmatch(name)}
    check_tensors(needed, layout(sizes), path)
    network = ImageRewardNetwork(sizes)
    vision, text, head = (_strip(needed, prefix) for prefix in ("blip.visual_encoder.", "blip.text_encoder.", "mlp."))
    renamed = {_vision_name(name): tensor for name, tensor in vision.items()}
    network.vision.load_state_dict(renamed, strict=True, assign=True)
    network.text.load_state_dict(text, strict=True, assign=True)
    # Built without storage: the position ids, which no checkpoint needs to hold, are all that is still missing.
    network.text.embeddings.position_ids = torch.arange(sizes.context)[None]
    network.head = build_mlp(head, "layers.", sizes.text)
    return network.requires_grad_(False).eval()


def infer_sizes(tensors: Mapping[str, Tensor], heads: Sequence[int]) -> BlipSizes:
    """The sizes of a checkpoint, read off its tensors; widths by majority, so that one bad one shows.

    heads: (vision, text). Raises RewardError where the shapes do not tell, or heads do not divide a width.
    """
    try:
        vision_heads, text_heads = heads
        patches = tensors["blip.visual_encoder.pos_embed"].shape[1]
        patch = tensors["blip.visual_encoder.patch_embed.proj.weight"].shape[-1]
        vocabulary = tensors["blip.text_encoder.embeddings.word_embeddings.weight"].shape[0]
        context = tensors["blip.text_encoder.embeddings.position_embeddings.weight"].shape[0]
        vision, text = _width(tensors, r"blip\.visual_encoder\."), _width(tensors, r"blip\.text_encoder\.")
        if vision % vision_heads or text % text_heads:
            raise ValueError(f"heads {vision_heads}, {text_heads} do not divide the widths {vision}, {text}")
    except KeyError as missing:
        raise RewardError(f"the checkpoint has no tensor {missing}: it is not an ImageReward.") from missing
    except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:
        raise RewardError(f"the sizes of the BLIP cannot be read off the checkpoint: {error}; check heads.") from error
    layers = [
        _count(tensors, name) for name in (r"blip\.visual_encoder\.blocks", r"blip\.text_encoder\.encoder\.layer")
    ]
    side = round((patches - 1) ** 0.5) * patch
    return BlipSizes(vision, layers[0], vision_heads, text, layers[1], text_heads, side, patch, context, vocabulary)


def _width(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return mode(t.shape[0] for name, t in tensors.items() if re.match(rf"{prefix}.*norm\d?\.weight$", name, re.I))


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many blocks of that name most tensors speak of: a stray one is extra, and does not make a block."""
    numbers = [int(match[1]) for name in tensors if (match := re.match(rf"{prefix}\.(\d+)\.", name))]
    return 1 + max((i for i in set(numbers) if numbers.count(i) > 6), default=-1)


def layout(sizes: BlipSizes) -> dict[str, tuple[int, ...]]:
    """Every tensor of a published file that the score depends on: name -> shape."""
    return {
        **{f"blip.visual_encoder.{name}": shape for name, shape in _vision_layout(sizes).items()},
        **{f"blip.text_encoder.{name}": shape for name, shape in _text_layout(sizes).items()},
        **mlp_layout("mlp.layers.", sizes.text),
    }


def _vision_layout(s: BlipSizes) -> dict[str, tuple[int, ...]]:
    w = s.vision
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, w),
        "pos_embed": (1, (s.image // s.patch) ** 2 + 1, w),
        "patch_embed.proj.weight": (w, 3, s.patch, s.patch),
        "patch_embed.proj.bias": (w,),
        **_norm("norm", w),
    }
    for i in range(s.vision_layers):
        block = _norm("norm1", w) | _norm("norm2", w) | _linear("attn.qkv", w, 3 * w) | _linear("attn.proj", w, w)
        block |= _linear("mlp.fc1", w, 4 * w) | _linear("mlp.fc2", 4 * w, w)
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes


def _text_layout(s: BlipSizes) -> dict[str, tuple[int, ...]]:
    w = s.text
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (s.vocabulary, w),
        "embeddings.position_embeddings.weight": (s.context, w),
        **_norm("embeddings.LayerNorm", w),
    }
    block = _linear("intermediate.dense", w, 4 * w) | _linear("output.dense", 4 * w, w) | _norm("output.LayerNorm", w)
    for attention, read in (("attention", w), ("crossattention", s.vision)):
        block |= _linear(f"{attention}.self.query", w, w)
        block |= _linear(f"{attention}.self.key", read, w) | _linear(f"{attention}.self.value", read, w)
        block |= _linear(f"{attention}.output.dense", w, w) | _norm(f"{attention}.output.LayerNorm", w)
    for i in range(s.text_layers):
        shapes |= {f"encoder.layer.{i}.{name}": shape for name, shape in block.items()}
    return shapes


def _linear(name: str, width: int, out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _strip(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _vision_name(name: str) -> str:
    """timm's name of a tensor -> transformers'."""
    if name in _VISION:
        return _VISION[name]
    stem, _, kind = name.rpartition(".")
    if stem in _VISION:
        return f"{_VISION[stem]}.{kind}"
    _, number, part = stem.split(".", 2)
    return f"encoder.layers.{number}.{_VISION_BLOCK[part]}.{kind}"


def _vision_config(s: BlipSizes) -> Any:
    from transformers import BlipVisionConfig

    return BlipVisionConfig(
        hidden_size=s.vision,
        intermediate_size=4 * s.vision,
        num_hidden_layers=s.vision_layers,
        num_attention_heads=s.vision_heads,
        image_size=s.image,
        patch_size=s.patch,
        layer_norm_eps=1e-6,  # the published ViT's; transformers' BLIP defaults to 1e-5
    )


def _text_config(s: BlipSizes) -> Any:
    from transformers import BlipTextConfig

    return BlipTextConfig(
        vocab_size=s.vocabulary,
        hidden_size=s.text,
        encoder_hidden_size=s.vision,
        intermediate_size=4 * s.text,
        num_hidden_layers=s.text_layers,
        num_attention_heads=s.text_heads,
        max_position_embeddings=s.context,
        # What builds the cross attention; the forward pass stays bidirectional.
        is_decoder=True,
    )
