"""VisionReward for video (arXiv:2412.21059): a vision-language model answers yes/no questions, each with a weight."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dancegrpo.errors import RewardError
from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import NOT_FINITE, Scores, as_media, describe
from dancegrpo.rewards.clip import EMPTY_PROMPT
from dancegrpo.rewards.encoding import to_bytes
from dancegrpo.rewards.qwen2_vl import (
    MIN_PIXELS,
    RESERVED_TOKEN,
    chat_inputs,
    fitted_size,
    holds_reserved_token,
    load_tokenizer,
    resize_frames,
)
from dancegrpo.rewards.weights import NetworkReward, check_placement, check_source, load_pretrained

HUB_MODEL = "THUDM/VisionReward-Video"
"""Hub repository of the published network, a CogVLM2-Video that runs its repository's own code."""
PLACEHOLDER = "[[prompt]]"
"""Stands for the prompt in a question."""
NO_ANSWER = "a question got neither yes nor no"
"""Cause under which samples are counted that a network did not answer."""
MAX_FRAMES = 24
"""Frames that are shown at most, one per second."""


class Reader(Protocol):
    """A network with what it needs to read a clip and a question."""

    model: Any
    tokenizer: Any

    def next_logits(self, clips: Tensor, questions: Sequence[str]) -> Tensor:
        """(B, V) logits of the first token of the answer. clips: (B, n, 3, H, W) float in [0, 1]."""
        ...


