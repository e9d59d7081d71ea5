"""VideoAlign's VideoReward (arXiv:2501.13918): visual quality, motion quality and text alignment of a clip.

A Qwen2-VL-2B with LoRA and a linear head, read at three tokens of its prompt.
"""

from __future__ import annotations

import ast
import math
import string
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dancegrpo.errors import RewardError
from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import NOT_FINITE, Scores, as_media, describe
from dancegrpo.rewards.clip import EMPTY_PROMPT
from dancegrpo.rewards.qwen2_vl import (
    MIN_PIXELS,
    RESERVED_TOKEN,
    chat_inputs,
    evenly_spaced_frames,
    fitted_size,
    holds_reserved_token,
    load_tokenizer,
    resize_frames,
)
from dancegrpo.rewards.video_align_weights import DIMENSIONS, find_checkpoint, load_network, read_settings
from dancegrpo.rewards.weights import NetworkReward, check_placement, check_source

HUB_MODEL = "KwaiVGI/VideoReward"
"""Hub repository of the published checkpoint."""
REWARD_TOKENS = tuple(f"<|{dimension}_reward|>" for dimension in DIMENSIONS)
"""Where the prompt is read, in the order of `DIMENSIONS`."""


class VideoAlignReward(NetworkReward):
    """VideoReward: a weighted sum of a clip's visual quality, motion quality and text alignment.

    clip_fps: frames per second of the clips that are judged. model: folder or hub id of the checkpoint
    (`model_config.json`, and `model.pth` or the adapter's files, there or in its latest `checkpoint-*`).
    base: folder or hub id of the Qwen2-VL it was trained from; None = as `model_config.json` says.
    template: the published `prompt_template.py`, which is read, never run, or a text file of the one prompt; None =
    `prompt_template.py` in the checkpoint's folder. dimensions: of VQ, MQ and TA those to sum, or a mapping from them
    to weights. normalized: z-scores by the checkpoint's mean and deviation; False = the head's own values.
    positions: `sequential` counts a clip's tokens as the published code does; `mrope` gives them Qwen2-VL's own
    positions by time, row and column. sample_fps, max_pixels: None = the checkpoint's own. min_pixels: smaller frames
    are enlarged. batch_size, dtype, device: as in `NetworkReward`. `extra` has VQ, MQ and TA. Gradients flow.
    Raises RewardError for options, settings, a template or weights that are missing or do not fit.
    """

    name = "videoalign"
    differentiable = True

    def __init__(
        self,
        clip_fps: float,
        model: str | Path = HUB_MODEL,
        base: str | Path | None = None,
        template: str | Path | None = None,
        dimensions: Sequence[str] | Mapping[str, float] = DIMENSIONS,
        normalized: bool = True,
        positions: str = "sequential",
        sample_fps: float | None = None,
        max_pixels: int | None = None,
        min_pixels: int = MIN_PIXELS,
        batch_size: int = 4,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        check_placement(self.name, batch_size, dtype)
        self.weights = _weights(dimensions)
        if positions not in ("sequential", "mrope"):
            raise RewardError(f"positions={positions!r} of the videoalign judge is unknown: use sequential or mrope.")
        root, folder = find_checkpoint(model)
        settings = read_settings(root)
        self.clip_fps = _positive("clip_fps", clip_fps)
        self.sample_fps = _positive("sample_fps", settings.sample_fps if sample_fps is None else sample_fps)
        self.num_frames = settings.num_frames if sample_fps is None else None
        self.max_pixels = int(_positive("max_pixels", settings.max_pixels if max_pixels is None else max_pixels))
        self.min_pixels = int(_positive("min_pixels", min_pixels))
        self.template = read_template(root / "prompt_template.py" if template is None else template)
        self.calibration = settings.calibration if normalized else dict.fromkeys(DIMENSIONS, (0.0, 1.0))
        self.positions = positions
        if self.min_pixels > self.max_pixels:
            raise RewardError(
                f"min_pixels={self.min_pixels} of the videoalign judge is above max_pixels={self.max_pixels}: lower it."
            )
        source = check_source(self.name, base or settings.base, option="base")
        self.tokenizer = load_tokenizer(self.name, source, "base", REWARD_TOKENS)
        self.reward_ids = self.tokenizer.convert_tokens_to_ids(list(REWARD_TOKENS))
        network = load_network(folder, settings, source, vocabulary=len(self.tokenizer))
        super().__init__(network, batch_size=batch_size, dtype=dtype, device=device)

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score B clips, media (B, F, 3, H, W) with F of 2 or more."""
        clips = self.frames(as_media(media).to(self.device))
        reserved = [holds_reserved_token(self.tokenizer, prompt.text) for prompt in prompts]
        # A prompt that would add tokens to the chat is not shown: it could move the places that are read.
        texts = ["" if hidden else prompt.text for prompt, hidden in zip(prompts, reserved, strict=True)]
        dimensions = self.judge(clips, texts).to(media.device)
        values = dimensions @ dimensions.new_tensor([self.weights.get(name, 0.0) for name in DIMENSIONS])
        empty = torch.tensor([not prompt.text.strip() for prompt in prompts], device=media.device)
        scores = Scores(values, torch.ones_like(empty)).mask(empty, EMPTY_PROMPT)
        scores = scores.mask(torch.tensor(reserved, device=media.device), RESERVED_TOKEN)
        scores = scores.mask(~dimensions.isfinite().all(1), NOT_FINITE)
        extra = torch.where(scores.valid[:, None], dimensions, torch.nan)
        return Scores(scores.values, scores.valid, dict(zip(DIMENSIONS, extra.T, strict=True)), scores.causes)

    def frames(self, clips: Tensor) -> Tensor:
        """The frames that are shown, resized: (B, F, 3, H, W) -> (B, n, 3, h, w) float32 in [0, 1]."""
        indices = evenly_spaced_frames(clips.shape[1], self.clip_fps, self.sample_fps, self.num_frames)
        vision = self.model.model.config.vision_config
        multiple = vision.patch_size * vision.spatial_merge_size
        height, width = clips.shape[-2:]
        height, width = fitted_size(height, width, self.min_pixels, self.max_pixels, multiple)
        return resize_frames(clips[:, indices.to(clips.device)], height, width)

    def judge(self, clips: Tensor, texts: Sequence[str]) -> Tensor:
        """(B, 3) float32: VQ, MQ and TA of B clips of prepared frames, normalised where the recipe says so."""
        chats = [self.template.format(text_prompt=text) for text in texts]
        inputs = chat_inputs(self.tokenizer, self.model.model.config, clips, chats)
        places = torch.stack([(inputs["input_ids"] == token).int().argmax(1) for token in self.reward_ids], dim=1)
        if self.positions == "sequential":
            length = inputs["input_ids"].shape[1]
            inputs["position_ids"] = torch.arange(length, device=clips.device).expand(len(clips), -1)
        at_tokens = self.model(places, **inputs).float()
        # A head of three has one output per dimension, a head of one tells the dimension by the token it is read at.
        values = at_tokens.diagonal(dim1=1, dim2=2) if at_tokens.shape[-1] == 3 else at_tokens[..., 0]
        mean, deviation = values.new_tensor([self.calibration[name] for name in DIMENSIONS]).T
        return (values - mean) / deviation


def read_template(path: str | Path) -> str:
    """The prompt template: the text with the three reward tokens and {text_prompt}, each once, in a file.

    A `.py` file is parsed, never run: its constants at the top level are looked through. Raises RewardError for a file
    that is missing or holds no such text, or several.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        texts = _string_constants(text) if path.suffix == ".py" else [text]
    except (OSError, ValueError, SyntaxError) as error:
        raise RewardError(
            f"template {str(path)!r} cannot be read: {describe(error)}; give prompt_template.py of KwaiVGI/VideoAlign."
        ) from error
    fitting = [text for text in texts if _is_template(text)]
    if len(fitting) != 1:
        raise RewardError(
            f"template {str(path)!r} holds {len(fitting)} texts with {{text_prompt}} and {' '.join(REWARD_TOKENS)}: "
            "give a file with one."
        )
    return fitting[0]


def _string_constants(source: str) -> list[str]:
    """The strings assigned to names at the top level of a Python file."""
    values = []
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign):
            try:
                values.append(ast.literal_eval(statement.value))
            except ValueError:  # no constant
                continue
    return [value for value in values if isinstance(value, str)]


def _is_template(text: str) -> bool:
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError:
        return False
    return fields == ["text_prompt"] and all(text.count(token) == 1 for token in REWARD_TOKENS)


def _weights(dimensions: Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """Weight per dimension; RewardError for none, unknown or repeated ones, and for weights that are no numbers."""
    if isinstance(dimensions, str):
        dimensions = [dimensions]
    weights = dict(dimensions) if isinstance(dimensions, Mapping) else dict.fromkeys(dimensions, 1.0)
    numbers = all(isinstance(weight, int | float) and math.isfinite(weight) for weight in weights.values())
    if not weights or len(weights) != len(dimensions) or not set(weights) <= set(DIMENSIONS) or not numbers:
        raise RewardError(
            f"dimensions={dimensions!r} of the videoalign judge cannot be summed: list each of {', '.join(DIMENSIONS)} "
            "at most once, or map them to weights."
        )
    return weights


def _positive(option: str, value: float) -> float:
    if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise RewardError(f"{option}={value!r} of the videoalign judge is not above 0: give a positive number.")
    return float(value)
