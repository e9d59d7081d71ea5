"""VideoReward's checkpoints (arXiv:2501.13918), whole or as an adapter, loaded strictly into one plain network."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dancegrpo.errors import RewardError
from dancegrpo.rewards.base import describe
from dancegrpo.rewards.weights import check_source, check_tensors, load_pretrained, read_json, read_tensors

DIMENSIONS = ("VQ", "MQ", "TA")
"""Visual quality, motion quality, text alignment: the order of the prompt's tokens and of a head of three."""
CALIBRATION = {"VQ": (3.6757, 2.2476), "MQ": (1.1646, 1.3811), "TA": (2.8105, 2.5121)}
"""Mean and standard deviation of the published head's values, for checkpoints that do not bring theirs."""
_WRAPPER = "base_model.model."
_PATTERNS = ["*.json", "*.py", "*.pth", "*.safetensors"]


@dataclass(frozen=True)
class LoRA:
    """Low-rank updates of a checkpoint: W + alpha / rank * B A (alpha / sqrt(rank) where rank_stabilized)."""

    rank: int
    alpha: float
    rank_stabilized: bool = False
    exclude: tuple[str, ...] = ()
    """Parts of module names that have none."""
    targets: tuple[str, ...] | str | None = None
    """Ends of module names that have one, or a pattern of whole names; None = every linear layer not excluded."""

    @property
    def scale(self) -> float:
        """Factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def covers(self, module: str) -> bool:
        """Whether a linear layer, by its published or its present name, has an update."""
        if self.targets is None:
            return not any(part in _published(module) for part in self.exclude)
        names = {module, _published(module)}
        if isinstance(self.targets, str):
            pattern = self.targets
            return any(re.fullmatch(pattern, name) for name in names)
        return any(name == end or name.endswith("." + end) for name in names for end in self.targets)


@dataclass(frozen=True)
class Settings:
    """What a checkpoint's `model_config.json` says."""

    base: str
    outputs: int
    sample_fps: float = 2.0
    num_frames: int | None = None
    max_pixels: int = 200704
    lora: LoRA | None = None
    calibration: Mapping[str, tuple[float, float]] = field(default_factory=lambda: CALIBRATION)


class RewardNetwork(nn.Module):
    """Qwen2-VL without its word head, and a bias-free head of `outputs` values. Built without initialising weights."""

    def __init__(self, config: Any, outputs: int) -> None:
        from transformers import Qwen2VLModel
        from transformers.initialization import no_init_weights

        super().__init__()
        with no_init_weights():
            self.model = Qwen2VLModel(config)
            self.rm_head = nn.Linear(config.text_config.hidden_size, outputs, bias=False)

    def forward(self, places: Tensor, **inputs: Tensor) -> Tensor:
        """The head's values (B, P, outputs) at the positions `places` (B, P) of each chat."""
        hidden = self.model(**inputs, use_cache=False).last_hidden_state
        return self.rm_head(hidden[torch.arange(len(hidden), device=hidden.device)[:, None], places])


def find_checkpoint(model: str | Path) -> tuple[Path, Path]:
    """The folder of a checkpoint's settings and the one of its weights: the latest `checkpoint-*`, or the same.

    model: a folder, one of its `checkpoint-*` folders, or a hub id, fetched once.
    """
    name = check_source("videoalign", model, option="model")
    root = Path(name) if Path(name).is_dir() else _fetch_folder(name)
    if not (root / "model_config.json").is_file() and (root.parent / "model_config.json").is_file():
        return root.parent, root
    steps = [path for path in root.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return root, max(steps, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=root)


def _fetch_folder(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=_PATTERNS))
    except Exception as error:
        remedy = "give a local folder as the option `model`"
        raise RewardError(f"{repository} cannot be fetched: {describe(error)}; {remedy}.") from error


