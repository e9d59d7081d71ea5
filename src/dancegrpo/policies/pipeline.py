"""What every policy around a diffusers pipeline shares: weights, adapters, the reference, precision, export."""

from __future__ import annotations

import copy
import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from dancegrpo.config import LoraConfig as LoraSettings
from dancegrpo.config import ModelConfig, RolloutConfig
from dancegrpo.errors import CheckpointError, ConfigError
from dancegrpo.files import write_atomically
from dancegrpo.noise import key
from dancegrpo.policies.base import Condition, Policy
from dancegrpo.policies.export import ModelCard, Usage, card_text
from dancegrpo.prompts import Prompt
from dancegrpo.sde import Dynamics

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """`auto` is the accelerator where there is one, else the CPU. Raises ConfigError for a device that is not there."""
    if name == "auto":
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch's two ways of saying that a device does not exist
        raise ConfigError(f"model.device={name} is not available here: use auto or cpu.") from error


class PipelinePolicy(Policy):
    """A policy around a loaded diffusers pipeline; the families say how it encodes, predicts and decodes.

    The trained weights are float32 whatever the run's dtype, which then is autocast's; frozen parts are stored in it.
    """

    denoiser: ClassVar[str]
    """The pipeline's name for the network that is trained."""
    components: ClassVar[tuple[str, ...]]
    """The parts with weights that must be there, the denoiser included."""
    text_parts: ClassVar[tuple[str, ...]]
    """The folders whose files decide what a prompt is encoded to."""

    def __init__(self, pipeline: Any, folder: Path, model: ModelConfig, rollout: RolloutConfig, seed: int = 0) -> None:
        """pipeline: as `from_pretrained` gave it, from `folder`. seed: of the adapters' starting weights."""
        self.pipeline, self.folder, self.model = pipeline, folder, model
        self.device, self.dtype = resolve_device(model.device), DTYPES[model.dtype]
        self.module: Any = getattr(pipeline, self.denoiser)
        self._freeze()
        if model.lora is None:
            self.module.requires_grad_(True)
        else:
            self._add_adapters(seed)
        if model.gradient_checkpointing:
            self.module.enable_gradient_checkpointing()
        pipeline.set_progress_bar_config(disable=True)
        for part in self._networks():
            part.to(self.device)
        self._active: Any = self.module
        self._reference: Any = None
        self._check(model, rollout)
        self.dynamics = self._dynamics(rollout).to(self.device)
        if self.dynamics.sde in ("ddim", "cps") and max(rollout.noise_levels()) > 1:
            raise ConfigError(
                f"rollout.noise_level={rollout.noise_level} is more noise than {self.dynamics.sde} has: use 0 to 1"
            )

    @abstractmethod
    def _check(self, model: ModelConfig, rollout: RolloutConfig) -> None:
        """Raises ConfigError or ModelError for settings or weights this family cannot run; sets `latent_shape`."""

    @abstractmethod
    def _dynamics(self, rollout: RolloutConfig) -> Dynamics:
        """The sampler: the pipeline's schedule at the run's steps and resolution, with the run's SDE."""

    @abstractmethod
    def _encode(self, prompt: Prompt) -> Condition:
        """One prompt -> a condition of length 1, by the pipeline's own `encode_prompt`."""

    @abstractmethod
    def _usage(self) -> Usage:
        """How diffusers alone samples as this policy does."""

    def _networks(self) -> list[torch.nn.Module]:
        return [part for part in self.pipeline.components.values() if isinstance(part, torch.nn.Module)]

    def _freeze(self) -> None:
        for part in self._networks():
            part.eval().requires_grad_(False)
            # Loaded tensors lie unaligned in the memory-mapped file, where kernels round differently.
            for tensor in chain(part.parameters(), part.buffers()):
                tensor.data = tensor.data.clone()

    def _add_adapters(self, seed: int) -> None:
        from peft import LoraConfig

        lora = self.model.lora or LoraSettings()
        config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.target_modules))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(seed, "lora"))
            try:
                self.module.add_adapter(config)
            except ValueError as error:
                names = ", ".join(lora.target_modules)
                raise ConfigError(
                    f"model.lora.target_modules=[{names}] names no layer of the {self.denoiser}: use to_q, to_k, ..."
                ) from error
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    @cached_property
    def condition_id(self) -> str:
        """sha256 over the files of the text encoders and tokenizers, and the settings that `encode` reads."""
        digest = hashlib.sha256(repr((type(self).__name__, *self._encode_settings())).encode())
        for part in self.text_parts:
            for file in sorted(path for path in (self.folder / part).rglob("*") if path.is_file()):
                digest.update(f"{part}/{file.name}".encode())
                with file.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def _encode_settings(self) -> tuple[object, ...]:
        return self.model.dtype, self.model.max_sequence_length

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """See `Policy.encode`."""
        # One at a time: a batch's size and its other rows change the last bits of a row, and then a resumed run or a
        # warm cache would no longer repeat the first one. Text is a small share of a run.
        unique = {(prompt.text, prompt.negative): prompt for prompt in prompts}
        rows = {words: row for row, words in enumerate(unique)}
        condition = Condition.cat([self._encode(prompt) for prompt in unique.values()])
        return condition[[rows[prompt.text, prompt.negative] for prompt in prompts]]

    def autocast(self) -> AbstractContextManager[Any]:
        """The run's arithmetic: none for float32."""
        return nullcontext() if self.dtype is torch.float32 else torch.autocast(self.device.type, self.dtype)

    def _decode(self, scaled: Tensor) -> Tensor:
        """VAE latents (B, C, h, w), scaling undone -> (B, 1, 3, H, W) float32 in [0, 1]."""
        vae = self.pipeline.vae
        image = vae.decode(scaled.to(vae.dtype), return_dict=False)[0].float()
        return self.pipeline.image_processor.postprocess(image, output_type="pt").unsqueeze(1)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """All weights of the denoiser, or its adapters': see `Policy.trainable`."""
        # Not by requires_grad: peft clears it while the adapters are off.
        full = self.model.lora is None
        return {name: weight for name, weight in self.module.named_parameters() if full or ".lora_" in name}

    @contextmanager
    def use_weights(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """See `Policy.use_weights`."""
        own = self.trainable()
        wrong = sorted(own.keys() ^ weights.keys()) or [n for n in own if own[n].shape != weights[n].shape]
        if wrong:
            raise ValueError(f"{len(wrong)} weights do not fit the trained ones, {wrong[0]} first.")
        kept = {name: parameter.data for name, parameter in own.items()}
        try:
            for name, parameter in own.items():
                parameter.data = weights[name].detach().to(parameter)
            yield
        finally:
            for name, parameter in own.items():
                parameter.data = kept[name]

    def keep_reference(self) -> None:
        """See `Policy.keep_reference`."""
        if self.model.lora is None:
            self._reference = copy.deepcopy(self.module).requires_grad_(False)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """See `Policy.reference`. Raises RuntimeError under full fine-tuning if no `keep_reference` came before."""
        if self.model.lora is not None:
            self.module.disable_adapters()
            try:
                yield
            finally:
                self.module.enable_adapters()
            return
        if self._reference is None:
            raise RuntimeError("there is no reference: call keep_reference() before the first optimizer step.")
        self._active = self._reference
        try:
            yield
        finally:
            self._active = self.module

    def export(self, folder: Path, card: ModelCard) -> None:
        """See `Policy.export`."""
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder} exists and is not empty: name a new folder, or remove this one first")
        text = card_text(card, self._usage(), lora=self.model.lora is not None)

        def write(partial: Path) -> None:
            partial.mkdir()
            if self.model.lora is None:
                self.pipeline.save_pretrained(partial)
                _forget_paths(partial)
            else:
                self._save_adapters(partial)
            (partial / "README.md").write_text(text, encoding="utf-8")

        write_atomically(folder, write)

    def _save_adapters(self, folder: Path) -> None:
        from peft import get_peft_model_state_dict

        # alpha / rank is folded into B: readers that find no alpha take it to equal the rank, and none misreads this.
        lora = self.model.lora or LoraSettings()
        scale = lora.alpha / lora.rank
        state = get_peft_model_state_dict(self.module)
        layers = {n: (w * scale if "lora_B" in n else w).detach().contiguous() for n, w in state.items()}
        self.pipeline.save_lora_weights(folder, **{f"{self.denoiser}_lora_layers": layers})


def _forget_paths(folder: Path) -> None:
    """Takes the path of the base, which the libraries note down, out of a pipeline's JSON files."""
    for file in folder.rglob("*.json"):
        held = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(held, dict) and held.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")
