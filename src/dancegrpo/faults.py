"""Requests to stop; memory that runs out: in which phase, what to change, and the smaller micro-batch to go on with."""

from __future__ import annotations

import gc
import re
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dancegrpo.config import RunConfig
from dancegrpo.errors import OutOfMemoryError
from dancegrpo.watchdog import Place

_SIGNS = ("DefaultCPUAllocator: can't allocate memory", "not enough memory: you tried to allocate", "out of memory")
_REMEDIES = 4
"""Settings named at most, the one that helps most first."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator, of an accelerator or of the CPU, had no more to give."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # cuBLAS and cuDNN allocate for themselves, and the CPU's allocator has no class of its own.
    told = str(error)
    return isinstance(error, RuntimeError) and (any(sign in told for sign in _SIGNS) or "_ALLOC_FAILED" in told)


def free_memory(error: BaseException) -> None:
    """Gives back what the frames behind an out-of-memory error still hold, graphs and activations."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


@contextmanager
def memory_explained(config: RunConfig, place: Place) -> Iterator[None]:
    """Turns an allocator's error into an OutOfMemoryError that names the phase and what helps in it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        told = memory_advice(error, config, place)
        free_memory(error)  # what follows, saving, wants some
        raise OutOfMemoryError(told) from error


def memory_advice(error: BaseException | str, config: RunConfig, place: Place) -> str:
    """One line: where memory ran out, how much was wanted, and the settings that need less there."""
    wanted = re.search(r"tried to allocate ([\d.]+ ?\w+)", str(error), re.IGNORECASE)
    asked = f" ({wanted[1]} more were wanted)" if wanted else ""
    remedies = _remedies(place.phase, config)
    return f"out of memory in {place}{asked}: try {', or '.join(remedies[:_REMEDIES])}"


def _remedies(phase: str, config: RunConfig) -> list[str]:
    """Settings that lower the peak of a phase, those that cost least first; none that is set already."""
    model, rollout = config.model, config.rollout
    offload = [] if model.offload else ["model.offload=true"]
    checkpointing = [] if model.gradient_checkpointing else ["model.gradient_checkpointing=true"]
    host = [] if rollout.store == "host" else ["rollout.store=host"]
    slicing = [] if model.vae_slicing else ["model.vae_slicing=true"]
    tiling = [] if model.vae_tiling else ["model.vae_tiling=true"]
    shard = [f"more processes with parallel.fsdp={config.parallel.fsdp * 2}"]
    smaller = _halved("rollout.batch_size", rollout.batch_size)
    adapters = [] if model.lora else ["model.lora={rank: 32}"]
    match phase:
        case "encode":
            return [*offload, *_halved("prompts.per_iteration", config.prompts.per_iteration), *shard]
        case "rollout":
            return [*smaller, *host, *offload, *shard]
        case "decode":
            return [*slicing, *smaller, *tiling, *offload]
        case "reward":
            return ["a smaller batch_size among the judge's options", "judge: service on another device", *offload]
        case "update":
            micro = _halved("update.micro_batch_size", config.update.micro_batch_size)
            return [*micro, *checkpointing, *host, *offload, *adapters, *shard]
        case "evaluation":
            return [*_halved("evaluation.batch_size", config.evaluation.batch_size), *slicing, *offload, *tiling]
        case _:
            return [*offload, *adapters, *shard]


def _halved(key: str, value: int) -> list[str]:
    return [f"{key}={-(-value // 2)} (now {value})"] if value > 1 else []


class MicroBatchSize:
    """Items per forward and backward pass: as asked for, halved where memory ran out.

    changes: [iteration, part, size] of each halving, from where it holds; a resumed run that is given them computes
    every iteration in the same micro-batches again.
    """

    def __init__(self, asked: int) -> None:
        self.asked = asked
        self.changes: list[list[int]] = []
        self.record: Callable[[Sequence[Sequence[int]]], object] = lambda _: None
        """Told of all changes at each new one, before the run goes on."""

    def at(self, iteration: int, part: int) -> int:
        """The size for one optimizer step."""
        held = [size for since, index, size in self.changes if (since, index) <= (iteration, part)]
        return min([self.asked, *held])

    def halve(self, iteration: int, part: int, items: int) -> int:
        """Half of it from this step on, which has so many items: at most half of those."""
        size = -(-min(self.at(iteration, part), items) // 2)
        self.changes.append([iteration, part, size])
        self.record(self.changes)
        return size


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM finish the iteration and save; a second Ctrl-C interrupts at once.

    Another SIGTERM changes nothing: launchers and schedulers send several.
    """
    stopped = threading.Event()
    previous: dict[int, Any] = {}

    def request(number: int, _: object) -> None:
        stopped.set()
        if number == signal.SIGINT:
            signal.signal(number, previous[number])

    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
