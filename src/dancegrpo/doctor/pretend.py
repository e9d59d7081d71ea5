"""Networks without memory: the shapes and dtypes of a model's tensors, on which the run's own code runs for nothing.

Only what is large is pretended (weights, latents, activations). Schedules, step indices and masks are real tensors, so
the code that looks at their values runs unchanged.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dancegrpo.doctor.architectures import Architecture, Part
from dancegrpo.errors import ModelError
from dancegrpo.policies import loading
from dancegrpo.policies.pipeline import DTYPES, PipelinePolicy
from dancegrpo.settings import ModelConfig, RolloutConfig

PROMPT_TOKENS = 96
"""Tokens of a prompt where the family does not pad to a fixed length."""


class Pretender:
    """Makes tensors without storage, and networks of them."""

    def __init__(self) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of this shape; its values are not there."""
        with self._mode:
            return torch.empty(shape, dtype=dtype)

    def like(self, tensor: Tensor) -> Tensor:
        """A pretended tensor of the same shape, strides and dtype; tensor may lie on the meta device."""
        with self._mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)

    def dress(self, module: torch.nn.Module) -> torch.nn.Module:
        """Replaces every tensor of a module on the meta device by a pretended one; tied weights stay tied."""
        known: dict[int, Tensor] = {}
        for part in module.modules():
            tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
            for table in tables:
                for name, tensor in table.items():
                    if tensor is None or not tensor.is_meta:
                        continue
                    if id(tensor) not in known:
                        made = self.like(tensor)
                        known[id(tensor)] = (
                            torch.nn.Parameter(made, tensor.requires_grad)
                            if isinstance(tensor, torch.nn.Parameter)
                            else made
                        )
                    table[name] = known[id(tensor)]
            for key, value in vars(part).items():
                if isinstance(value, Tensor) and value.is_meta:  # rotary frequencies that are no buffers
                    vars(part)[key] = self.like(value)
        # Moving a module swaps its tensors, which pretended ones cannot; there is one device here.
        vars(module)["to"] = lambda *_, **__: module
        return module


def build_network(part: Part, dtype: torch.dtype = torch.float32) -> Any:
    """A network of this architecture on the meta device: no memory, no initialisation. Raises ModelError."""
    try:
        cls = getattr(importlib.import_module(part.library), part.cls)
        with torch.device("meta"):
            if part.library == "diffusers":
                network = cls.from_config(dict(part.config))
            else:
                network = cls(cls.config_class.from_dict(dict(part.config)))
    except (ImportError, AttributeError, TypeError, ValueError, KeyError) as error:
        raise ModelError(
            f"no {part.library}.{part.cls} can be made of its config ({type(error).__name__}: {error}): check the "
            "installed versions"
        ) from error
    # The libraries' own `to` only adds a warning about weights, which are not there.
    return torch.nn.Module.to(network, dtype).eval()


def pretended_policy(
    architecture: Architecture, model: ModelConfig, rollout: RolloutConfig, pretender: Pretender
) -> PipelinePolicy:
    """The policy of a run as `load_policy` gives it, of tensors without storage, on the CPU.

    Raises ConfigError and ModelError as the family does for settings it cannot run.
    """
    import diffusers

    family: Any = loading._family(model, architecture.pipeline)
    dtype = DTYPES[model.dtype]
    parts: dict[str, Any] = {}
    for name, part in architecture.parts.items():
        if part is None:
            parts[name] = None
        elif part.is_network:
            parts[name] = build_network(part, _stored(name, family, model, dtype))
        elif "scheduler" in name:
            parts[name] = getattr(importlib.import_module(part.library), part.cls).from_config(dict(part.config))
        else:
            parts[name] = Words(int(part.config.get("model_max_length", 77)))
    if architecture.pipeline == "StableDiffusionPipeline":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = getattr(diffusers, architecture.pipeline)(**parts, **architecture.options)
    _read_by_shape(pipeline)
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module) and name not in family.denoisers:
            pretender.dress(part)
    settings = model.model_copy(update={"device": "cpu", "offload": False})
    policy: PipelinePolicy = _without_storage(family, pretender)(pipeline, Path(model.path), settings, rollout)
    return policy


