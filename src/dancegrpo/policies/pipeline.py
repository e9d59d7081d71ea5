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

from dancegrpo.distributed import World
from dancegrpo.errors import CheckpointError, ConfigError
from dancegrpo.files import write_atomically
from dancegrpo.noise import key
from dancegrpo.policies.base import Condition, Policy
from dancegrpo.policies.context import require_split
from dancegrpo.policies.export import ModelCard, Task, Usage, card_text
from dancegrpo.policies.guidance import NEGATIVE
from dancegrpo.policies.offload import lent
from dancegrpo.policies.quantize import quantize
from dancegrpo.prompts import Prompt
from dancegrpo.sde import Dynamics
from dancegrpo.settings import LoraConfig as LoraSettings
from dancegrpo.settings import ModelConfig, ParallelConfig, RolloutConfig
from dancegrpo.sharding import laid_out, local, shard, sharded, split_sequences

OPTIONAL_SETTINGS = ("num_frames", "max_sequence_length", "true_cfg_scale", "guidance_scale_2", "prompt_template")
"""Settings of a model that only some families read; a family names its own in `settings`."""
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

    denoisers: ClassVar[tuple[str, ...]]
    """The pipeline's names for the networks that are trained; of several, a checkpoint may lack all but one."""
    components: ClassVar[tuple[str, ...]]
    """The parts with weights that must be there, the first denoiser included."""
    text_parts: ClassVar[tuple[str, ...]]
    """The folders whose files decide what a prompt is encoded to."""
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder")
    """The networks that `encode` calls, where the pipeline has them."""
    vae_dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    """What the decoder can be stored in without overflow or visible loss; float32 otherwise."""
    settings: ClassVar[tuple[str, ...]] = ()
    """Those of OPTIONAL_SETTINGS that this family reads."""
    task: ClassVar[Task] = "text-to-image"

    def __init__(self, pipeline: Any, folder: Path, model: ModelConfig, rollout: RolloutConfig, seed: int = 0) -> None:
        """pipeline: as `from_pretrained` gave it, from `folder`. seed: of the adapters' starting weights."""
        self.pipeline, self.folder, self.model = pipeline, folder, model
        self.device, self.dtype = resolve_device(model.device), DTYPES[model.dtype]
        self.modules: dict[str, torch.nn.Module] = {
            name: getattr(pipeline, name) for name in self.denoisers if getattr(pipeline, name, None) is not None
        }
        self.module = next(iter(self.modules.values()))
        self._references: dict[str, torch.nn.Module] = {}
        self._at_start = False
        self.context = 1
        """Ranks over which sequences are split."""
        self._layout: ParallelConfig | None = None
        self._check_settings(model)
        self._check(model, rollout)
        self._freeze()
        if model.quantize is not None:
            quantize([*self.modules.values(), *(part for n, part in self._networks().items() if n in self.encoders)])
        for name, module in self.modules.items():
            self._make_trainable(name, module, seed)
        pipeline.set_progress_bar_config(disable=True)
        for name, part in self._networks().items():
            if not model.offload or name in self.modules:
                part.to(self.device)
        self._use_tiles()
        self.dynamics = self._dynamics(rollout).to(self.device)
        if self.dynamics.sde in ("ddim", "cps") and max(rollout.noise_levels()) > 1:
            raise ConfigError(
                f"rollout.noise_level={rollout.noise_level} is more noise than {self.dynamics.sde} has: use 0 to 1"
            )

    def _make_trainable(self, name: str, module: Any, seed: int) -> None:
        if self.model.lora is None:
            module.requires_grad_(True)
        else:
            self._add_adapters(name, module, seed)
        if self.model.gradient_checkpointing:
            try:
                module.enable_gradient_checkpointing()
            except ValueError as error:
                kind = type(module).__name__
                raise ConfigError(f"model.gradient_checkpointing=true: {kind} has none, set it to false") from error

    def _check_settings(self, model: ModelConfig) -> None:
        """Raises ConfigError for settings that only other families read: nothing a user sets is silently dropped."""
        family = type(self.pipeline).__name__
        for name in OPTIONAL_SETTINGS:
            value, default = getattr(model, name), ModelConfig.model_fields[name].default
            if value != default and name not in self.settings:
                raise ConfigError(f"model.{name}={value} is not known to {family}: remove it")

    def _use_tiles(self) -> None:
        vae = self.pipeline.vae
        for wanted, name in ((self.model.vae_tiling, "tiling"), (self.model.vae_slicing, "slicing")):
            if wanted:
                try:
                    getattr(vae, f"enable_{name}")()
                except (AttributeError, NotImplementedError) as error:
                    kind = type(vae).__name__
                    raise ConfigError(
                        f"model.vae_{name}=true: {kind} cannot decode like that, set it to false"
                    ) from error

    @contextmanager
    def _awake(self, *names: str) -> Iterator[None]:
        """Within it, these parts of the pipeline are on the device; with `model.offload` only within it."""
        parts = [part for name, part in self._networks().items() if name in names and name not in self.modules]
        with lent(parts, self.device) if self.model.offload else nullcontext():
            yield

    def network(self, name: str | None = None) -> Any:
        """The denoiser of this name (the first one for None): live, or the copy from before training in `reference`."""
        return (self._references if self._at_start else self.modules)[name or self.denoisers[0]]

    def _grid(self, factor: int) -> tuple[int, int]:
        """(rows, columns) of cells of factor x factor pixels. Raises ConfigError for a size that does not divide."""
        sizes = {"height": self.model.height, "width": self.model.width}
        wrong = {f"model.{name}={size}": size for name, size in sizes.items() if size % factor}
        if wrong:
            near = " and ".join(str(max(factor, round(size / factor) * factor)) for size in wrong.values())
            told = " and ".join(wrong)
            raise ConfigError(f"{told}: sizes must be multiples of {factor} for this pipeline, use {near}")
        return sizes["height"] // factor, sizes["width"] // factor

    def _latent_frames(self, factor: int, least: int = 1) -> int:
        """Latent frames of `model.num_frames` under causal compression in time, 1 + (F - 1) / factor.

        Raises ConfigError for a number that the autoencoder cannot represent. least: the fewest that the family films.
        """
        frames = self.model.num_frames
        if (frames - 1) % factor:
            near = max(least, 1 + round((frames - 1) / factor) * factor)
            raise ConfigError(
                f"model.num_frames={frames} must be a multiple of {factor} plus 1 for this pipeline: use {near}"
            )
        return 1 + (frames - 1) // factor

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

    def predict_unguided(self, x_t: Tensor, step: Tensor, condition: Condition) -> Tensor:
        """See `Policy.predict_unguided`."""
        if not self.guided:
            return self.predict(x_t, step, condition)
        own = {name: tensor for name, tensor in condition.tensors.items() if not name.startswith(NEGATIVE)}
        scale = "true_cfg_scale" if "true_cfg_scale" in self.settings else "guidance_scale"
        held, self.model = self.model, self.model.model_copy(update={scale: 1.0})
        try:
            return self.predict(x_t, step, Condition(own))
        finally:
            self.model = held

    def _networks(self) -> dict[str, torch.nn.Module]:
        return {name: part for name, part in self.pipeline.components.items() if isinstance(part, torch.nn.Module)}

    def _freeze(self) -> None:
        for part in self._networks().values():
            part.eval().requires_grad_(False)
            # Loaded tensors lie unaligned in the memory-mapped file, where kernels round differently.
            for tensor in chain(part.parameters(), part.buffers()):
                tensor.data = tensor.data.clone()

    def _add_adapters(self, name: str, module: Any, seed: int) -> None:
        from peft import LoraConfig

        lora = self.model.lora or LoraSettings()
        config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.target_modules))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(seed, "lora"))
            try:
                module.add_adapter(config)
            except ValueError as error:
                names = ", ".join(lora.target_modules)
                raise ConfigError(
                    f"model.lora.target_modules=[{names}] names no layer of the {name}: use to_q, to_k, ..."
                ) from error
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    @cached_property
    def condition_id(self) -> str:
        """sha256 over the files of the text encoders and tokenizers, and the settings that `encode` reads."""
        told = (type(self).__name__, *self._encode_settings(), *filter(None, [self.model.quantize]))
        digest = hashlib.sha256(repr(told).encode())
        for part in self.text_parts:
            for file in sorted(path for path in (self.folder / part).rglob("*") if path.is_file()):
                digest.update(f"{part}/{file.name}".encode())
                with file.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def _encode_settings(self) -> tuple[object, ...]:
        return self.model.dtype, self.model.max_sequence_length

    def encoding(self) -> AbstractContextManager[None]:
        """See `Policy.encoding`."""
        return self._awake(*self.encoders, *["vae"] * self.takes_image)

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """See `Policy.encode`."""
        # One at a time: a batch's size and its other rows change the last bits of a row, and then a resumed run or a
        # warm cache would no longer repeat the first one. Text is a small share of a run.
        keys = [prompt.request() for prompt in prompts]
        unique = dict(zip(keys, prompts, strict=True))
        rows = {request: row for row, request in enumerate(unique)}
        with self.encoding():
            condition = Condition.cat([self._encode(prompt) for prompt in unique.values()])
        return condition[[rows[request] for request in keys]]

    def autocast(self) -> AbstractContextManager[Any]:
        """The run's arithmetic: none for float32."""
        return nullcontext() if self.dtype is torch.float32 else torch.autocast(self.device.type, self.dtype)

    def _decode(self, scaled: Tensor) -> Tensor:
        """VAE latents (B, C, h, w) or (B, C, T, h, w), scaling undone -> (B, F, 3, H, W) float32 in [0, 1]."""
        vae = self.pipeline.vae
        with self._awake("vae"):
            media = vae.decode(scaled.to(vae.dtype), return_dict=False)[0].float()
        if media.ndim == 5:
            return self.pipeline.video_processor.postprocess_video(media, output_type="pt")
        return self.pipeline.image_processor.postprocess(media, output_type="pt").unsqueeze(1)

    @property
    def media_shape(self) -> tuple[int, int, int, int]:
        """See `Policy.media_shape`: the run's frames and size."""
        if type(self).latents is Policy.latents:
            return super().media_shape
        return self.model.num_frames, 3, self.model.height, self.model.width

    @torch.no_grad()
    def _mode(self, media: Tensor, *, pictures: bool = False) -> Tensor:
        """media (B, F, 3, H, W) in [0, 1] -> the mode of the VAE's posterior, float32, not scaled: (B, C, T, h, w).

        pictures: for an autoencoder of pictures, (B, C, h, w) from each sample's only frame. Raises ValueError for
        media not of `media_shape`.
        """
        if media.shape[1:] != self.media_shape:
            raise ValueError(f"media of shape {tuple(media.shape)} are not (B, {str(self.media_shape)[1:]}.")
        vae, pixels = self.pipeline.vae, 2.0 * media.float() - 1.0
        shown = pixels[:, 0] if pictures else pixels.transpose(1, 2)
        with self._awake("vae"):
            return vae.encode(shown.to(self.device, vae.dtype)).latent_dist.mode().float()

    # --- The pipeline itself, for `dancegrpo validate` ----------------------------------------------------------------

    @property
    def exact(self) -> bool:
        """Whether the deterministic sampler equals the pipeline's to the last bit, rather than to rounding."""
        return self.dtype is torch.float32

    def pipeline_scheduler(self) -> Any:
        """A new scheduler with which the pipeline samples as this policy does at noise level 0."""
        return copy.deepcopy(self.pipeline.scheduler)

    def pipeline_arguments(self, prompts: Sequence[Prompt], noise: Tensor) -> dict[str, Any]:
        """The pipeline call that draws `prompts` from `noise` (B, *S): the card's example, and where it starts."""
        arguments = dict(self._usage().arguments) | {"prompt": [prompt.text for prompt in prompts], "latents": noise}
        if self.guided:
            arguments["negative_prompt"] = [prompt.negative for prompt in prompts]
        if self.takes_image:
            from dancegrpo.media import reference_image

            images = [reference_image(prompt) for prompt in prompts]
            arguments["image"] = images[0] if len(images) == 1 else images
        return arguments

    def pipeline_state(self, latents: Tensor) -> Tensor:
        """The policy's state (B, *S) in the latents that the pipeline's scheduler steps on: what is not given."""
        return latents

    @torch.no_grad()
    def run_pipeline(self, prompts: Sequence[Prompt], noise: Tensor, scheduler: Any) -> Tensor:
        """The pipeline's own media (B, F, 3, H, W) in [0, 1] by `scheduler`, from starting noise (B, *S).

        It runs on this policy's networks as they are now, in the run's arithmetic.
        """
        held, self.pipeline.scheduler = self.pipeline.scheduler, scheduler
        try:
            with self._awake(*self.encoders, "vae"), self.autocast():
                call = self.pipeline_arguments(prompts, noise.to(self.device))
                media = self.pipeline(**call, output_type="pt", return_dict=False)[0]
        finally:
            self.pipeline.scheduler = held
        return (media if media.ndim == 5 else media.unsqueeze(1)).float()

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """See `Policy.trainable`: all weights of the denoiser, or its adapters'; several denoisers prefix theirs."""
        # Not by requires_grad: peft clears it while the adapters are off.
        full, several = self.model.lora is None, len(self.modules) > 1
        return {
            f"{denoiser}.{name}" if several else name: weight
            for denoiser, module in self.modules.items()
            for name, weight in module.named_parameters()
            if full or ".lora_" in name
        }

    def shard(self, world: World) -> None:
        """See `Policy.shard`: FSDP2, and Ulysses, on every denoiser and on the references kept."""
        networks = (*self.modules.values(), *self._references.values())
        if world.context > 1:
            self.require_context(world.context)
            self.context = world.context
            for module in networks:
                self._split(module, world)
        if world.fsdp > 1:
            for module in networks:
                shard(module, world, self.dtype)
            self._layout = world.settings

    def context_plan(self) -> Mapping[str, Any] | None:
        """What context parallelism splits and gathers in a denoiser, as diffusers writes it; None where nothing can be.

        A family whose class in diffusers has no plan, or not a right one, writes its own.
        """
        return getattr(self.module, "_cp_plan", None)

    @property
    def token_grid(self) -> tuple[int, ...]:
        """(frames, rows, columns) or (rows, columns) of the tokens that a sample's latents become in the denoiser."""
        return ()

    def require_context(self, degree: int) -> None:
        """Raises ConfigError where the sequences or the heads cannot be split over `degree` ranks evenly."""
        family, plan = type(self.pipeline).__name__, self.context_plan()
        require_split(family, self.module, self.model, plan, self.token_grid, degree)

    def _split(self, network: Any, world: World) -> None:
        """Splits the sequences of one denoiser."""
        split_sequences(network, self.context_plan() or {}, world)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """See `Policy.sampling`."""
        if self._layout is None or self._layout.reshard_rollout:
            yield
            return
        blocks = [part for module in self.modules.values() for part in sharded(module)[1:]]
        for block in blocks:
            block.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for block in blocks:
                block.set_reshard_after_forward(self._layout.reshard_update, recurse=False)
            self.reshard()

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """See `Policy.accumulating`."""
        for module in self.modules.values():
            for part in sharded(module)[:1]:
                part.set_requires_gradient_sync(last)
        yield

    @contextmanager
    def use_weights(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """See `Policy.use_weights`."""
        # Forward passes without a backward one leave the outermost weights gathered.
        self.reshard()
        own = self.trainable()
        wrong = sorted(own.keys() ^ weights.keys()) or [n for n in own if own[n].shape != weights[n].shape]
        if wrong:
            raise ValueError(f"{len(wrong)} weights do not fit the trained ones, {wrong[0]} first.")
        if any(sharded(module) for module in self.modules.values()):
            with self._exchanged(own, weights):
                yield
            return
        kept = {name: parameter.data for name, parameter in own.items()}
        try:
            for name, parameter in own.items():
                parameter.data = weights[name].detach().to(parameter)
            yield
        finally:
            for name, parameter in own.items():
                parameter.data = kept[name]

    @contextmanager
    def _exchanged(self, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Iterator[None]:
        """FSDP2 owns the storage of its shards: values are exchanged in place."""
        kept = {name: local(parameter.detach()).clone() for name, parameter in own.items()}
        try:
            with torch.no_grad():
                for name, parameter in own.items():
                    local(parameter.detach()).copy_(local(laid_out(weights[name], parameter)))
            yield
        finally:
            self.reshard()
            with torch.no_grad():
                for name, parameter in own.items():
                    local(parameter.detach()).copy_(kept[name])

    def reshard(self) -> None:
        """See `Policy.reshard`."""
        for module in self.modules.values():
            for part in sharded(module):
                part.reshard()

    def keep_reference(self) -> None:
        """See `Policy.keep_reference`."""
        if self.model.lora is None:
            copies = {name: copy.deepcopy(module) for name, module in self.modules.items()}
            self._references = {name: module.requires_grad_(False) for name, module in copies.items()}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """See `Policy.reference`. Raises RuntimeError under full fine-tuning if no `keep_reference` came before."""
        if self.model.lora is not None:
            adapted: list[Any] = list(self.modules.values())
            for module in adapted:
                module.disable_adapters()
            try:
                yield
            finally:
                for module in adapted:
                    module.enable_adapters()
            return
        if not self._references:
            raise RuntimeError("there is no reference: call keep_reference() before the first optimizer step.")
        self._at_start = True
        try:
            yield
        finally:
            self._at_start = False

    def export(self, folder: Path, card: ModelCard) -> None:
        """See `Policy.export`."""
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder} exists and is not empty: name a new folder, or remove this one first")
        text = card_text(card, self.task, self._usage(), lora=self.model.lora is not None)

        def write(partial: Path) -> None:
            partial.mkdir()
            if self.model.lora is None:
                self.pipeline.save_pretrained(partial)
                _forget_paths(partial)
            else:
                self._save_adapters(partial)
            (partial / "README.md").write_text(text, encoding="utf-8")

        write_atomically(folder, write)

    def load_adapters(self, folder: Path) -> None:
        """Exported LoRA weights into the bare pipeline, as the model card says, by diffusers alone."""
        self.pipeline.load_lora_weights(folder)

    def _save_adapters(self, folder: Path) -> None:
        from peft import get_peft_model_state_dict

        # alpha / rank is folded into B: readers that find no alpha take it to equal the rank, and none misreads this.
        lora = self.model.lora or LoraSettings()
        scale = lora.alpha / lora.rank
        for name, module in self.modules.items():
            layers = {
                n: (w * scale if "lora_B" in n else w).detach().contiguous()
                for n, w in get_peft_model_state_dict(module).items()
            }
            # diffusers reads one network's adapters from a file, under the first network's name: a file for each.
            file = None if name == self.denoisers[0] else f"{name}_lora_weights.safetensors"
            self.pipeline.save_lora_weights(folder, weight_name=file, **{f"{self.denoisers[0]}_lora_layers": layers})


def _forget_paths(folder: Path) -> None:
    """Takes the path of the base, which the libraries note down, out of a pipeline's JSON files."""
    for file in folder.rglob("*.json"):
        held = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(held, dict) and held.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")
