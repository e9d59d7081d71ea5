"""Judges with weights: where their files come from, that they fit to the last tensor, and where they run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from dancegrpo.errors import RewardError
from dancegrpo.rewards.base import describe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The number formats a judge's network may run in, by the names recipes use."""


class NetworkReward:
    """What every judge with a network shares: its place, its number format and how much it takes at once.

    model: the network, frozen. batch_size: samples per forward pass. dtype: of the network, a key of `DTYPES`; what
    surrounds it (preprocessing, cosines) stays in float32. device: pins the judge to a device of its own; None = it
    goes where the run's panel goes. full_precision: a part of the network, by name, whose weights stay in float32.
    Raises RewardError for a batch size or dtype that cannot be.
    """

    name: str

    def __init__(
        self,
        model: nn.Module,
        *,
        batch_size: int,
        dtype: str = "float32",
        device: str | None = None,
        full_precision: str | None = None,
    ) -> None:
        check_placement(self.name, batch_size, dtype)
        self.batch_size: int | None = batch_size
        self.pinned = device is not None
        self.device = torch.device(device or "cpu")
        for name, parameter in model.named_parameters():
            # Weights alone: buffers such as rotary frequencies lose their meaning in 16 bits.
            if full_precision is None or not name.startswith(f"{full_precision}."):
                parameter.data = parameter.data.to(DTYPES[dtype])
        self.model: Any = model.to(self.device).requires_grad_(False).eval()

    def to(self, device: Any) -> Self:
        """Move the network, unless the recipe pinned it to a device."""
        if not self.pinned:
            self.device = torch.device(device)
            self.model.to(self.device)
        return self


def check_placement(judge: str, batch_size: int, dtype: str) -> None:
    """Refuse, before anything is loaded, settings that a `NetworkReward` would refuse."""
    if dtype not in DTYPES:
        raise RewardError(f"dtype={dtype!r} of the {judge} judge is unknown: use {', '.join(DTYPES)}.")
    if batch_size < 1:
        raise RewardError(f"batch_size={batch_size} of the {judge} judge is no batch: use 1 or more.")


def best_device() -> str:
    """The accelerator where there is one, else the CPU."""
    return str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"


def shipped(source: str | Path | None) -> Path | None:
    """The folder of a learned judge that comes with the package, by its name; None for any other source."""
    from dancegrpo.shapes import JUDGES, judge_path

    return judge_path(str(source)) if str(source) in JUDGES else None


def fetch(repository: str, filename: str, *, option: str = "weights") -> Path:
    """A file of a hub repository, from the cache or fetched once. `option`: what the user can set to a local path."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, filename))
    except Exception as error:
        remedy = f"give its path as the option `{option}`"
        raise RewardError(f"{filename} cannot be fetched from {repository}: {describe(error)}; {remedy}.") from error


def check_source(judge: str, source: str | Path, *, option: str) -> str:
    """The name of an existing folder or of a hub id (`owner/name`); RewardError for anything else."""
    name = str(source)
    if not Path(name).is_dir() and (Path(name).is_absolute() or name.count("/") != 1 or name.startswith((".", "~"))):
        raise RewardError(f"{option}={name!r} of the {judge} judge is neither a folder nor a hub id: give one of them.")
    return name


def load_pretrained(cls: Any, source: str, *, judge: str, option: str = "model", **arguments: Any) -> Any:
    """`cls.from_pretrained(source)` of a transformers model, held to every tensor: nothing missing, extra, misshapen.

    Raises RewardError naming the first tensors that do not fit, and for a folder or repository that cannot be read.
    """
    try:
        # Misshapen tensors must come back by name, where the library's own error names none.
        strict = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, found = cls.from_pretrained(source, **strict, **arguments)
    except Exception as error:
        raise RewardError(
            f"{option}={source!r} of the {judge} judge cannot be loaded: {describe(error)}; give a complete folder."
        ) from error
    wrong = [f"{key} is missing" for key in sorted(found["missing_keys"])]
    wrong += [f"{key} is extra" for key in sorted(found["unexpected_keys"])]
    wrong += [f"{key} is {tuple(held)}, not {tuple(asked)}" for key, held, asked in sorted(found["mismatched_keys"])]
    refuse(source, wrong)
    return model


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` or `torch.save` file by name, those under `state_dict` where it has that key.

    Never unpickles objects. Raises RewardError for a file that is missing, unreadable or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise RewardError(f"weights {str(path)!r} do not exist: give the path of a checkpoint file.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded: Any = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise RewardError(f"weights {str(path)!r} cannot be read: {describe(error)}; fetch the file again.") from error
    tensors = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else None
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise RewardError(f"weights {str(path)!r} hold no tensors by name: give a published checkpoint.")
    return dict(tensors)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint's folder. Raises RewardError for a file that is missing or holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RewardError(f"{str(path)!r} cannot be read: {describe(error)}; give a complete folder.") from error
    if not isinstance(content, dict):
        raise RewardError(f"{str(path)!r} holds a {type(content).__name__}: it must be a JSON object of settings.")
    return content


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], path: str | Path) -> None:
    """Refuse a checkpoint with a tensor missing, extra, misshapen or not of floats, by name.

    expected: every name with its shape.
    """
    wrong = [f"{key} is missing" for key in expected if key not in tensors]
    wrong += [f"{key} is extra" for key in tensors if key not in expected]
    wrong += [
        f"{key} is {tuple(tensors[key].shape)}, not {shape}"
        for key, shape in expected.items()
        if key in tensors and tuple(tensors[key].shape) != tuple(shape)
    ]
    wrong += [
        f"{key} is {tensor.dtype}, not floats" for key, tensor in tensors.items() if not tensor.is_floating_point()
    ]
    refuse(path, wrong)


def refuse(source: str | Path, wrong: list[str]) -> None:
    """Raise RewardError with the first of what is wrong, if anything is."""
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise RewardError(f"weights {str(source)!r} do not fit: {'; '.join(wrong[:3])}{more}. Give the published file.")