class VisionRewardReward(NetworkReward):
    """VisionReward: mean over questions of the answer (yes 1, no -1) times the question's weight.

    questions: text file, one per line, `[[prompt]]` standing for the prompt. weights: JSON list of as many numbers.
    clip_fps: frames per second of the clips that are judged. model: folder or hub id of the network: a Qwen2-VL, any
    image-text model of transformers whose processor takes several pictures, or the published CogVLM2-Video.
    trust_remote_code: runs the Python code in the model's repository, which the published network needs.
    answer: `greedy` takes the likeliest next token as the published code does, and leaves a sample without a score
    where one is neither yes nor no; `compare` takes yes or no, whichever is likelier. max_frames: one per second.
    min_pixels, max_pixels: area of a frame for Qwen2-VL. batch_size, dtype, device: as in `NetworkReward`.
    Raises RewardError for files, options or weights that are missing or do not fit.
    """

    name = "visionreward"
    differentiable = False

    def __init__(
        self,
        questions: str | Path,
        weights: str | Path,
        clip_fps: float,
        model: str | Path = HUB_MODEL,
        trust_remote_code: bool = False,
        answer: str = "greedy",
        max_frames: int = MAX_FRAMES,
        min_pixels: int = MIN_PIXELS,
        max_pixels: int = 200704,
        batch_size: int = 1,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        check_placement(self.name, batch_size, dtype)
        if answer not in ("greedy", "compare"):
            raise RewardError(f"answer={answer!r} of the visionreward judge is unknown: use greedy or compare.")
        for option, value in {"clip_fps": clip_fps, "max_frames": max_frames, "min_pixels": min_pixels}.items():
            if not value > 0 or not math.isfinite(value):
                raise RewardError(f"{option}={value!r} of the visionreward judge is not above 0: give a number above.")
        if min_pixels > max_pixels:
            raise RewardError(f"min_pixels={min_pixels} of the visionreward judge is above max_pixels={max_pixels}.")
        self.questions, self.weights = read_questions(questions, weights)
        self.clip_fps, self.max_frames, self.answer = clip_fps, max_frames, answer
        source = check_source(self.name, model, option="model")
        self.reader = load_reader(source, trust_remote_code, min_pixels, max_pixels)
        self.yes, self.no = answer_tokens(self.reader.tokenizer, source)
        super().__init__(self.reader.model, batch_size=batch_size, dtype=dtype, device=device)

    @torch.no_grad()
    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score B clips, media (B, F, 3, H, W)."""
        clips = as_media(media)
        clips = clips[:, frames_per_second(clips.shape[1], self.clip_fps, self.max_frames)].to(self.device)
        reserved = [holds_reserved_token(self.reader.tokenizer, prompt.text) for prompt in prompts]
        # A prompt that would add tokens to the chat is not shown; its sample gets no score.
        texts = ["" if hidden else prompt.text for prompt, hidden in zip(prompts, reserved, strict=True)]
        asked = ([question.replace(PLACEHOLDER, text) for text in texts] for question in self.questions)
        answers = torch.stack([self.answers(clips, questions) for questions in asked], dim=1).to(media.device)
        values = (answers * answers.new_tensor(self.weights)).mean(1)
        empty = torch.tensor([not prompt.text.strip() for prompt in prompts], device=media.device)
        scores = Scores(values, torch.ones_like(empty)).mask(empty, EMPTY_PROMPT)
        scores = scores.mask(torch.tensor(reserved, device=media.device), RESERVED_TOKEN)
        return scores.mask(answers.isnan().any(1), NO_ANSWER).mask(~values.isfinite(), NOT_FINITE)

    def answers(self, clips: Tensor, questions: Sequence[str]) -> Tensor:
        """(B,) float32 answers to one question per clip: 1 yes, -1 no, NaN where there is none."""
        return read_answers(self.reader.next_logits(clips, questions).float(), self.yes, self.no, self.answer)


def read_answers(logits: Tensor, yes: Sequence[int], no: Sequence[int], answer: str) -> Tensor:
    """(B,) float32 of 1 (yes), -1 (no) or NaN (neither) from the answer's first token. logits: (B, V).

    yes, no: ids of the tokens that mean either. answer: `greedy` or `compare`.
    """
    finite = logits.isfinite().all(1)
    if answer == "compare":
        said = logits[:, list(yes)].logsumexp(1) > logits[:, list(no)].logsumexp(1)
        return torch.where(finite, torch.where(said, 1.0, -1.0), torch.nan)
    token = logits.argmax(1, keepdim=True)
    of_yes, of_no = ((token == token.new_tensor(list(ids))).any(1) for ids in (yes, no))
    return torch.where(of_yes & finite, 1.0, torch.where(of_no & finite, -1.0, torch.nan))


def answer_tokens(tokenizer: Any, source: str) -> tuple[list[int], list[int]]:
    """Ids of the single tokens that mean yes and no: in lower case or capitalised, with or without a space before."""
    ids: list[list[int]] = []
    for word in ("yes", "no"):
        spellings = [tokenizer.encode(s, add_special_tokens=False) for s in (word, word.title(), f" {word}")]
        spellings.append(tokenizer.encode(f" {word.title()}", add_special_tokens=False))
        ids.append(sorted({tokens[0] for tokens in spellings if len(tokens) == 1}))
    if not ids[0] or not ids[1] or set(ids[0]) & set(ids[1]):
        raise RewardError(f"model={source!r} has no single tokens for yes and for no: use another tokenizer.")
    return ids[0], ids[1]


def frames_per_second(total: int, clip_fps: float, limit: int = MAX_FRAMES) -> list[int]:
    """Indices of the frames nearest to seconds 0, 1, 2, ... of a clip of `total` frames, at most `limit`.

    clip_fps: frames per second; frame i is shown at second i / clip_fps, and the earlier of two equally near is taken.
    """
    times = torch.arange(total, dtype=torch.float64) / clip_fps
    seconds = min(round(times[-1].item()) + 1, limit)
    return [int((times - second).abs().argmin()) for second in range(seconds)]


def read_questions(questions: str | Path, weights: str | Path) -> tuple[list[str], list[float]]:
    """The questions, one per line of a text file, and the weights, a JSON list: as many finite numbers."""
    try:
        # Line ends stay: the published code asks with them.
        lines = Path(questions).read_text(encoding="utf-8").splitlines(keepends=True)
        numbers = json.loads(Path(weights).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RewardError(
            f"questions {str(questions)!r} or weights {str(weights)!r} cannot be read: {describe(error)}; "
            "give the files published with VisionReward."
        ) from error
    asked = [line for line in lines if line.strip()]
    if not isinstance(numbers, list) or not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
        raise RewardError(f"weights {str(weights)!r} are no JSON list of numbers: give one per question.")
    if not asked or len(asked) != len(numbers):
        raise RewardError(f"{len(asked)} questions have {len(numbers)} weights: give one weight per question.")
    return asked, [float(number) for number in numbers]


def load_reader(source: str, trust_remote_code: bool, min_pixels: int, max_pixels: int) -> Reader:
    """The network of a folder or hub id, loaded strictly, by its kind."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:
        remedy = "" if trust_remote_code else ", or set trust_remote_code: true to run the code of its repository"
        raise RewardError(
            f"model={source!r} cannot be loaded: {describe(error)}; give a full folder{remedy}."
        ) from error
    if config.model_type == "qwen2_vl":
        return Qwen2VLReader(source, min_pixels, max_pixels)
    if trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return HubCodeReader(source)
    return ProcessorReader(source)


class Qwen2VLReader:
    """Qwen2-VL, which sees the clip as a video."""

    def __init__(self, source: str, min_pixels: int, max_pixels: int) -> None:
        from transformers import Qwen2VLForConditionalGeneration

        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.tokenizer = load_tokenizer("visionreward", source, "model")
        self.model = load_pretrained(Qwen2VLForConditionalGeneration, source, judge="visionreward")

    def next_logits(self, clips: Tensor, questions: Sequence[str]) -> Tensor:
        """As `Reader` says."""
        vision = self.model.config.vision_config
        multiple = vision.patch_size * vision.spatial_merge_size
        height, width = clips.shape[-2:]
        height, width = fitted_size(height, width, self.min_pixels, self.max_pixels, multiple)
        inputs = chat_inputs(self.tokenizer, self.model.config, resize_frames(clips, height, width), questions)
        return _last_logits(self.model, inputs)


class ProcessorReader:
    """An image-text model of transformers, which sees the frames as so many pictures before the question."""

    def __init__(self, source: str) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        own: Any = {"judge": "visionreward", "trust_remote_code": False}
        self.model = load_pretrained(AutoModelForImageTextToText, source, **own)
        try:
            self.processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
            # Padding behind the question moves no token of it.
            self.processor.tokenizer.padding_side = "right"
        except Exception as error:
            raise RewardError(f"model={source!r} has no processor: {describe(error)}; give a full folder.") from error
        self.tokenizer = self.processor.tokenizer

    def next_logits(self, clips: Tensor, questions: Sequence[str]) -> Tensor:
        """As `Reader` says."""
        from PIL import Image

        frames = [[Image.fromarray(frame) for frame in clip] for clip in to_bytes(clips)]
        content: list[dict[str, str]] = [{"type": "image"}] * clips.shape[1]
        chats = [[{"role": "user", "content": [*content, {"type": "text", "text": asked}]}] for asked in questions]
        texts = [self.processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        inputs = self.processor(images=frames, text=texts, padding=True, return_tensors="pt")
        return _last_logits(self.model, dict(inputs.to(clips.device)))


class HubCodeReader:
    """CogVLM2-Video, whose repository's own code turns a clip and a question into its inputs. One clip at a time."""

    def __init__(self, source: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = load_pretrained(AutoModelForCausalLM, source, judge="visionreward", trust_remote_code=True)
        self.tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
        if not hasattr(self.model, "build_conversation_input_ids"):
            raise RewardError(f"model={source!r} has no build_conversation_input_ids: give a CogVLM2-Video.")

    def next_logits(self, clips: Tensor, questions: Sequence[str]) -> Tensor:
        """As `Reader` says."""
        return torch.cat([self._one(clip, question) for clip, question in zip(clips, questions, strict=True)])

    def _one(self, clip: Tensor, question: str) -> Tensor:
        video = torch.from_numpy(to_bytes(clip)).permute(3, 0, 1, 2)  # (3, F, H, W)
        built = self.model.build_conversation_input_ids(
            tokenizer=self.tokenizer, query=question, images=[video], history=[], template_version="chat"
        )
        names = ("input_ids", "token_type_ids", "attention_mask")
        inputs: dict[str, Any] = {name: built[name][None].to(clip.device) for name in names}
        inputs["images"] = [[built["images"][0].to(clip.device, self.model.dtype)]]
        return self.model(**inputs, use_cache=False).logits[:, -1]


def _last_logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(B, V) logits after each row's last token. inputs: padded on the right."""
    floats = {name: t.to(model.dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    logits = model(**floats, use_cache=False).logits
    last = inputs["attention_mask"].sum(1) - 1
    return logits[torch.arange(len(last), device=last.device), last]