def read_settings(folder: Path) -> Settings:
    """The settings of a checkpoint folder. Raises RewardError for a file that is missing, broken or of another kind."""
    path = folder / "model_config.json"
    config = read_json(path)
    try:
        data, model, peft = (config.get(key) or {} for key in ("data_config", "model_config", "peft_lora_config"))
        found = config.get("inference_config") or {}
        calibration = {
            name: (float(found.get(f"{name}_mean", mean)), float(found.get(f"{name}_std", deviation)))
            for name, (mean, deviation) in CALIBRATION.items()
        }
        settings = Settings(
            base=str(model["model_name_or_path"]),
            outputs=int(model.get("output_dim", 1)),
            sample_fps=float(data.get("fps", 2.0)),
            num_frames=None if data.get("num_frames") is None else int(data["num_frames"]),
            max_pixels=int(data.get("max_frame_pixels", 200704)),
            lora=_published_lora(peft) if peft.get("lora_enable", False) else None,
            calibration=calibration,
        )
        at_tokens = bool(model.get("use_special_tokens")) and data.get("sample_type", "uniform") == "uniform"
    except (KeyError, TypeError, ValueError, AttributeError, SyntaxError) as error:
        raise RewardError(f"{str(path)!r} is incomplete: {describe(error)}; give the published file.") from error
    if not at_tokens or settings.outputs not in (1, 3) or min(s for _, s in calibration.values()) <= 0:
        raise RewardError(
            f"{str(path)!r} describes another judge: it must have use_special_tokens, sample_type uniform, "
            f"output_dim 1 or 3 (here {settings.outputs}) and positive deviations."
        )
    return settings


def _published_lora(peft: Mapping[str, Any]) -> LoRA:
    exclude = peft.get("lora_namespan_exclude") or []
    if isinstance(exclude, str):
        # The published training script also writes the list as a string.
        exclude = ast.literal_eval(exclude) if exclude.startswith("[") else [exclude]
    if peft.get("num_lora_modules", -1) != -1:
        raise ValueError(f"num_lora_modules={peft['num_lora_modules']} is not supported")
    parts = [*exclude, *([] if peft.get("vision_lora") else ["visual"])]
    return LoRA(int(peft["lora_r"]), float(peft["lora_alpha"]), bool(peft.get("use_rslora")), tuple(parts))


def _adapter_lora(path: Path) -> LoRA:
    config = read_json(path)
    unknown = [key for key in ("rank_pattern", "alpha_pattern", "use_dora", "modules_to_save") if config.get(key)]
    if unknown:
        raise RewardError(f"{str(path)!r} uses {', '.join(unknown)}: merge the adapter and give a model.pth.")
    try:
        targets = config["target_modules"]
        targets = targets if isinstance(targets, str) else tuple(targets)
        return LoRA(int(config["r"]), float(config["lora_alpha"]), bool(config.get("use_rslora")), targets=targets)
    except (KeyError, TypeError, ValueError) as error:
        raise RewardError(f"{str(path)!r} is incomplete: {describe(error)}; give the published file.") from error


def load_network(folder: Path, settings: Settings, base: str, vocabulary: int) -> RewardNetwork:
    """The network of a checkpoint folder, LoRA merged; nothing missing, extra or misshapen.

    base: where its Qwen2-VL's configuration is, and its weights where the checkpoint is an adapter. vocabulary: number
    of tokens, the three reward tokens among them.
    """
    from transformers import Qwen2VLConfig

    try:
        config = Qwen2VLConfig.from_pretrained(base)
    except Exception as error:
        raise RewardError(f"base={base!r} has no config.json of a Qwen2-VL: {describe(error)}.") from error
    config.text_config.vocab_size = vocabulary
    network = RewardNetwork(config, settings.outputs)
    full = folder / "model.pth"
    tensors = _read_full(full, network, settings) if full.is_file() else _read_adapter(folder, network, settings, base)
    network.load_state_dict(tensors, strict=True, assign=True)
    return network


def _read_full(path: Path, network: RewardNetwork, settings: Settings) -> dict[str, Tensor]:
    """The network's tensors from a `model.pth`, of the plain network or with its LoRA beside it."""
    found = read_tensors(path)
    wrapped = any(name.startswith(_WRAPPER) for name in found)
    layout = _Layout(network, settings.lora if wrapped else None, wrapped, "default.", found)
    check_tensors(found, layout.shapes() | layout.word_head(found), path)
    return layout.merge(found)


