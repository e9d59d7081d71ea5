"""How the GPUs of a run share it: what lies on one of them, and which part of the work is its own."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dancegrpo.config import RunConfig
from dancegrpo.distributed import World
from dancegrpo.errors import ConfigError
from dancegrpo.run_checks import require_batches

PREFETCHED = 2
"""Blocks whose weights are gathered at once: the one at work, and the next, which FSDP2 fetches meanwhile."""


@dataclass(frozen=True)
class Layout:
    """gpus: all of a run. fsdp: over how many of them weights are sharded. context: over how many one sample is."""

    gpus: int = 1
    fsdp: int = 1
    context: int = 1

    @property
    def shares(self) -> int:
        """Into how many shares the samples are divided."""
        return self.gpus // self.context

    def samples(self, total: int, batch: int) -> int:
        """The most samples of `total` that one GPU has: whole batches."""
        return min(total, math.ceil(math.ceil(total / batch) / self.shares) * batch)

    def items(self, total: int) -> int:
        """The most (sample, step) items of `total` that one GPU has."""
        return math.ceil(total / self.shares)


ONE = Layout()
"""A single device."""


def layout_of(config: RunConfig, gpus: int | None = None) -> Layout:
    """The layout of a recipe on `gpus` devices; None = as few as its `parallel` settings need.

    Raises ConfigError where they do not go together, or a GPU would have nothing to sample.
    """
    fsdp, context = config.parallel.fsdp, config.parallel.context
    least = math.lcm(fsdp, context)
    gpus = least if gpus is None else gpus
    if gpus < 1 or gpus % least:
        near = max(1, gpus // least) * least
        needed = f"parallel.fsdp={fsdp}" if context == 1 else f"parallel.fsdp={fsdp} and parallel.context={context}"
        raise ConfigError(f"--gpus {gpus} is no multiple of what {needed} needs: use {near}")
    layout = Layout(gpus, fsdp, context)
    if not config.offline:
        require_batches(config, World(size=layout.shares, fsdp=fsdp))
    return layout


@dataclass(frozen=True)
class Sharded:
    """Bytes of denoisers on one GPU. own: its shards, all the time. gathered: what is whole while they compute."""

    own: int
    gathered: int
    whole: int
    """All of them at once: what is gathered where blocks are not resharded after their forward pass."""


def gathered_bytes(parameter: Tensor, dtype: torch.dtype) -> int:
    """Of a weight as FSDP2 gathers it: in the run's `dtype` where that is the smaller one."""
    size = parameter.element_size()
    return parameter.numel() * (min(size, dtype.itemsize) if parameter.is_floating_point() else size)


def sharded(networks: Iterable[nn.Module], fsdp: int, dtype: torch.dtype = torch.float32) -> Sharded:
    """Denoisers as FSDP2 lays them out: repeated blocks one by one, and what is left of each network. dtype: the run's.

    What is left is gathered with the first forward pass and stays whole until the next backward pass ends. Buffers are
    not sharded.
    """
    own = gathered = whole = 0
    for network in networks:
        inner: set[int] = set()
        largest = 0
        for block in repeated_blocks(network):
            parameters = list(block.parameters())
            inner |= {id(parameter) for parameter in parameters}
            largest = max(largest, sum(gathered_bytes(parameter, dtype) for parameter in parameters))
        left = sum(gathered_bytes(p, dtype) for p in network.parameters() if id(p) not in inner)
        own += sum(shard_bytes(p, fsdp) for p in network.parameters()) + sum(b.nbytes for b in network.buffers())
        gathered += 0 if fsdp == 1 else left + PREFETCHED * largest
        whole += 0 if fsdp == 1 else sum(gathered_bytes(p, dtype) for p in network.parameters())
    return Sharded(own, gathered, whole)


def repeated_blocks(network: Any) -> list[nn.Module]:
    """The blocks that FSDP2 shards one by one: those that diffusers' class names."""
    names = set(getattr(network, "_repeated_blocks", None) or ())
    return [part for part in network.modules() if type(part).__name__ in names]


def shard_bytes(tensor: Tensor, ranks: int) -> int:
    """Bytes of the largest shard of a tensor that is cut along its first dimension."""
    if ranks == 1 or not tensor.ndim or not len(tensor):
        return tensor.nbytes
    return math.ceil(len(tensor) / ranks) * (tensor.nbytes // len(tensor))


def gradient_bytes(parameters: Iterable[Tensor], networks: Iterable[nn.Module], fsdp: int, micro_batches: int) -> int:
    """Gradients on one GPU: its shards, and those that are still whole.

    micro_batches: after which they are summed over the ranks. Gradients of several are added up whole; those of a
    single one go block by block.
    """
    trained = list(parameters)
    if fsdp == 1:
        return sum(parameter.nbytes for parameter in trained)
    own = sum(shard_bytes(parameter, fsdp) for parameter in trained)
    if micro_batches > 1:
        return own + sum(parameter.nbytes for parameter in trained)
    known = {id(parameter) for parameter in trained}
    blocks = [sum(p.nbytes for p in b.parameters() if id(p) in known) for n in networks for b in repeated_blocks(n)]
    return own + PREFETCHED * max(blocks, default=0)
