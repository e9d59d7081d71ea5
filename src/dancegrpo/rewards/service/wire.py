"""What travels between a judge's client and its server: samples as safetensors, scores as JSON. Never pickle.

A request is one safetensors file. Its tensor `media` is (B, F, 3, H, W), uint8 or float; the metadata's `request` is
JSON: `{"id": text, "prompts": [{"id", "text", "negative", "metadata", "image"}, ...]}`, one prompt per sample, of which
only `text` is required. A prompt's picture travels as the bytes of its file (a PNG where it has none), in a uint8
tensor that `image` names.
An answer is JSON: `{"id", "judge", "values", "valid", "extra", "causes"}`; a sample without a score is null.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dancegrpo.errors import PromptError
from dancegrpo.prompts import Prompt, json_value
from dancegrpo.rewards.base import Scores

if TYPE_CHECKING:
    from PIL.Image import Image

PROTOCOL = 1
"""Of requests and answers; a server and a client of different numbers do not talk."""
SAFETENSORS = "application/x-safetensors"
JSON = "application/json"
WIRE_DTYPES = {"uint8": torch.uint8, "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
"""The types media may travel in."""
_CAUSE_LENGTH = 300


class WireError(Exception):
    """A request or an answer that is not what this module describes; `status` is the HTTP status that says so."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Request:
    """Samples to score. id: the client's own mark, echoed in the answer. media: (B, F, 3, H, W), of `WIRE_DTYPES`."""

    id: str
    media: Tensor
    prompts: list[Prompt]


def compact(media: Tensor) -> Tensor:
    """The smallest type on the CPU that keeps every value: uint8 where float32 media are k/255 throughout.

    float64 becomes float32; float16 and bfloat16 stay, as a judge in this process would see them.
    """
    # On the CPU first: an accelerator may divide by multiplying with a rounded 1/255, and the server does not.
    media = media.detach().cpu()
    if media.dtype == torch.float64:
        media = media.float()
    if media.dtype != torch.float32:
        return media
    levels = media.mul(255).round_().nan_to_num_(-1).clamp_(0, 255).to(torch.uint8)
    return levels if torch.equal(levels.float() / 255, media) else media


def pack_request(identity: str, media: Tensor, prompts: Sequence[Prompt]) -> bytes:
    """A request's body. media: (B, F, 3, H, W). Raises WireError for metadata that JSON cannot hold, a lost image."""
    from safetensors.torch import save

    pictures: dict[str, bytes] = {}
    told = [
        _prompt_to_json(prompt, name) for prompt, name in zip(prompts, _name_images(prompts, pictures), strict=True)
    ]
    tensors = {"media": compact(media).contiguous()}
    for name, data in pictures.items():
        tensors[name] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    # ASCII: a prompt with half a surrogate pair is no UTF-8, but travels as an escape.
    return save(tensors, {"request": json.dumps({"id": identity, "prompts": told})})


def _name_images(prompts: Sequence[Prompt], pictures: dict[str, bytes]) -> Iterator[str | None]:
    """The name of each prompt's image, None for none; puts each image that is another one into `pictures`, once."""
    known: dict[int, str] = {}  # the prompts of a group share one image object: it is digested once
    names: dict[str, str] = {}
    for prompt in prompts:
        if prompt.image is None:
            yield None
            continue
        if id(prompt.image) not in known:
            try:
                digest = prompt.request()[2]
                name = names.setdefault(digest, f"image.{len(names)}")
                if name not in pictures:
                    pictures[name] = _image_file(prompt.image)
            except (OSError, ValueError, PromptError) as error:
                raise WireError(f"the image of prompt {prompt.id} cannot be sent: {error}") from error
            if not pictures[name]:
                raise WireError(f"the image of prompt {prompt.id} cannot be sent: {prompt.image} is empty")
            known[id(prompt.image)] = name
        yield known[id(prompt.image)]


def _image_file(image: Path | Image) -> bytes:
    """An image's file as it is; a picture in memory as PNG, upright, all its values kept where PNG knows its mode."""
    if isinstance(image, Path):
        return image.read_bytes()
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)
    buffer = io.BytesIO()
    known = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")
    (upright if upright.mode in known else upright.convert("RGB")).save(buffer, "PNG")
    return buffer.getvalue()


