"""From a name, a folder or a hub id to a policy: what is there is checked before anything large is read."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dancegrpo.dotted import import_dotted
from dancegrpo.errors import ConfigError, ModelError
from dancegrpo.policies.base import Policy
from dancegrpo.settings import ModelConfig, RolloutConfig

if TYPE_CHECKING:
    from dancegrpo.policies.pipeline import PipelinePolicy

FAMILIES = {
    "StableDiffusionPipeline": ("dancegrpo.policies.stable_diffusion", "StableDiffusionPolicy"),
    "StableDiffusionXLPipeline": ("dancegrpo.policies.stable_diffusion", "StableDiffusionXLPolicy"),
    "StableDiffusion3Pipeline": ("dancegrpo.policies.stable_diffusion_3", "StableDiffusion3Policy"),
    "FluxPipeline": ("dancegrpo.policies.flux", "FluxPolicy"),
    "QwenImagePipeline": ("dancegrpo.policies.qwen_image", "QwenImagePolicy"),
    "HunyuanVideoPipeline": ("dancegrpo.policies.hunyuan_video", "HunyuanVideoPolicy"),
    "HunyuanVideoImageToVideoPipeline": ("dancegrpo.policies.hunyuan_video", "HunyuanVideoImageToVideoPolicy"),
    "HunyuanSkyreelsImageToVideoPipeline": ("dancegrpo.policies.skyreels", "SkyreelsPolicy"),
    "WanPipeline": ("dancegrpo.policies.wan", "WanPolicy"),
    "WanImageToVideoPipeline": ("dancegrpo.policies.wan", "WanImagePolicy"),
}
"""Policy of each pipeline class, by module and name: a family's libraries load with its first model."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load_policy(model: ModelConfig, rollout: RolloutConfig, *, seed: int = 0) -> Policy:
    """The policy of `model.path`: a shipped pipeline's name, a folder in diffusers' layout, or a hub id.

    rollout fixes its schedule and sampler. seed: of the adapters' starting weights (LoRA). Raises ModelError for a
    model that is missing, damaged or of an unsupported class, ConfigError for settings its family cannot run.
    """
    family, pipeline, folder = _open(model)
    return family(pipeline, folder, model, rollout, seed)


def load_smallest(model: ModelConfig, rollout: RolloutConfig, keep: Collection[str] = ()) -> PipelinePolicy:
    """As `load_policy`, at the smallest size that its family accepts; `keep`: those of height, width and num_frames
    that stay as `model` has them.

    Two smallest squares high and three wide, and the shortest clip of more than one frame: no axis is trivial, and a
    mistaken order of axes shows.
    """
    family, pipeline, folder = _open(model)
    denoiser = next(part for name in family.denoisers if (part := getattr(pipeline, name, None)) is not None)
    refused: ConfigError | None = None
    for side in (8, 16, 32, 64, 128, 256):
        for frames in range(2, 18) if "num_frames" in family.settings else (1,):
            size = {"height": 2 * side, "width": 3 * side, "num_frames": frames}
            chosen = {name: value for name, value in size.items() if name not in keep}
            try:
                return family(pipeline, folder, model.model_copy(update=chosen), rollout)
            except ConfigError as error:
                if not next(denoiser.parameters()).requires_grad:
                    raise  # frozen already: it was not the size
                refused = error
            if "num_frames" in keep:
                break
        if {"height", "width"} <= set(keep):
            break
    assert refused is not None
    raise refused


def _open(model: ModelConfig) -> tuple[type[PipelinePolicy], Any, Path]:
    """The family of a model, its pipeline in memory, and the folder that came from."""
    folder = _locate(model.path)
    index = _read_index(folder / "model_index.json" if folder else _download_index(model))
    name = index.get("_class_name")
    family = _family(model, str(name))
    folder = folder or _download(str(name), model)
    _check_files(folder, index, family)
    return family, _load(str(name), folder, model, family), folder


def _family(model: ModelConfig, name: str) -> type[PipelinePolicy]:
    from dancegrpo.policies.pipeline import PipelinePolicy

    if model.policy is None:
        if name not in FAMILIES:
            raise ModelError(
                f"{model.path} is a {name}, which is not supported: use {', '.join(FAMILIES)}, or a policy of your own "
                "(model.policy, docs/porting.md)."
            )
        module, policy = FAMILIES[name]
        return getattr(importlib.import_module(module), policy)
    family = import_dotted(model.policy, f"model.policy={model.policy}", ConfigError)
    if not (isinstance(family, type) and issubclass(family, PipelinePolicy)):
        raise ConfigError(f"model.policy={model.policy} is no subclass of PipelinePolicy: name a class that is one.")
    return family


