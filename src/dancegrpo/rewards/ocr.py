"""Text rendering: whether a picture shows the words its prompt puts in quotation marks (arXiv:2505.05470)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dancegrpo.errors import RewardError
from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import Scores, as_pictures, describe
from dancegrpo.rewards.encoding import to_bytes

NO_TEXT = "the prompt asks for no text in quotation marks"
"""Cause under which samples whose prompt wants nothing written are counted."""
_QUOTED = re.compile(r"\"([^\"]+)\"|“([^”]+)”|«([^»]+)»|„([^“”]+)[“”]")
_INSTALL = "pip install 'dancegrpo[ocr]'"


class OCRReward:
    """How much of the text asked for a picture shows, from 0 to 1: one minus their edit distance over its length.

    The text asked for is `prompt.metadata["text"]`, else all of the prompt that stands in double quotation marks; a
    prompt with neither has no score. Letter case and whitespace do not count. A picture that shows the text among other
    words has 1. threads: of the CPU that the OCR may use. min_confidence: of a line of text, in [0, 1]; lines below it
    are not read. reader: (H, W, 3) uint8 RGB array -> the lines it reads, in Python only; None = RapidOCR.
    Raises RewardError where the `ocr` extra is not installed, or for an option out of range.
    """

    name = "ocr"
    differentiable = False
    pictures_only = True
    batch_size: int | None = 64
    device = torch.device("cpu")

    def __init__(
        self,
        threads: int = 1,
        min_confidence: float = 0.5,
        reader: Callable[[Any], Sequence[str]] | None = None,
    ) -> None:
        if not isinstance(threads, int) or threads < 1:
            raise RewardError(f"threads={threads!r} of the ocr judge is no number of threads: use 1 or more.")
        if not 0 <= min_confidence <= 1:
            raise RewardError(f"min_confidence={min_confidence!r} of the ocr judge is out of range: use 0 to 1.")
        self.distance = _load_distance()
        self.reader = reader or RapidReader(threads, min_confidence)

    @torch.no_grad()
    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score B pictures, media (B, 1, 3, H, W)."""
        pictures = to_bytes(as_pictures(media))
        causes: Counter[str] = Counter()
        values = [self._score(picture, prompt, causes) for picture, prompt in zip(pictures, prompts, strict=True)]
        scores = torch.tensor(values, dtype=torch.float32, device=media.device)
        return Scores(scores, ~scores.isnan(), causes=dict(causes))

    def _score(self, picture: Any, prompt: Prompt, causes: Counter[str]) -> float:
        """One picture's score; NaN, and a cause, where it has none."""
        wanted = normalize_text(wanted_text(prompt))
        if not wanted:
            causes[NO_TEXT] += 1
            return float("nan")
        try:
            lines = self.reader(picture)
        except Exception as error:
            # One picture that the library stumbles over must not take its batch along.
            causes[describe(error)] += 1
            return float("nan")
        return text_score(wanted, normalize_text("".join(lines)), self.distance)

    def to(self, device: Any) -> OCRReward:
        """Nothing to move: the text is read on the CPU."""
        return self


def wanted_text(prompt: Prompt) -> str:
    """What the prompt asks to be written: `metadata["text"]`, else its parts in double quotation marks; '' for none."""
    given = prompt.metadata.get("text")
    if isinstance(given, str) and given.strip():
        return given
    return " ".join(part for match in _QUOTED.finditer(prompt.text) for part in match.groups() if part)


def normalize_text(text: str) -> str:
    """Lower case without whitespace: OCR is unsure of both."""
    return "".join(text.lower().split())


def text_score(wanted: str, read: str, distance: Callable[[str, str], int]) -> float:
    """1 - distance(read, wanted) / len(wanted), in [0, 1]; 1 where `wanted` occurs in `read` (arXiv:2505.05470).

    wanted, read: as by `normalize_text`, wanted not empty. distance: edit distance.
    """
    if wanted in read:
        return 1.0
    return 1.0 - min(distance(read, wanted), len(wanted)) / len(wanted)


class RapidReader:
    """The lines of text in a picture, top to bottom, by RapidOCR with the models in its package, on the CPU."""

    def __init__(self, threads: int, min_confidence: float) -> None:
        try:
            # RapidOCR itself looks for it at the first picture, too late to complain.
            import onnxruntime  # noqa: F401
            from rapidocr import RapidOCR
        except ImportError as error:
            raise RewardError(f"the ocr judge cannot load its OCR ({describe(error)}): {_INSTALL}.") from error
        options = {
            "Global.text_score": float(min_confidence),
            "Global.log_level": "critical",
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
        try:
            self.engine = RapidOCR(params=options)
        except Exception as error:
            raise RewardError(f"the ocr judge cannot start its OCR: {describe(error)}; {_INSTALL}.") from error

    def __call__(self, picture: Any) -> Sequence[str]:
        """Lines of an (H, W, 3) uint8 RGB array."""
        # RapidOCR takes arrays in OpenCV's order of channels, blue first.
        found = self.engine(picture[..., ::-1].copy())
        return found.txts or ()


def _load_distance() -> Callable[[str, str], int]:
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise RewardError(f"the ocr judge cannot load rapidfuzz ({describe(error)}): {_INSTALL}.") from error
    distance: Callable[[str, str], int] = Levenshtein.distance
    return distance
