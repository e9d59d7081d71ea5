"""CLIP checkpoints in open_clip's layout, loaded strictly into `transformers.CLIPModel`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from statistics import mode
from typing import Any

import torch
from torch import Tensor

from dancegrpo.errors import RewardError
from dancegrpo.rewards.weights import check_tensors, read_tensors


@dataclass(frozen=True)
class Tower:
    """One transformer of a CLIP: width and mlp in channels."""

    width: int
    mlp: int
    layers: int
    heads: int


@dataclass(frozen=True)
class Architecture:
    """The sizes of a CLIP: image and patch in pixels, context in tokens, projection in channels.

    quick_gelu: the activation is x * sigmoid(1.702 x), as in OpenAI's and DFN's checkpoints, not the exact GELU.
    """

    vision: Tower
    text: Tower
    projection: int
    image: int
    patch: int
    context: int
    vocabulary: int
    quick_gelu: bool = False


VIT_H_14 = Architecture(Tower(1280, 5120, 32, 16), Tower(1024, 4096, 24, 16), 1024, 224, 14, 77, 49408)
"""ViT-H-14, the architecture of HPS-v2.1."""
_VISION_HEADS = {768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
_TEXT_HEADS = {512: 8, 768: 12, 1024: 16, 1280: 20}

_NAMES = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
_TRANSPOSED = {"text_projection", "visual.proj"}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_BLOCK_NAMES = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def load_open_clip(path: str | Path, heads: Sequence[int] | None = None) -> Any:
    """A frozen `transformers.CLIPModel` in evaluation mode, with the weights of an open_clip checkpoint.

    path: a `.pt` with the tensors under `state_dict` (or bare), or a `.safetensors` file.
    heads: (vision, text) attention heads, which tensors do not tell; the other sizes are then read off the tensors.
    None = the checkpoint is a ViT-H-14.
    Raises RewardError for an unreadable file and for any missing, extra or misshapen tensor, by name.
    """
    tensors = read_tensors(path)
    return from_tensors(tensors, VIT_H_14 if heads is None else infer_architecture(tensors, heads), path)


def from_tensors(tensors: Mapping[str, Tensor], architecture: Architecture, path: str | Path) -> Any:
    """A frozen `transformers.CLIPModel` in evaluation mode, of an open_clip checkpoint's tensors.

    path: where they came from. Raises RewardError for any missing, extra or misshapen tensor, by name.
    """
    check_tensors(tensors, layout(architecture), path)
    model = build_clip(architecture)
    model.load_state_dict(to_transformers(tensors), strict=True, assign=True)
    # Built without storage: the position ids, which no checkpoint holds, are all that is still missing.
    for embeddings in (model.text_model.embeddings, model.vision_model.embeddings):
        embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings)[None]
    return model.requires_grad_(False).eval()


def build_clip(architecture: Architecture) -> Any:
    """A `transformers.CLIPModel` of these sizes on the meta device: no memory, no random initialisation."""
    from transformers import CLIPConfig, CLIPModel

    a = architecture
    common = {"hidden_act": "quick_gelu" if a.quick_gelu else "gelu", "projection_dim": a.projection}
    config = CLIPConfig(
        projection_dim=a.projection,
        # open_clip pools at the highest token id, which is the end of text.
        text_config=common
        | _tower(a.text)
        | {
            "max_position_embeddings": a.context,
            "vocab_size": a.vocabulary,
            "bos_token_id": a.vocabulary - 2,
            "eos_token_id": a.vocabulary - 1,
        },
        vision_config=common | _tower(a.vision) | {"image_size": a.image, "patch_size": a.patch},
    )
    with torch.device("meta"):
        return CLIPModel(config)


def _tower(tower: Tower) -> dict[str, int]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
    }


def published_heads(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """(vision, text) attention heads of the ViT-B, L, H, g and bigG, which their widths tell.

    Raises RewardError for other widths.
    """
    sizes = infer_architecture(tensors, (1, 1))
    vision, text = sizes.vision.width, sizes.text.width
    if vision not in _VISION_HEADS or text not in _TEXT_HEADS:
        raise RewardError(f"a CLIP of widths {vision} (vision) and {text} (text) is no published one: give its heads.")
    return _VISION_HEADS[vision], _TEXT_HEADS[text]


def infer_architecture(tensors: Mapping[str, Tensor], heads: Sequence[int]) -> Architecture:
    """The sizes of a checkpoint, read off the shapes of its tensors; widths by majority, so that one bad one shows.

    heads: (vision, text). Raises RewardError where the shapes do not tell, or heads do not divide a width.
    """
    try:
        vision_heads, text_heads = heads
        vision = _infer_tower(tensors, "visual.", vision_heads)
        text = _infer_tower(tensors, "", text_heads)
        patch = tensors["visual.conv1.weight"].shape[-1]
        grid = isqrt(tensors["visual.positional_embedding"].shape[0] - 1)
        projection, of_text = tensors["visual.proj"].shape[1], tensors["text_projection"].shape[1]
        context, vocabulary = tensors["positional_embedding"].shape[0], tensors["token_embedding.weight"].shape[0]
    except KeyError as missing:
        raise RewardError(
            f"the checkpoint has no tensor {missing}: it is not a CLIP in open_clip's layout."
        ) from missing
    except (ValueError, TypeError, IndexError) as error:
        raise RewardError(f"the sizes of the CLIP cannot be read off the checkpoint: {error}; check heads.") from error
    if projection != of_text:
        raise RewardError(f"visual.proj has {projection} columns, text_projection {of_text}: give the published file.")
    return Architecture(vision, text, projection, grid * patch, patch, context, vocabulary)


def _infer_tower(tensors: Mapping[str, Tensor], prefix: str, heads: int) -> Tower:
    blocks = [match for key in tensors if (match := _BLOCK.fullmatch(key)) and (match[1] or "") == prefix]
    if not blocks:
        raise KeyError(f"{prefix}transformer.resblocks.0.ln_1.weight")
    width = mode(tensors[b[0]].shape[0] for b in blocks if b[3] in ("ln_1.weight", "ln_2.weight", "ln_1.bias"))
    mlp = mode(tensors[b[0]].shape[0] for b in blocks if b[3] in ("mlp.c_fc.weight", "mlp.c_fc.bias"))
    if heads < 1 or width % heads:
        raise ValueError(f"{heads} heads do not divide the width {width}")
    # A block counts where most of its twelve tensors are there: a stray one is extra, and does not make a block.
    tensors_per_block = Counter(int(b[2]) for b in blocks)
    layers = 1 + max((i for i, count in tensors_per_block.items() if count > 6), default=-1)
    return Tower(width, mlp, layers, heads)


def layout(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor of an open_clip checkpoint of these sizes: name -> shape."""
    a, v, t = architecture, architecture.vision.width, architecture.text.width
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "positional_embedding": (a.context, t),
        "token_embedding.weight": (a.vocabulary, t),
        "ln_final.weight": (t,),
        "ln_final.bias": (t,),
        "text_projection": (t, a.projection),
        "visual.class_embedding": (v,),
        "visual.positional_embedding": ((a.image // a.patch) ** 2 + 1, v),
        "visual.conv1.weight": (v, 3, a.patch, a.patch),
        "visual.ln_pre.weight": (v,),
        "visual.ln_pre.bias": (v,),
        "visual.ln_post.weight": (v,),
        "visual.ln_post.bias": (v,),
        "visual.proj": (v, a.projection),
    }
    for prefix, tower in (("visual.", a.vision), ("", a.text)):
        w, m = tower.width, tower.mlp
        block = {"attn.in_proj_weight": (3 * w, w), "attn.in_proj_bias": (3 * w,)}
        for name, shape in {"attn.out_proj": (w, w), "mlp.c_fc": (m, w), "mlp.c_proj": (w, m)}.items():
            block |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        block |= {f"{name}.{kind}": (w,) for name in ("ln_1", "ln_2") for kind in ("weight", "bias")}
        for i in range(tower.layers):
            shapes |= {f"{prefix}transformer.resblocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes


def to_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's tensors under the names of `transformers.CLIPModel`, the joint q, k, v projection in three."""
    return {name: tensor for key, value in tensors.items() for name, tensor in _renamed(key, value)}


def _renamed(key: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
    block = _BLOCK.fullmatch(key)
    if block is None:
        yield _NAMES[key], tensor.T.contiguous() if key in _TRANSPOSED else tensor
        return
    tower, name = "vision_model" if block[1] else "text_model", block[3]
    prefix = f"{tower}.encoder.layers.{block[2]}"
    if name.startswith("attn.in_proj_"):
        kind = name.removeprefix("attn.in_proj_")
        for letter, part in zip("qkv", tensor.chunk(3), strict=True):
            yield f"{prefix}.self_attn.{letter}_proj.{kind}", part
    else:
        stem, _, kind = name.rpartition(".")
        yield f"{prefix}.{_BLOCK_NAMES[stem]}.{kind}", tensor
