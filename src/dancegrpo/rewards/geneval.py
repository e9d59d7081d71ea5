"""GenEval (arXiv:2310.11513): does a picture show the objects, counts, colors and positions that its prompt names?

A detector finds the objects, CLIP names their colors, and `geneval_rule` decides. The published evaluation's detector
needs mmdet 2; this one is the same architecture from transformers with other weights, so its scores are not comparable
to published ones to the last percent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dancegrpo.errors import RewardError
from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import Scores, as_pictures, describe
from dancegrpo.rewards.clip import TextFeatures, image_features, load_tokenizer, text_features
from dancegrpo.rewards.encoding import to_bytes
from dancegrpo.rewards.geneval_rule import COLORS, COUNTING, Detection, Task, Verdict, judge, read_task
from dancegrpo.rewards.panel import BAD_MEDIA
from dancegrpo.rewards.weights import NetworkReward, check_placement, check_source, load_pretrained

HUB_DETECTOR = "facebook/mask2former-swin-small-coco-instance"
HUB_CLIP = "openai/clip-vit-large-patch14"
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
"""What CLIP compares an object with, for each color; their features are averaged."""
BACKGROUND = 0x99
"""Grey level that hides what is not the object."""
MAX_INSTANCES = 100
"""Most certain (query, class) pairs of a picture that become objects."""
SYNONYMS = {
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
}
"""Names that COCO's classes go by in checkpoints -> GenEval's."""
NOT_DETECTED = "the detector's output is not finite"
NOT_CLASSIFIED = "the color classifier's output is not finite"


class GenEvalReward(NetworkReward):
    """GenEval: 1 where the picture shows all that the prompt's metadata ask for, else 0. Takes pictures.

    detector: folder or hub id of a Mask2Former for instances of COCO's classes. clip: folder or hub id of a CLIP with
    its tokenizer and preprocessor. threshold, counting_threshold: score in [0, 1) above which an object counts, the
    second in the counting task. max_objects: of each class, at least 1. partial: give `geneval_rule`'s graded credit
    instead of 0/1; `extra["pass"]` is 0/1 in either case.
    batch_size, dtype, device: as in `NetworkReward`. The published values of all but the checkpoints are the defaults.
    Prompts without GenEval's metadata, or with a class that the detector does not know, are masked.
    Raises RewardError for weights that are missing or do not fit and for settings that cannot be.
    """

    name = "geneval"
    differentiable = False
    pictures_only = True

    def __init__(
        self,
        detector: str | Path = HUB_DETECTOR,
        clip: str | Path = HUB_CLIP,
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        max_objects: int = 16,
        partial: bool = False,
        batch_size: int = 8,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        check_placement(self.name, batch_size, dtype)
        for option, value in {"threshold": threshold, "counting_threshold": counting_threshold}.items():
            if not 0 <= value < 1:
                raise RewardError(f"{option}={value} of the geneval judge is no score: use 0 or more, less than 1.")
        if max_objects < 1:
            raise RewardError(f"max_objects={max_objects} of the geneval judge finds nothing: use 1 or more.")
        self.threshold, self.counting_threshold = threshold, counting_threshold
        self.max_objects, self.partial = max_objects, partial
        finder, self.detector_processor = _load_detector(check_source(self.name, detector, option="detector"))
        matcher, self.clip_processor, self.tokenizer = _load_clip(check_source(self.name, clip, option="clip"))
        networks = nn.ModuleDict({"detector": finder, "clip": matcher})
        super().__init__(networks, batch_size=batch_size, dtype=dtype, device=device)
        self.classes = {SYNONYMS.get(name, name): index for index, name in finder.config.id2label.items()}
        self.text_features = TextFeatures(self._encode_text)

    @torch.no_grad()
    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score B pictures, media (B, 1, 3, H, W); they are rounded to bytes, as files hold them."""
        pictures = as_pictures(media).detach().float()
        usable = ((pictures >= 0) & (pictures <= 1)).flatten(1).all(1).tolist()
        tasks = [self._task(prompt) if good else BAD_MEDIA for prompt, good in zip(prompts, usable, strict=True)]
        told: list[Verdict | str] = [task if isinstance(task, str) else "" for task in tasks]
        chosen = {index: task for index, task in enumerate(tasks) if isinstance(task, Task)}
        if chosen:
            # Bytes, whatever the float: a picture scores the same before and after it was saved.
            images = to_bytes(pictures[list(chosen)])
            for (index, task), image, found in zip(chosen.items(), images, self._detect(images), strict=True):
                told[index] = self._verdict(task, image, found)
        return self._scores(told, media.device)

    def colors(self, image: NDArray[np.uint8], name: str, found: Sequence[Detection]) -> list[str]:
        """The color of each object of a class, by CLIP without training. image: (H, W, 3)."""
        if not found:
            return []
        crops = [object_crop(image, detection) for detection in found]
        pixels = self.clip_processor(images=crops, return_tensors="pt")["pixel_values"]
        similarity = image_features(self.model["clip"], pixels.to(self.device)) @ self._classifier(name).T
        if not similarity.isfinite().all():
            raise _UnscoredError(NOT_CLASSIFIED)
        return [COLORS[index] for index in similarity.argmax(-1).tolist()]

    def _task(self, prompt: Prompt) -> Task | str:
        """What is asked for, or why that cannot be judged."""
        try:
            task = read_task(prompt.metadata)
        except ValueError as error:
            return str(error)
        unknown = sorted(task.names - self.classes.keys())
        return f"the detector knows no class {unknown[0]!r}" if unknown else task

    def _detect(self, images: NDArray[np.uint8]) -> list[Output]:
        """The detector's word on each of N equal pictures (N, H, W, 3)."""
        inputs = self.detector_processor(images=list(images), input_data_format="channels_last", return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.device, self.model["detector"].dtype)
        output = self.model["detector"](pixel_values=pixels)
        sizes = (tuple(pixels.shape[-2:]), images.shape[1:3])
        pairs = zip(output.class_queries_logits.float(), output.masks_queries_logits.float(), strict=True)
        return [Output(classes, masks, sizes) for classes, masks in pairs]

    def _verdict(self, task: Task, image: NDArray[np.uint8], output: Output) -> Verdict | str:
        if not (output.class_logits.isfinite().all() and output.mask_logits.isfinite().all()):
            return NOT_DETECTED
        threshold = self.counting_threshold if task.tag == COUNTING else self.threshold
        wanted = {self.classes[name]: name for name in task.names}
        found = instances(output, wanted, threshold, self.max_objects)
        try:
            return judge(task, found, lambda name, objects: self.colors(image, name, objects))
        except _UnscoredError as error:
            return str(error)

    def _scores(self, told: Sequence[Verdict | str], device: torch.device) -> Scores:
        valid = torch.tensor([isinstance(one, Verdict) for one in told], dtype=torch.bool, device=device)
        passed = [float(one.correct) if isinstance(one, Verdict) else torch.nan for one in told]
        credit = [one.credit if isinstance(one, Verdict) else torch.nan for one in told]
        values = torch.tensor(credit if self.partial else passed, dtype=torch.float32, device=device)
        extra = {"pass": torch.tensor(passed, dtype=torch.float32, device=device)}
        return Scores(values, valid, extra, dict(Counter(one for one in told if isinstance(one, str))))

    def _classifier(self, name: str) -> Tensor:
        """(10, D): for each color the mean of the templates' features, of unit length."""
        texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
        features = self.text_features(texts).to(self.device)
        return F.normalize(features.view(len(COLORS), len(TEMPLATES), -1).mean(1), dim=-1)

    def _encode_text(self, text: str) -> Tensor:
        clip = self.model["clip"]
        context = clip.config.text_config.max_position_embeddings
        tokens = self.tokenizer([text], padding="max_length", truncation=True, max_length=context, return_tensors="pt")
        return text_features(clip, tokens["input_ids"].to(self.device))[0].cpu()