def _stored(name: str, family: Any, model: ModelConfig, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which `load_policy` keeps a part."""
    if name in family.denoisers:
        return dtype if model.lora else torch.float32
    if name == "vae":
        return dtype if model.dtype in family.vae_dtypes else torch.float32
    return dtype


def _without_storage(family: Any, pretender: Pretender) -> Any:
    """The family with the two places replaced in which values would be needed: adapters' start, the reference."""

    class Pretended(family):
        def _make_trainable(self, name: str, module: Any, seed: int) -> None:
            with torch.device("meta"):
                super()._make_trainable(name, module, seed)
            pretender.dress(module)

        def keep_reference(self) -> None:
            if self.model.lora is None:
                self._references = {name: self._copied(module) for name, module in self.modules.items()}

        def _copied(self, module: Any) -> Any:
            with torch.device("meta"):
                copied = type(module).from_config(module.config)
            if self.model.gradient_checkpointing:
                copied.enable_gradient_checkpointing()
            return pretender.dress(copied.eval().requires_grad_(False))

    Pretended.__name__ = Pretended.__qualname__ = family.__name__
    return Pretended


def _read_by_shape(pipeline: Any) -> None:
    """Qwen-Image cuts a batch by the values of a mask; here every row has all its tokens."""
    if hasattr(pipeline, "_extract_masked_hidden"):
        pipeline._extract_masked_hidden = lambda states, mask: list(states)


class Words:
    """Stands for a tokenizer: ids of the right number, all of them one word's."""

    padding_side = "right"
    pad_token_id = 0

    def __init__(self, model_max_length: int) -> None:
        self.model_max_length = model_max_length

    def __call__(
        self, text: Any = None, *_: Any, padding: Any = False, max_length: int | None = None, **__: Any
    ) -> Any:
        """Ids and mask (N, L) of N texts: L = max_length where it pads to it, else `PROMPT_TOKENS` at most."""
        from transformers import BatchEncoding

        most = max_length or self.model_max_length
        shape = (
            1 if isinstance(text, str) else len(text),
            most if padding == "max_length" else min(most, PROMPT_TOKENS),
        )
        ids, mask = torch.ones(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.int64)
        return BatchEncoding({"input_ids": ids, "attention_mask": mask})

    def tokenize(self, text: str) -> list[str]:
        """No words: there is none that stands for several."""
        return []

    def batch_decode(self, *_: Any, **__: Any) -> list[str]:
        """What a pipeline tells of words it cuts off."""
        return []


class CudaAutocast:
    """Within it, the CPU's autocast keeps in float32 what CUDA's does: norms, softmax, powers.

    Else a prediction for an accelerator would count their outputs at half their size. The functions themselves are
    replaced, not intercepted by a mode of torch: such a mode is off in the backward pass, where activations are
    recomputed.
    """

    _NAMES = ("layer_norm", "group_norm", "softmax", "log_softmax", "pow", "rsqrt", "exp", "norm", "sum", "prod")

    def __enter__(self) -> None:
        self._replaced: list[tuple[Any, str, Any]] = []
        for place in (torch.nn.functional, torch, torch.Tensor):
            for name in self._NAMES:
                if hasattr(place, name):
                    self._replaced.append((place, name, vars(place).get(name)))
                    setattr(place, name, _in_full(getattr(place, name)))

    def __exit__(self, *_: object) -> None:
        for place, name, plain in reversed(self._replaced):
            if plain is None:  # inherited
                delattr(place, name)
            else:
                setattr(place, name, plain)


def _in_full(function: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = tuple(map(_full, args)), {name: _full(value) for name, value in kwargs.items()}
        return function(*args, **kwargs)

    return called


def _full(value: Any) -> Any:
    halves = (torch.bfloat16, torch.float16)
    return value.float() if isinstance(value, Tensor) and value.dtype in halves else value


def autocast_of(device: torch.device) -> AbstractContextManager[Any]:
    """Around pretended work that is meant for `device`."""
    return CudaAutocast() if device.type == "cuda" else nullcontext()
