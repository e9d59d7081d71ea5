"""The generator's side of the contract: prompts to conditions, a prediction per step, latents to media."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dancegrpo.distributed import World
from dancegrpo.errors import ConfigError
from dancegrpo.policies.export import ModelCard
from dancegrpo.prompts import Prompt
from dancegrpo.sde import Dynamics


@dataclass(frozen=True)
class Condition:
    """What the denoiser is told: batch-first tensors of equal length, by the denoiser's own names for them."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: Tensor | slice | list[int]) -> Condition:
        """Rows by slice, list or (N,) int64 tensor: repeats a prompt's condition over its group without copies kept."""
        return Condition({name: tensor[index] for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str) -> Condition:
        """The same rows on `device`."""
        return Condition({name: tensor.to(device) for name, tensor in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """The rows of all parts, in order; at least one part, all of the same names.

        Sequences (axis 1) of different length are filled up with zeros at their end, masks with False: the families
        whose conditions differ in length keep a mask beside them.
        """
        return Condition({name: _stack([part.tensors[name] for part in parts]) for name in parts[0].tensors})


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    longest = max(tensor.shape[1] if tensor.ndim > 1 else 0 for tensor in tensors)
    filled = []
    for tensor in tensors:
        if tensor.ndim > 1 and (lacking := longest - tensor.shape[1]):
            tensor = torch.cat([tensor, tensor.new_zeros(len(tensor), lacking, *tensor.shape[2:])], dim=1)
        filled.append(tensor)
    return torch.cat(filled)


_ONE_WAY = "{} turns no pictures into latents (it has no `latents`): use algorithm.dpo.source=online"


class Policy(ABC):
    """A generator under training, around its diffusers pipeline.

    B samples, S = `latent_shape`, T steps. Latents and predictions are float32; the networks compute in the run's
    dtype. `predict` includes guidance, so rollout and update can never disagree on it.
    """

    pipeline: Any
    """The diffusers pipeline; its frozen parts are used as they are."""
    module: Any
    """The denoiser that is trained, a `torch.nn.Module`."""
    dynamics: Dynamics
    """Schedule and stochastic transitions at the run's resolution and number of steps."""
    latent_shape: tuple[int, ...]
    device: torch.device

    @property
    def guided(self) -> bool:
        """Whether `predict` combines two branches by classifier-free guidance."""
        return False

    @property
    def takes_image(self) -> bool:
        """Whether a prompt must bring a reference image."""
        return False

    def bucket(self, step: Tensor) -> Tensor:
        """step (N,) int64 -> (N,) int64 names of what may share a forward pass: Wan 2.2 has a network for each of two
        ranges of steps. Micro-batches never mix buckets."""
        return torch.zeros_like(step)

    def start(self, noise: Tensor, condition: Condition) -> Tensor:
        """noise (B, *S), standard normal -> the latents (B, *S) that sampling starts from."""
        return noise

    @property
    @abstractmethod
    def condition_id(self) -> str:
        """Names everything but the prompt that `encode` depends on: text encoders, tokenizers, dtype, settings."""

    def encoding(self) -> AbstractContextManager[None]:
        """Around several calls of `encode`: what it needs is brought to the device once, not for each call."""
        return nullcontext()

    @abstractmethod
    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """P prompts -> a condition of length P. No gradient. A row depends on its own prompt alone, to the last bit."""

    @abstractmethod
    def predict(self, x_t: Tensor, step: Tensor, condition: Condition) -> Tensor:
        """x_t (B, *S) float32, step (B,) int64 in [0, T), B conditions -> velocity or noise, (B, *S) float32."""

    def predict_unguided(self, x_t: Tensor, step: Tensor, condition: Condition) -> Tensor:
        """`predict` of the conditional branch alone: what losses on the forward process train (arXiv:2207.12598).

        Raises NotImplementedError for a guided policy that cannot leave its guidance out.
        """
        if self.guided:
            raise NotImplementedError(
                f"{type(self).__name__} combines two branches in predict: write predict_unguided."
            )
        return self.predict(x_t, step, condition)

    @abstractmethod
    def decode(self, latents: Tensor, condition: Condition) -> Tensor:
        """latents (B, *S) and their B conditions -> media (B, F, 3, H, W) float32 in [0, 1].

        No gradient unless grad mode is on.
        """

    @property
    def media_shape(self) -> tuple[int, int, int, int]:
        """(F, 3, H, W) of the media that `latents` takes. Raises ConfigError for a policy without `latents`."""
        raise ConfigError(_ONE_WAY.format(type(self).__name__))

    def latents(self, media: Tensor, condition: Condition) -> Tensor:
        """media (B, F, 3, H, W) in [0, 1] and their B conditions -> latents (B, *S) float32: the inverse of `decode`.

        The mode of the autoencoder's posterior, which `decode` turns back as far as the autoencoder can; no gradient.
        Raises ConfigError for a policy that has no way back, and ValueError for media not of `media_shape`.
        """
        raise ConfigError(_ONE_WAY.format(type(self).__name__))

    @abstractmethod
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters the optimizer steps, by name, in a fixed order."""

    @abstractmethod
    def use_weights(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Within it, the trained weights are `weights` (an average, say); after it, the very tensors from before.

        weights: one tensor per name of `trainable()`, of its shape. Raises ValueError otherwise.
        """

    def shard(self, world: World) -> None:
        """Shares the trained weights, and the sequences of a sample, out among the ranks of `world`.

        After `keep_reference` and before anything else. Raises ConfigError for a policy that cannot.
        """
        if world.joint:
            raise ConfigError(f"parallel.fsdp={world.fsdp}: {type(self).__name__} cannot be sharded, set it to 1")
        if world.context > 1:
            raise ConfigError(
                f"parallel.context={world.context}: the sequences of {type(self).__name__} cannot be split, set it to 1"
            )

    def sampling(self) -> AbstractContextManager[None]:
        """Around the forward passes of a rollout, which need no gradient: sharded weights may stay gathered in it."""
        return nullcontext()

    def reshard(self) -> None:  # noqa: B027
        """Frees weights that forward passes left gathered: once the shards have changed, those are the old ones."""

    def company(self, bucket: int | None) -> AbstractContextManager[None]:
        """Within it every forward pass goes through the network of `bucket`, whatever the step; None = as ever.

        Ranks of sharded weights make each pass together: those without an item of a bucket keep the others company.
        """
        return nullcontext()

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """Around one of several backward passes whose gradients add up; over sharded ranks they do in the last."""
        return nullcontext()

    @abstractmethod
    def keep_reference(self) -> None:
        """Remember the weights as they are now for `reference`: call it before training and before any resume.

        Costs a copy of the denoiser under full fine-tuning, nothing with LoRA.
        """

    @abstractmethod
    def reference(self) -> AbstractContextManager[None]:
        """Within it, `predict` is the policy as it was before training (LoRA off, or the frozen copy)."""

    @abstractmethod
    def export(self, folder: Path, card: ModelCard) -> None:
        """Write the current weights and a model card so that diffusers alone loads them: a pipeline, or LoRA weights.

        The folder appears whole or not at all. Raises CheckpointError if it is not empty or cannot be written.
        """