def _read_adapter(folder: Path, network: RewardNetwork, settings: Settings, base: str) -> dict[str, Tensor]:
    """The network's tensors from an adapter's two files, and from the base for what they leave as it was."""
    paths = [folder / "adapter_model.safetensors", folder / "non_lora_state_dict.pth"]
    if not all(path.is_file() for path in paths):
        raise RewardError(f"{str(folder)!r} has neither model.pth nor {paths[0].name} with {paths[1].name}.")
    described = folder / "adapter_config.json"
    lora = _adapter_lora(described) if described.is_file() else settings.lora
    if lora is None:
        raise RewardError(f"{str(folder)!r} does not say its LoRA's rank: add its adapter_config.json.")
    found = read_tensors(paths[1]) | read_tensors(paths[0])
    layout = _Layout(network, lora, True, "", found)
    kept = _base_tensors(base, network)
    own = {name: shape for name, shape in layout.shapes().items() if name in found or name not in layout.named(kept)}
    check_tensors(found, own | layout.word_head(found), paths[0])
    return layout.merge(layout.named(kept) | found)


def _base_tensors(base: str, network: RewardNetwork) -> dict[str, Tensor]:
    """The tensors of a Qwen2-VL that this network can keep, by the network's names."""
    from transformers import Qwen2VLForConditionalGeneration

    model = load_pretrained(Qwen2VLForConditionalGeneration, base, judge="videoalign", option="base")
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("model.")}
    # The published code cuts the vocabulary to the tokens in use; rows the base lacks only the checkpoint can bring.
    words = "model.language_model.embed_tokens.weight"
    size = network.state_dict()[words].shape[0]
    rows = tensors.pop(words)[:size]
    return tensors | ({words: rows.clone()} if len(rows) == size else {})


class _Layout:
    """The names under which a checkpoint keeps a network's tensors.

    lora: its updates, kept beside the weights. wrapped: names begin with peft's prefix. adapter: what stands between
    `lora_A.` and `weight`. found: the checkpoint, which shows whether it was written by a transformers 5.
    """

    def __init__(
        self, network: RewardNetwork, lora: LoRA | None, wrapped: bool, adapter: str, found: Mapping[str, Tensor]
    ) -> None:
        self.prefix, self.adapter, self.lora = _WRAPPER if wrapped else "", adapter, lora
        self.present = any("model.language_model." in name for name in found)
        self.linears = {name: m for name, m in network.model.named_modules(prefix="model") if isinstance(m, nn.Linear)}
        self.updated = {name for name in self.linears if lora and lora.covers(name)}
        self.own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}

    def name(self, own: str) -> str:
        """The checkpoint's name of one of the network's tensors."""
        module, _, leaf = own.rpartition(".")
        # Beside an adapter's files the base's weights have no file, and no such name.
        inner = ".base_layer" if module in self.updated and self.adapter else ""
        return f"{self.prefix}{module if self.present else _published(module)}{inner}.{leaf}"

    def update_name(self, module: str, part: str) -> str:
        """The checkpoint's name of the A or B of a linear layer's update."""
        return f"{self.prefix}{module if self.present else _published(module)}.lora_{part}.{self.adapter}weight"

    def named(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The network's tensors by the checkpoint's names."""
        return {self.name(own): tensor for own, tensor in tensors.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint: name -> shape."""
        shapes = {self.name(own): shape for own, shape in self.own.items()}
        for module in sorted(self.updated):
            linear, rank = self.linears[module], self.lora.rank if self.lora else 0
            shapes[self.update_name(module, "A")] = (rank, linear.in_features)
            shapes[self.update_name(module, "B")] = (linear.out_features, rank)
        return shapes

    def word_head(self, found: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """The head that predicts words, where the checkpoint has it: it must fit, and is not used."""
        name = f"{self.prefix}lm_head.weight"
        return {name: self.own["model.language_model.embed_tokens.weight"]} if name in found else {}

    def merge(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The network's tensors by its own names, the updates added to their weights in float32."""
        merged = {own: tensors[self.name(own)] for own in self.own}
        for module in self.updated:
            down, up = (tensors[self.update_name(module, part)].float() for part in "AB")
            scale = self.lora.scale if self.lora else 0.0
            merged[f"{module}.weight"] = merged[f"{module}.weight"].float() + scale * (up @ down)
        return merged


def _published(name: str) -> str:
    """A module's or tensor's name before transformers put Qwen2-VL's two towers side by side."""
    return name.replace("model.language_model", "model").replace("model.visual", "visual")
