"""CLIP score: the cosine of a picture and its prompt, by any published CLIP (arXiv:2103.00020, 2104.08718)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from dancegrpo.errors import RewardError
from dancegrpo.rewards.clip import (
    CLIP_MEAN,
    CLIP_STD,
    HUB_TOKENIZER,
    CosineReward,
    clean_text,
    load_tokenizer,
    normalize_pixels,
)
from dancegrpo.rewards.open_clip import from_tensors, infer_architecture, published_heads
from dancegrpo.rewards.weights import (
    check_placement,
    check_source,
    fetch,
    load_pretrained,
    read_json,
    read_tensors,
    shipped,
)

HUB_MODEL = "openai/clip-vit-large-patch14"
"""Hub repository of the CLIP that papers report most."""
OPEN_CLIP_CONFIG = "open_clip_config.json"
"""Name of the file in which open_clip's checkpoints say their sizes and preprocessing."""
Resize = Literal["crop", "squash"]
_FILES = {".pt", ".pth", ".bin", ".safetensors"}
_PIL_FILTERS = {2: "bilinear", 3: "bicubic"}


class ClipScoreReward(CosineReward):
    """CLIP score: raw cosine in [-1, 1] of a picture and its prompt, not scaled by 100 or the logit scale, not clipped.

    model: folder or hub id in transformers' layout or open_clip's, a checkpoint file in open_clip's, or `shapes-clip`,
    which comes with the package.
    tokenizer: folder or hub id with CLIP's vocabulary; None = the model's own, for open_clip's layout `HUB_TOKENIZER`.
    resize: `crop` scales the shortest side and takes the centre, `squash` ignores the aspect ratio; None = as the
    checkpoint says. heads, quick_gelu: (vision, text) attention heads and the activation of a checkpoint file, where no
    `open_clip_config.json` lies beside it. batch_size, dtype, device: as in `NetworkReward`.
    Raises RewardError for a checkpoint or tokenizer that is missing or does not fit.
    """

    name = "clip"

    def __init__(
        self,
        model: str | Path = HUB_MODEL,
        tokenizer: str | Path | None = None,
        resize: Resize | None = None,
        heads: Sequence[int] | None = None,
        quick_gelu: bool | None = None,
        batch_size: int = 32,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        check_placement(self.name, batch_size, dtype)
        loaded = load_clip(self.name, shipped(model) or model, resize=resize, heads=heads, quick_gelu=quick_gelu)
        vocabulary = loaded.model.config.text_config.vocab_size
        reader = load_tokenizer(self.name, tokenizer or loaded.tokenizer, vocabulary=vocabulary)
        self.preprocessing, self.cleans = loaded.preprocessing, loaded.open_clip
        super().__init__(loaded.model, reader, batch_size=batch_size, dtype=dtype, device=device)

    def pixels(self, pictures: Tensor) -> Tensor:
        """As the checkpoint's preprocessing says."""
        return self.preprocessing(pictures)

    def clean(self, text: str) -> str:
        """As open_clip cleans texts, for its checkpoints; transformers' tokenizer takes them as they are."""
        return clean_text(text) if self.cleans else text


@dataclass(frozen=True)
class Preprocessing:
    """How a CLIP wants its pictures, in float tensors so that gradients pass.

    side: pixels of the shortest side after scaling (both, where `squash`). crop: side of the square the network reads.
    mean, std: per channel. interpolation: `bicubic` or `bilinear`, antialiased. rounded: the crop's corner is rounded,
    as torchvision does, not floored, as transformers does: one pixel where the margin is odd.
    """

    side: int
    crop: int
    squash: bool = False
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD
    interpolation: str = "bicubic"
    rounded: bool = False

    def __call__(self, pictures: Tensor) -> Tensor:
        """(N, 3, H, W) float in [0, 1] -> (N, 3, crop, crop) float32, normalised."""
        pictures = pictures.float()
        height, width = pictures.shape[-2:]
        size = self._size(height, width)
        if size != (height, width):
            pictures = F.interpolate(pictures, size=size, mode=self.interpolation, antialias=True)
            # Bicubic overshoots at edges, and a picture in bytes cannot.
            pictures = pictures.clamp(0, 1)
        corner = [round(margin / 2) if self.rounded else margin // 2 for margin in (n - self.crop for n in size)]
        top, left = corner
        return normalize_pixels(pictures[..., top : top + self.crop, left : left + self.crop], self.mean, self.std)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        if self.squash:
            return self.side, self.side
        shortest = min(height, width)
        # Whole numbers: a quotient in floats would lose a pixel where the long side comes out exact.
        return self.side * height // shortest, self.side * width // shortest


@dataclass(frozen=True)
class LoadedClip:
    """A CLIP with what belongs to it. model: `transformers.CLIPModel`, frozen. tokenizer: folder or hub id."""

    model: Any
    preprocessing: Preprocessing
    tokenizer: str
    open_clip: bool


def load_clip(
    judge: str,
    source: str | Path,
    *,
    resize: Resize | None = None,
    heads: Sequence[int] | None = None,
    quick_gelu: bool | None = None,
) -> LoadedClip:
    """Load a CLIP in either layout, strictly; the options are those of `ClipScoreReward`.

    Raises RewardError for what is missing or does not fit, by name.
    """
    if resize not in (None, "crop", "squash"):
        raise RewardError(f"resize={resize!r} of the {judge} judge is unknown: use crop or squash.")
    if Path(source).is_file() or Path(source).suffix in _FILES:
        config = Path(source).with_name(OPEN_CLIP_CONFIG)
        loaded = _load_file(Path(source), config if config.is_file() else None, heads, quick_gelu)
    else:
        name = check_source(judge, source, option="model")
        config = _first(name, ("config.json", OPEN_CLIP_CONFIG))
        if config.name == "config.json":
            loaded = _load_folder(judge, name, heads, quick_gelu)
        else:
            weights = _first(name, ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"))
            loaded = _load_file(weights, config, heads, quick_gelu)
    if resize is None:
        return loaded
    return replace(loaded, preprocessing=replace(loaded.preprocessing, squash=resize == "squash"))


def _first(source: str, names: Sequence[str]) -> Path:
    """The first of these files that a folder or hub repository has."""
    folder = Path(source)
    if folder.is_dir():
        for name in names:
            if (folder / name).is_file():
                return folder / name
        raise RewardError(f"folder {source!r} has no {' or '.join(names)}: give a complete checkpoint folder.")
    failure: RewardError | None = None
    for name in names:
        try:
            return fetch(source, name, option="model")
        except RewardError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _load_folder(judge: str, name: str, heads: Sequence[int] | None, quick_gelu: bool | None) -> LoadedClip:
    from transformers import CLIPModel

    if heads is not None or quick_gelu is not None:
        raise RewardError(f"heads and quick_gelu are for checkpoint files: {name!r} says them in its config.json.")
    model = load_pretrained(CLIPModel, name, judge=judge)
    side = model.config.vision_config.image_size
    return LoadedClip(model, load_preprocessing(name, side), name, open_clip=False)


def load_preprocessing(source: str, image_size: int) -> Preprocessing:
    """What a folder or hub repository says of preprocessing, in transformers' words or, where it has none, open_clip's.

    image_size: side in pixels that the network reads. Raises RewardError for none, or for one of another size.
    """
    path = _first(source, ("preprocessor_config.json", OPEN_CLIP_CONFIG))
    parse = _from_open_clip if path.name == OPEN_CLIP_CONFIG else _from_processor
    return _parsed(path, parse, image_size)


def _load_file(weights: Path, config: Path | None, heads: Sequence[int] | None, quick_gelu: bool | None) -> LoadedClip:
    model_config = read_json(config).get("model_cfg", {}) if config else {}
    if quick_gelu is None and config is None:
        raise RewardError(
            f"the activation of {str(weights)!r} is unknown: set quick_gelu to true (OpenAI, DFN) or false."
        )
    tensors = read_tensors(weights)
    architecture = infer_architecture(tensors, heads or _heads(model_config) or published_heads(tensors))
    gelu = bool(model_config.get("quick_gelu", False)) if quick_gelu is None else quick_gelu
    model = from_tensors(tensors, replace(architecture, quick_gelu=gelu), weights)
    side = architecture.image
    preprocessing = _parsed(config, _from_open_clip, side) if config else Preprocessing(side, side, rounded=True)
    return LoadedClip(model, preprocessing, HUB_TOKENIZER, open_clip=True)


def _heads(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """(vision, text) as an open_clip configuration says them."""
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    if "width" not in vision or "heads" not in text:
        return None
    return int(vision["width"]) // int(vision.get("head_width", 64)), int(text["heads"])


def _parsed(path: Path, parse: Any, image_size: int) -> Preprocessing:
    try:
        preprocessing: Preprocessing = parse(read_json(path), image_size)
    except (KeyError, TypeError, ValueError) as error:
        raise RewardError(f"{str(path)!r} asks for a preprocessing that is not CLIP's: {error}.") from error
    if preprocessing.crop != image_size or preprocessing.side < image_size:
        asked, given = f"{image_size} px", f"{preprocessing.side} px cut to {preprocessing.crop}"
        raise RewardError(f"{str(path)!r} gives {given}, the network reads {asked}: give the files of one checkpoint.")
    return preprocessing


def _from_processor(config: Mapping[str, Any], image_size: int) -> Preprocessing:
    """transformers' preprocessor_config.json; ValueError for steps that are none of CLIP's."""
    for step in ("do_resize", "do_normalize"):
        if not config.get(step, True):
            raise ValueError(f"{step} is false")
    size = config.get("size", image_size)
    squash = isinstance(size, Mapping) and "height" in size
    side = _square(size)
    crop = _square(config.get("crop_size", side)) if config.get("do_center_crop", True) else side
    if not squash and not config.get("do_center_crop", True):
        raise ValueError("do_center_crop is false")
    if (resample := config.get("resample", 3)) not in _PIL_FILTERS:
        raise ValueError(f"resample {resample} is neither 2 nor 3")
    mean, std = config.get("image_mean", CLIP_MEAN), config.get("image_std", CLIP_STD)
    return Preprocessing(side, crop, squash, tuple(mean), tuple(std), _PIL_FILTERS[resample])


def _square(size: Any) -> int:
    """224 of 224, [224, 224], {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    listed = size.values() if isinstance(size, Mapping) else size if isinstance(size, Sequence) else [size]
    sides = set(listed)
    if len(sides) != 1:
        raise ValueError(f"size {size} is not square")
    return int(sides.pop())


def _from_open_clip(config: Mapping[str, Any], image_size: int) -> Preprocessing:
    """open_clip's configuration; ValueError for a resize mode or interpolation that is none of CLIP's."""
    asked = config.get("preprocess_cfg", {})
    mode, interpolation = asked.get("resize_mode", "shortest"), asked.get("interpolation", "bicubic")
    if mode not in ("shortest", "squash") or interpolation not in _PIL_FILTERS.values():
        raise ValueError(f"resize_mode {mode!r} with interpolation {interpolation!r}")
    side = _square(asked.get("size", image_size))
    mean, std = tuple(asked.get("mean", CLIP_MEAN)), tuple(asked.get("std", CLIP_STD))
    return Preprocessing(side, side, mode == "squash", mean, std, interpolation, rounded=True)