def _prompt_to_json(prompt: Prompt, image: str | None) -> dict[str, Any]:
    metadata = dict(prompt.metadata)
    try:
        metadata = json.loads(json.dumps(metadata, default=json_value))
    except (TypeError, ValueError, RecursionError) as error:
        raise WireError(f"the metadata of prompt {prompt.id} cannot be sent: {error}") from error
    told = {"id": prompt.id, "text": prompt.text, "negative": prompt.negative, "metadata": metadata}
    if image is not None:
        told["image"] = image
    return told


def unpack_request(body: bytes, folder: Path, max_samples: int) -> Request:
    """What `pack_request` packed; images of prompts are written into `folder`. Raises WireError for all else."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(body)
        length = struct.unpack("<Q", body[:8])[0]
        told = json.loads(json.loads(body[8 : 8 + length])["__metadata__"]["request"])
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError, struct.error) as error:
        raise WireError(
            f"the body is no request in safetensors with `request` in its metadata ({_name(error)})"
        ) from None
    if "media" not in tensors:
        raise WireError("the body has no tensor named media")
    media = check_media(tensors["media"], max_samples)
    identity, records = read_head(told, len(media))
    images = {name: tensor for name, tensor in tensors.items() if name != "media"}
    return Request(identity, media, read_prompts(records, _writer(images, folder)))


def check_media(media: Tensor, max_samples: int) -> Tensor:
    """Refuses, by WireError, media of another shape or type, and more samples than the server takes."""
    if media.dtype not in WIRE_DTYPES.values():
        raise WireError(f"media are {str(media.dtype).removeprefix('torch.')}: send {', '.join(WIRE_DTYPES)}", 422)
    if media.ndim != 5 or media.shape[2] != 3 or 0 in media.shape[1:]:
        raise WireError(f"media have shape {tuple(media.shape)}: send (samples, frames, 3, height, width)", 422)
    if len(media) > max_samples:
        raise WireError(f"{len(media)} samples came at once: send at most {max_samples}", 413)
    return media


def read_head(told: Any, samples: int | None) -> tuple[str, list[Any]]:
    """The id and the prompts' records of a request's JSON. Raises WireError where they are not as many as samples."""
    if not isinstance(told, dict) or not isinstance(told.get("prompts"), list):
        raise WireError("the request is no JSON object with a list of prompts")
    identity = told.get("id", "")
    if not isinstance(identity, str) or len(identity) > 200:
        raise WireError("the request's id is no text of at most 200 characters")
    if samples is not None and len(told["prompts"]) != samples:
        raise WireError(f"{samples} samples came with {len(told['prompts'])} prompts: send one prompt per sample", 422)
    return identity, told["prompts"]


def read_prompts(records: Sequence[Any], image: Callable[[str], Path]) -> list[Prompt]:
    """Prompts from JSON: each a text, or an object with at least `text`. `image` finds a prompt's picture by name."""
    prompts = []
    for number, record in enumerate(records):
        told = {"text": record} if isinstance(record, str) else record
        kinds = {"id": int, "text": str, "negative": str, "metadata": dict, "image": str}
        if not isinstance(told, dict) or "text" not in told:
            raise WireError(f"prompt {number} is neither a text nor an object with a text", 422)
        for key, value in told.items():
            if key not in kinds:
                raise WireError(f"prompt {number} has an unknown field: use {', '.join(kinds)}", 422)
            if not isinstance(value, kinds[key]) or isinstance(value, bool):
                raise WireError(f"prompt {number}: {key} is no {kinds[key].__name__}", 422)
        picture = image(told["image"]) if "image" in told else None
        negative, metadata = told.get("negative", ""), told.get("metadata", {})
        prompts.append(Prompt(told.get("id", number), told["text"], negative, picture, metadata))
    return prompts


