"""Ranks: who draws which samples, and what is gathered. With `sharding.py` the only place that knows of them.

Launched by torchrun, every process runs the same loop over the same global lists, and draws and learns from its share.
All that is random is keyed by global indices: the number of ranks changes who computes what, nothing else.
Under context parallelism a few ranks have one share together: each has all of its samples, and computes a piece of
every sequence.
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
from torch.distributed.tensor import DTensor

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

    spare: batches to go through for nothing, because another has more: sharded forward passes are made together.
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
    """The device mesh of the weights, (replicate, fsdp); None in a single process."""
    context: int = 1
    """Ranks over which a sample's sequence is split: neighbours, which have one share of the samples together."""
    sequence_mesh: Any = None
    """The device mesh of the sequences, (share, ring, ulysses); None without context parallelism."""
    settings: ParallelConfig = field(default_factory=ParallelConfig, compare=False)
    place: Place = field(default_factory=Place, compare=False)
    """What this process is doing."""
    launch: Launch | None = field(default=None, compare=False)
    """How the processes were started; None in a single process."""
    watchdog: Watchdog | None = field(default=None, compare=False)

    @property
    def shares(self) -> int:
        """Into how many shares the samples are divided."""
        return self.size // self.context

    @property
    def share(self) -> int:
        """Which of the shares this process works on."""
        return self.rank // self.context

    @property
    def leads(self) -> bool:
        """Whether this process speaks for its share: of those that have it together, the first."""
        return self.piece == 0

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

    @property
    def together(self) -> bool:
        """Whether ranks exchange messages in the middle of a forward pass: what one alone gives up, all must."""
        return self.joint or self.context > 1

    @property
    def with_main(self) -> bool:
        """Whether the main process makes its forward passes with this one: one of them, or both."""
        return self.joint or self.share == 0

    def rows(self, total: int, size: int) -> Share:
        """This process's share of `total` rows that are worked off in batches of `size`.

        Batches are the same ones for any number of ranks; each share is a contiguous run of them, even to one.
        """
        batches = -(-total // size)
        held = [range(*self._run(batches, owner)) for owner in range(self.shares)]
        mine = held[self.share]
        rows = range(min(mine.start * size, total), min(mine.stop * size, total))
        spare = max(map(len, held)) - len(mine) if self.joint else 0
        return Share(rows, total, size, spare)

    def owners(self, total: int, size: int) -> Tensor:
        """(total,) int64: the share that each row is in by `rows(total, size)`."""
        batches, owner = -(-total // size), torch.empty(total, dtype=torch.int64)
        for share in range(self.shares):
            first, last = self._run(batches, share)
            owner[first * size : last * size] = share
        return owner

    def _run(self, count: int, owner: int) -> tuple[int, int]:
        return owner * count // self.shares, (owner + 1) * count // self.shares

    def gather(self, rows: Tensor) -> Tensor:
        """Every share's rows (N_share, ...) one after another, on the CPU; N may differ from share to share.

        Of the ranks that have a share together the first is heard; every rank must ask, and gets all.
        """
        if self.size == 1:
            return rows.cpu()
        return self._of_ranks(rows if self.leads else rows[:0])

    @_meeting
    def _of_ranks(self, rows: Tensor) -> Tensor:
        """Every rank's rows (N_rank, ...) one after another, on the CPU."""
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
        lengths, joined = self._of_ranks(counts).tolist(), self._of_ranks(text)
        return [json.loads(bytes(part.tolist())) for part in joined.split(lengths)]

    def from_main(self, value: Any) -> Any:
        """The main process's plain value, on every process."""
        return self.gather_json(value)[0]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over shares of (N,) values."""
        return self.gather(values.reshape(1, -1)).sum(0).to(values.device) if self.size > 1 else values

    def sum_of_ranks(self, values: Tensor) -> Tensor:
        """The sum over ranks of (N,) values, of what each has for itself: its shards of the weights."""
        return self._of_ranks(values.reshape(1, -1)).sum(0).to(values.device) if self.size > 1 else values

    def largest(self, value: float) -> float:
        """The largest of the ranks' values; NaN where one of them is."""
        return float(self._of_ranks(torch.tensor([value], dtype=torch.float64)).max()) if self.size > 1 else value

    def any(self, value: bool) -> bool:
        """Whether it is so on any rank."""
        return self.largest(float(value)) > 0

    def ask(self, owners: Sequence[int], request: bytes, answer: Callable[[bytes], bytes]) -> bytes:
        """What `answer` says to this process's request, on the rank that `owners` names for it; all ranks must ask.

        A rank holds one request at a time; ranks that answer different ones do not wait for each other.
        """
        told = b""
        for source, owner in enumerate(owners):
            if self.rank == source == owner:
                told = answer(request)
            elif self.rank == source:
                with self.place.meeting():
                    _send(request, owner)
                    told = _receive(owner)
            elif self.rank == owner:
                with self.place.meeting():
                    asked = _receive(source)
                given = answer(asked)
                with self.place.meeting():
                    _send(given, source)
        return told

    @_meeting
    def barrier(self) -> None:
        """Waits for all."""
        if self.size > 1:
            dist.barrier()

    @property
    def piece(self) -> int:
        """Which piece of every sequence is this process's."""
        return self.rank % self.context

    @_meeting
    def whole_sequence(self, piece: Tensor) -> Tensor:
        """The pieces (N, L / context) of the ranks of this share, one after another: (N, L). No gradient."""
        piece = piece.contiguous()
        pieces = [torch.empty_like(piece) for _ in range(self.context)]
        dist.all_gather(pieces, piece, group=self.sequence_mesh.get_group("ulysses"))
        return torch.cat(pieces, dim=1)

    def all_reach(self, name: str, seconds: float = 15.0) -> bool:
        """Whether every rank comes to the same `name` within so many seconds; also after an error, as no message is
        sent that would wait for those who do not come."""
        return self.launch is None or self.launch.all_reach(name, seconds)

    @_meeting
    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Adds up the gradients of plain parameters over all ranks; those of sharded ones were summed as they came.

        Ranks that have a share together hold parts of its gradient, each that of its piece of the sequences: they are
        summed as well.
        """
        plain = [p for p in parameters if not isinstance(p, DTensor)]
        if self.size == 1 or not plain:
            return
        # A weight without a gradient on any rank keeps none: the optimizer then leaves it alone, as in one process.
        used = torch.tensor([p.grad is not None for p in plain], dtype=torch.uint8)
        dist.all_reduce(used, dist.ReduceOp.MAX)
        plain = [p for p, anywhere in zip(plain, used.tolist(), strict=True) if anywhere]
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


def _send(data: bytes, rank: int) -> None:
    dist.send(torch.tensor([len(data)]), rank)
    if data:
        dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), rank)


def _receive(rank: int) -> bytes:
    length = torch.zeros(1, dtype=torch.int64)
    dist.recv(length, rank)
    data = torch.empty(int(length), dtype=torch.uint8)
    if len(data):
        dist.recv(data, rank)
    return data.numpy().tobytes()


@contextmanager
def started(config: ParallelConfig) -> Iterator[World]:
    """The world that torchrun launched this process into; a world of one without it.

    Raises ConfigError where the layout asked for and the processes launched do not fit.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    for name, ranks in (("fsdp", config.fsdp), ("context", config.context)):
        if size % ranks:
            raise ConfigError(
                f"parallel.{name}={ranks} does not divide the {size} process{'es' if size > 1 else ''} launched: start "
                f"with torchrun --nproc-per-node={ranks}, or a multiple of it"
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
            sequences = None
            if config.context > 1:
                # diffusers wants both of its ways to split; ring attention has no CPU path, and is not used.
                layout = {"share": size // config.context, "ring": 1, "ulysses": config.context}
                sequences = init_device_mesh(kind, tuple(layout.values()), mesh_dim_names=tuple(layout))
            meshes: Any = {"mesh": mesh, "sequence_mesh": sequences, "settings": config}
            split: Any = {"fsdp": config.fsdp, "context": config.context}
            yield World(launch.rank, size, **split, **meshes, place=place, launch=launch, watchdog=watchdog)
    finally:
        with at_most(LOST):
            dist.destroy_process_group()