class _UnscoredError(Exception):
    """A sample that gets no score; the message is the cause it is counted under."""


@dataclass(frozen=True, eq=False)
class Output:
    """A Mask2Former's output for one picture.

    class_logits: (Q, C + 1), the last for no object. mask_logits: (Q, h, w). sizes: (height, width) of the network's
    input and of the picture, to which masks are scaled in turn.
    """

    class_logits: Tensor
    mask_logits: Tensor
    sizes: tuple[tuple[int, int], tuple[int, int]]

    def mask(self, query: int) -> Tensor:
        """A query's mask logits (H, W) in the picture."""
        logits = self.mask_logits[query][None, None]
        for size in self.sizes:
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return logits[0, 0]


def instances(
    output: Output, wanted: Mapping[int, str], threshold: float, max_objects: int
) -> dict[str, list[Detection]]:
    """A Mask2Former's output (arXiv:2112.01527) as objects, by class name, most certain first.

    wanted: class index -> name; other classes are left out. The `MAX_INSTANCES` most probable pairs of query and class
    are objects; one's score is that probability times the mean of its mask's probabilities above 1/2. Kept are scores
    above `threshold`, at most `max_objects` of each class. Overlapping objects stay.
    """
    probability = output.class_logits.softmax(-1)[:, :-1]
    top, flat = probability.flatten().topk(min(MAX_INSTANCES, probability.numel()))
    found: dict[str, list[Detection]] = {name: [] for name in wanted.values()}
    for certainty, place in zip(top.tolist(), flat.tolist(), strict=True):
        query, label = divmod(place, probability.shape[1])
        # The mask can only lower the score, so most pairs need no look at theirs.
        if label not in wanted or certainty <= threshold:
            continue
        logits = output.mask(query)
        mask = logits > 0
        if not mask.any():
            continue
        score = certainty * logits[mask].sigmoid().mean().item()
        if score > threshold:
            found[wanted[label]].append(Detection(_box(mask), score, mask.cpu().numpy()))
    return {name: sorted(these, key=lambda one: -one.score)[:max_objects] for name, these in found.items()}


