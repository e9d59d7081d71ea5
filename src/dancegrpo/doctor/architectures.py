"""The sizes of a model: from its own config files where they are here, else as shipped for the published models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from dancegrpo.errors import ModelError
from dancegrpo.policies import loading
from dancegrpo.settings import ModelConfig

FOLDER = Path(__file__).parent / "architectures"
"""One JSON file per published model, and `_parts.json` with the text encoders that several share."""


@dataclass(frozen=True)
class Part:
    """One component of a pipeline. library, cls: where its class is. config: what that class is made of."""

    library: str
    cls: str
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_network(self) -> bool:
        """Whether it has weights."""
        return not any(word in self.cls for word in ("Scheduler", "Tokenizer", "Processor", "FeatureExtractor"))


@dataclass(frozen=True)
class Architecture:
    """A pipeline's parts by name, None for those it lacks. options: its own settings. source: where this was read."""

    pipeline: str
    parts: Mapping[str, Part | None]
    options: Mapping[str, Any]
    source: str
    folder: Path | None = None
    """Where its files are, None where only the sizes are known."""


def architecture(model: ModelConfig) -> Architecture:
    """The sizes of `model.path`; looks at the disk and the hub's cache, never at the network.

    Raises ModelError for a model that is not here and whose sizes are not shipped.
    """
    folder = model_folder(model)
    if folder is not None:
        return read_folder(folder)
    name = Path(model.path).name.lower()
    for told in _shipped().values():
        if name in told["names"]:
            parts = {part: _part(entry) for part, entry in told["parts"].items()}
            return Architecture(told["pipeline"], parts, told.get("options", {}), f"those shipped of {told['title']}")
    known = ", ".join(told["title"] for told in _shipped().values())
    raise ModelError(
        f"model.path={model.path} is not here, and its sizes are not among those shipped ({known}): download it first"
    )


def model_folder(model: ModelConfig) -> Path | None:
    """The folder of a model's files: a shipped pipeline, a local folder, or a snapshot in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    try:
        folder = loading._locate(model.path)
    except ModelError:
        return None
    if folder is None:
        found = try_to_load_from_cache(model.path, "model_index.json", revision=model.revision)
        folder = Path(found).parent if isinstance(found, str) else None
    return folder if folder is not None and (folder / "model_index.json").is_file() else None


def read_folder(folder: Path) -> Architecture:
    """The sizes of a pipeline in diffusers' layout, from its JSON files alone. Raises ModelError for a damaged one."""
    index = loading._read_index(folder / "model_index.json")
    parts: dict[str, Part | None] = {}
    options: dict[str, Any] = {}
    for name, entry in index.items():
        if name.startswith("_"):
            continue
        if not isinstance(entry, list):
            options[name] = entry
        elif entry[0] is None or name == "safety_checker":
            parts[name] = None
        else:
            library = entry[0] if entry[0] in ("diffusers", "transformers") else "diffusers"
            parts[name] = Part(library, entry[1], _config(folder / name))
    options.pop("requires_safety_checker", None)
    return Architecture(str(index.get("_class_name")), parts, options, str(folder), folder)


def _config(folder: Path) -> dict[str, Any]:
    names = ("config.json", "scheduler_config.json", "tokenizer_config.json")
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        return {}
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read ({error}): copy or download the model again") from error
    if not isinstance(held, dict):
        raise ModelError(f"{file} is not a JSON object: copy or download the model again")
    return held


def shipped_names() -> list[str]:
    """The published models whose sizes come with the package, by file name."""
    return sorted(_shipped())


def shipped_architecture(name: str) -> Architecture:
    """One of `shipped_names`."""
    told = _shipped()[name]
    parts = {part: _part(entry) for part, entry in told["parts"].items()}
    return Architecture(told["pipeline"], parts, told.get("options", {}), f"those shipped of {told['title']}")


@cache
def _shipped() -> dict[str, dict[str, Any]]:
    files = sorted(path for path in FOLDER.glob("*.json") if not path.name.startswith("_"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}


@cache
def shared_parts() -> dict[str, Any]:
    """Text encoders and networks that several models have, by name."""
    told: dict[str, Any] = json.loads((FOLDER / "_parts.json").read_text(encoding="utf-8"))
    return told


def _part(entry: Any) -> Part | None:
    if entry is None:
        return None
    entry = shared_parts()[entry] if isinstance(entry, str) else entry
    return Part(entry["library"], entry["class"], entry.get("config", {}))
