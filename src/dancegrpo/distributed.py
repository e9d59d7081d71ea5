"""Ranks: who draws which samples, what is gathered, how weights are sharded. The only place that knows of them.

Launched by torchrun, every process runs the same loop over the same global lists, and draws and learns from its share.
All that is random is keyed by global indices: the number of ranks changes who computes what, nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dancegrpo.errors import ConfigError
from dancegrpo.launch import Launch
from dancegrpo.settings import ParallelConfig
from dancegrpo.watchdog import LOST, Place, Watchdog, at_most, watching

_MARGIN = 60.0
"""Seconds that the process group waits beyond `parallel.timeout`: the watchdog, which knows who hangs, comes first."""
_START = 600.0
"""Seconds within which all processes must have started."""

P = ParamSpec("P")
R = TypeVar("R")


def _meeting(method: Callable[Concatenate[World, P], R]) -> Callable[Concatenate[World, P], R]:
    """A method in which ranks wait for each other: the place says so meanwhile."""

    @wraps(method)
    def met(self: World, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.place.meeting():
            return method(self, *args, **kwargs)

    return met


@dataclass(frozen=True)
class Share:
    """The rows of one process: `rows` of 0..total - 1 in whole batches of `size`.

    spare: batches to go through for nothing, because another rank has more: sharded forward passes are made together.
    """

    rows: range
    total: int
    size: int
    spare: int

    @property
    def slice(self) -> slice:
        """The rows as a slice of the whole."""
        return slice(self.rows.start, self.rows.stop)

    def batches(self) -> Iterator[Tensor]:
        """The own rows, batch by batch, (N,) int64."""
        for first in range(self.rows.start, self.rows.stop, self.size):
            yield torch.arange(first, min(first + self.size, self.rows.stop))

    def spares(self) -> Iterator[Tensor]:
        """Rows of batches whose results nobody wants."""
        for _ in range(self.spare):
            yield torch.arange(min(self.size, self.total))

    def places(self, rows: Tensor) -> Tensor:
        """Where own rows lie among the own ones."""
        return rows - self.rows.start


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them. A single process is a world of its own, and needs no launcher."""

    rank: int = 0
    size: int = 1
    fsdp: int = 1
    """Ranks over which weights are sharded."""
    mesh: Any = None
    """The device mesh, (replicate, fsdp); None in a single process."""
    place: Place = field(default_factory=Place, compare=False)
    """What this process is doing."""
    launch: Launch | None = field(default=None, compare=False)
    """How the processes were started; None in a single process."""
    watchdog: Watchdog | None = field(default=None, compare=False)

    @property
    def main(self) -> bool:
        """Whether this process writes, prints and tracks for all."""
        return self.rank == 0

    @property
    def neighbours(self) -> int:
        """Processes of this run on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.size > 1 else 1

    @property
    def joint(self) -> bool:
        """Whether ranks make forward passes together: sharded weights want all of them each time."""
        return self.fsdp > 1

    def rows(self, total: int, size: int) -> Share:
        """This process's share of `total` rows that are worked off in batches of `size`.

        Batches are the same ones for any number of ranks; each rank has a contiguous run of them, even to one.
        """
        batches = -(-total // size)
        held = [range(*self._run(batches, owner)) for owner in range(self.size)]
        mine = held[self.rank]
        rows = range(min(mine.start * size, total), min(mine.stop * size, total))
        spare = max(map(len, held)) - len(mine) if self.joint else 0
        return Share(rows, total, size, spare)

    def owners(self, total: int, size: int) -> Tensor:
        """(total,) int64: the rank that has each row in `rows(total, size)`."""
        batches, owner = -(-total // size), torch.empty(total, dtype=torch.int64)
        for rank in range(self.size):
            first, last = self._run(batches, rank)
            owner[first * size : last * size] = rank
        return owner

    def _run(self, count: int, owner: int) -> tuple[int, int]:
        return owner * count // self.size, (owner + 1) * count // self.size

    @_meeting
    def gather(self, rows: Tensor) -> Tensor:
        """Every rank's rows (N_rank, ...) one after another, on the CPU; N may differ from rank to rank."""
        if self.size == 1:
            return rows.cpu()
        rows = rows.detach().cpu()
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([len(rows)]))
        buffer = rows.new_zeros(max(map(int, counts)), *rows.shape[1:])
        buffer[: len(rows)] = rows
        parts = [torch.empty_like(buffer) for _ in range(self.size)]
        dist.all_gather(parts, buffer)
        return torch.cat([parts[rank][: int(counts[rank])] for rank in range(self.size)])

    def gather_json(self, value: Any) -> list[Any]:
        """A plain value of every rank, in their order."""
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).clone()
        counts = torch.tensor([len(text)])
        lengths, joined = self.gather(counts).tolist(), self.gather(text)
        return [json.loads(bytes(part.tolist())) for part in joined.split(lengths)]

    def from_main(self, value: Any) -> Any:
        """The main process's plain value, on every process."""
        return self.gather_json(value)[0]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks of (N,) values."""
        return self.gather(values.reshape(1, -1)).sum(0).to(values.device) if self.size > 1 else values

    def largest(self, value: float) -> float:
        """The largest of the ranks' values; NaN where one of them is."""
        return float(self.gather(torch.tensor([value], dtype=torch.float64)).max()) if self.size > 1 else value

    def any(self, value: bool) -> bool:
        """Whether it is so on any rank."""
        return self.largest(float(value)) > 0

    @_meeting
    def barrier(self) -> None:
        """Waits for all."""
        if self.size > 1:
            dist.barrier()

    def all_reach(self, name: str, seconds: float = 15.0) -> bool:
        """Whether every rank comes to the same `name` within so many seconds; also after an error, as no message is
        sent that would wait for those who do not come."""
        return self.launch is None or self.launch.all_reach(name, seconds)

    @_meeting
    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Adds up the gradients of plain parameters over all ranks; those of sharded ones were summed as they came."""
        plain = [p for p in parameters if not isinstance(p, DTensor)]
        if self.size == 1 or not plain:
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in plain]
        for p, summed in zip(plain, self._summed(gradients), strict=True):
            p.grad = summed

    def _summed(self, tensors: Sequence[Tensor], bucket: int = 32_000_000) -> Iterator[Tensor]:
        """Sums over all ranks, many tensors to a message."""
        held: list[Tensor] = []
        for index, tensor in enumerate(tensors):
            held.append(tensor)
            if sum(each.numel() for each in held) >= bucket or index + 1 == len(tensors):
                flat = torch.cat([each.reshape(-1) for each in held])
                dist.all_reduce(flat)
                sizes = [each.numel() for each in held]
                yield from (part.view_as(each) for part, each in zip(flat.split(sizes), held, strict=True))
                held = []


ALONE = World()


@contextmanager
def started(config: ParallelConfig) -> Iterator[World]:
    """The world that torchrun launched this process into; a world of one without it.

    Raises ConfigError where the layout asked for and the processes launched do not fit.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size % config.fsdp:
        raise ConfigError(
            f"parallel.fsdp={config.fsdp} does not divide the {size} process{'es' if size > 1 else ''} launched: start "
            f"with torchrun --nproc-per-node={config.fsdp}, or a multiple of it"
        )
    if size == 1:
        yield World()
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
    launch = Launch.join(_START)
    # What is gathered by hand is small and on the host: gloo carries it, NCCL the weights and gradients.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    patience = timedelta(seconds=config.timeout + _MARGIN)
    dist.init_process_group(backend, store=launch.store, rank=launch.rank, world_size=size, timeout=patience)
    place = Place()
    try:
        with watching(launch, place, config.timeout) as watchdog:
            kind = "cuda" if torch.cuda.is_available() else "cpu"
            layout = {"replicate": size // config.fsdp, "fsdp": config.fsdp}
            mesh = init_device_mesh(kind, tuple(layout.values()), mesh_dim_names=tuple(layout))
            yield World(launch.rank, size, config.fsdp, mesh, place, launch, watchdog)
    finally:
        with at_most(LOST):
            dist.destroy_process_group()


def shard(module: Any, world: World) -> None:
    """FSDP2 on a denoiser: its repeated blocks one by one, then what is left.

    Gradients are summed over all ranks, not averaged: the loss of each is already divided by the whole batch's count.
    """
    mesh = world.mesh if world.size > world.fsdp else world.mesh["fsdp"]
    names = set(getattr(module, "_repeated_blocks", None) or ())
    for block in [part for part in module.modules() if type(part).__name__ in names]:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for part in sharded(module):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum


def sharded(module: Any) -> list[Any]:
    """The parts of a module that FSDP2 manages; none in a single process."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def local(tensor: Tensor) -> Tensor:
    """What of a weight lies on this rank: itself, or its shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A weight put together from all ranks; itself where it is not sharded. Every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_out(tensor: Tensor, like: Tensor, *, copy: bool = False) -> Tensor:
    """A whole tensor as `like` is laid out: on its device, this rank's shard of it where it is sharded."""
    if isinstance(tensor, DTensor):
        return tensor
    if not isinstance(like, DTensor):
        return tensor.to(like.device, copy=copy)
    # Every rank has read the same tensor: nothing needs to be sent.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def first_element(weight: Tensor) -> int:
    """Where this rank's shard begins in the whole weight, laid out flat; 0 where it is not sharded."""
    if not isinstance(weight, DTensor):
        return 0
    for dimension, placement in enumerate(weight.placements):
        if isinstance(placement, Shard):
            ranks = weight.device_mesh.size(dimension)
            rows = -(-weight.shape[0] // ranks) * weight.device_mesh.get_local_rank(dimension)
            return min(rows, weight.shape[0]) * (weight.numel() // max(1, weight.shape[0]))
    return 0