def object_crop(image: NDArray[np.uint8], detection: Detection) -> Any:
    """The object alone, before grey, cut to its box: picture (H, W, 3) -> PIL image."""
    from PIL import Image

    if detection.mask is not None:
        image = np.where(detection.mask[..., None], image, np.uint8(BACKGROUND))
    left, top, right, bottom = (round(end) for end in detection.box)
    return Image.fromarray(image).crop((left, top, right, bottom))


def _box(mask: Tensor) -> tuple[float, float, float, float]:
    columns, rows = mask.any(0).nonzero()[:, 0].tolist(), mask.any(1).nonzero()[:, 0].tolist()
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _load_detector(source: str) -> tuple[Any, Any]:
    from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil

    class Detector(Mask2FormerForUniversalSegmentation):
        # The training loss's class weights: a checkpoint is complete without them.
        _keys_to_ignore_on_load_missing = (r"^criterion\.",)
        # A table that older checkpoints hold and newer code computes.
        _keys_to_ignore_on_load_unexpected = (r"\.relative_position_index$",)

    processor = _load_processor(Mask2FormerImageProcessorPil, source, "detector")
    # A batch's pictures are of one size: nothing is padded, so a mask covers its picture.
    processor.pad_size = None
    return load_pretrained(Detector, source, judge=GenEvalReward.name, option="detector"), processor


def _load_clip(source: str) -> tuple[Any, Any, Any]:
    from transformers import CLIPImageProcessorPil, CLIPModel

    processor = _load_processor(CLIPImageProcessorPil, source, "clip")
    model = load_pretrained(CLIPModel, source, judge=GenEvalReward.name, option="clip")
    tokenizer = load_tokenizer(GenEvalReward.name, source, vocabulary=model.config.text_config.vocab_size)
    return model, processor, tokenizer


def _load_processor(cls: Any, source: str, option: str) -> Any:
    try:
        return cls.from_pretrained(source)
    except Exception as error:
        raise RewardError(
            f"{option}={source!r} of the geneval judge has no preprocessor: {describe(error)}; give a complete folder."
        ) from error