def _writer(images: Mapping[str, Tensor], folder: Path) -> Callable[[str], Path]:
    """Finds the file of an image, written when first asked for, under a name of ours."""
    paths: dict[str, Path] = {}

    def path_of(name: str) -> Path:
        if name not in images or images[name].dtype != torch.uint8:
            raise WireError("a prompt names an image that did not come with it", 422)
        if name not in paths:
            paths[name] = folder / f"{len(paths)}"
            paths[name].write_bytes(images[name].numpy().tobytes())
        return paths[name]

    return path_of


def pack_answer(identity: str, judge: str, scores: Scores) -> bytes:
    """Scores as JSON; float32 survives exactly. What is not a finite number is null."""
    return json.dumps(
        {
            "id": identity,
            "judge": judge,
            "values": _to_json(torch.where(scores.valid, scores.values.float(), torch.nan)),
            "valid": scores.valid.tolist(),
            "extra": {name: _to_json(column) for name, column in scores.extra.items()},
            "causes": dict(scores.causes),
        },
        allow_nan=False,
    ).encode()


def _to_json(column: Tensor) -> list[Any]:
    column = column.detach().cpu()
    if not column.is_floating_point():
        return column.tolist()
    return [value if finite else None for value, finite in zip(column.tolist(), column.isfinite().tolist())]


def read_answer(body: bytes, identity: str, judge: str, size: int) -> Scores:
    """The scores in an answer, on the CPU. Raises WireError where it is not a whole, finite answer to this request."""
    try:
        told = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise WireError("its answer is not JSON") from None
    if not isinstance(told, dict) or not {"values", "valid"} <= told.keys():
        raise WireError("its answer holds no values")
    if told.get("judge") != judge:
        raise WireError(f"another judge answered ({shorten(told.get('judge'))!r} instead of {judge!r})")
    if told.get("id") != identity:
        raise WireError("its answer belongs to another request")
    valid = _column("valid", told["valid"], size)
    if valid.dtype != torch.bool:
        raise WireError("its answer's valid is not true or false throughout")
    values = _column("values", told["values"], size).float()
    if not values[valid].isfinite().all():
        raise WireError("its answer calls a score valid that is no finite number")
    extra = told.get("extra") or {}
    if not isinstance(extra, dict):
        raise WireError("its answer's extra is no object")
    columns = {shorten(name): _column(shorten(name), column, size) for name, column in extra.items()}
    causes = _causes(told.get("causes"), int((~valid).sum()))
    return Scores(torch.where(valid, values, torch.nan), valid, columns, causes)


def _no_constant(name: str) -> float:
    raise ValueError(name)


def _column(name: str, told: Any, size: int) -> Tensor:
    """A list of numbers or null as (size,) float32, of truth values as bool, of whole numbers as int64."""
    if not isinstance(told, list) or len(told) != size:
        count = f"{len(told)} entries" if isinstance(told, list) else "no list"
        raise WireError(f"its answer has {count} in {name} for {size} samples")
    if told and all(isinstance(entry, bool) for entry in told):
        return torch.tensor(told)
    if not all(entry is None or (isinstance(entry, (int, float)) and not isinstance(entry, bool)) for entry in told):
        raise WireError(f"its answer has something other than numbers in {name}")
    try:
        if told and all(isinstance(entry, int) for entry in told):
            return torch.tensor(told, dtype=torch.int64)
        return torch.tensor([torch.nan if entry is None else float(entry) for entry in told])
    except (OverflowError, RuntimeError):
        raise WireError(f"its answer has a number out of range in {name}") from None


def _causes(told: Any, lost: int) -> dict[str, int]:
    """Causes and their counts, as far as they make sense for `lost` masked samples; the panel counts the rest."""
    if not isinstance(told, dict):
        return {}
    causes = {
        shorten(cause): n for cause, n in told.items() if isinstance(n, int) and not isinstance(n, bool) and n > 0
    }
    return causes if sum(causes.values()) <= lost else {}


def shorten(text: Any) -> str:
    """Another machine's words as one short printable line."""
    line = " ".join(str(text).split())
    return "".join(letter if letter.isprintable() else "?" for letter in line)[:_CAUSE_LENGTH]


def _name(error: Exception) -> str:
    return type(error).__name__