def _locate(path: str) -> Path | None:
    """The local folder of a path, or None where it can only be a hub id."""
    from dancegrpo.shapes import PIPELINES, base_path

    if path in PIPELINES:
        return base_path(path)
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if HUB_ID.fullmatch(path) and not path.startswith("."):
        return None
    raise ModelError(f"model.path={path} is no folder, hub id or shipped pipeline ({', '.join(PIPELINES)}).")


def _read_index(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ModelError(f"{file.parent} has no model_index.json: name a folder in diffusers' layout.")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not valid JSON ({error}): copy or download the model again.") from error
    if not isinstance(index, dict):
        raise ModelError(f"{file} is not a JSON object: copy or download the model again.")
    return index


def _check_files(folder: Path, index: dict[str, Any], family: Any) -> None:
    """Raises ModelError unless every part that the index names is there and every weight file is whole."""
    listed = {name for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None}
    listed.discard("safety_checker")  # never loaded
    # Of several networks to train, any but one may be absent: its entry is null then, or there is none.
    absent = set(family.denoisers) - listed
    components = set(family.components) - (absent if listed & set(family.denoisers) else set())
    for name in sorted(listed | components):
        part = folder / name
        if not part.is_dir():
            raise ModelError(f"{part} is missing: the model is incomplete, copy or download it again.")
        for shards in part.glob("*.index.json"):
            for shard in _shards(shards):
                if not (part / shard).is_file():
                    raise ModelError(f"{part / shard} is missing: the model is incomplete, copy or download it again.")
        weights = [*part.glob("*.safetensors"), *part.glob("*.bin")]
        if name in components and not weights:
            raise ModelError(f"{part} has no weights (*.safetensors): the model is incomplete, download it again.")
        for file in weights:
            if file.suffix == ".safetensors" and not _is_whole(file):
                raise ModelError(f"{file} is truncated or damaged: copy or download it again.")


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index} is damaged: copy or download the model again.") from error


def _is_whole(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says: an interrupted copy is not."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def _load(name: str, folder: Path, model: ModelConfig, family: Any) -> Any:
    """The pipeline in memory: trained weights float32, frozen parts in the run's dtype."""
    import diffusers
    import torch

    dtype = getattr(torch, model.dtype)
    dtypes = {"default": dtype, **dict.fromkeys(family.denoisers, dtype if model.lora else torch.float32)}
    dtypes["vae"] = dtype if model.dtype in family.vae_dtypes else torch.float32
    # Parts that the index leaves out (SD3 without T5) must be named, or diffusers asks for them.
    index = _read_index(folder / "model_index.json")
    options: dict[str, Any] = {part: None for part, entry in index.items() if entry == [None, None]}
    if name == "StableDiffusionPipeline":
        options |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        with _no_progress_bars():
            pipeline = getattr(diffusers, name).from_pretrained(folder, dtype=dtypes, local_files_only=True, **options)
    except Exception as error:  # whatever a checkpoint makes the libraries raise, it is the checkpoint
        raise ModelError(f"{folder} does not load as a {name}: {_first_line(error)}") from error
    for part, network in pipeline.components.items():
        tensors = network.named_parameters() if isinstance(network, torch.nn.Module) else ()
        absent = [weight for weight, tensor in tensors if tensor.is_meta]  # diffusers only warns of these
        if absent:
            raise ModelError(
                f"{folder / part} lacks {len(absent)} weights, {absent[0]} first: download the model again."
            )
    return pipeline


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Loading from a disk takes seconds: the libraries' bars would only break up the run's own display."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()


def _download_index(model: ModelConfig) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model.path, "model_index.json", revision=model.revision))
    except Exception as error:  # network, permission, spelling: the hub's client has a class for each
        raise ModelError(
            f"model.path={model.path} is no folder here, and the hub does not give it: {_first_line(error)}"
        ) from error


def _download(name: str, model: ModelConfig) -> Path:
    import diffusers

    options = {"safety_checker": None} if name == "StableDiffusionPipeline" else {}
    try:
        return Path(getattr(diffusers, name).download(model.path, revision=model.revision, **options))
    except Exception as error:
        raise ModelError(f"{model.path} could not be downloaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()[:300] if lines else 'no reason given'}"
