"""What this machine reaches: operations per second of each kind, in the run's arithmetic, and bytes per second."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dancegrpo.doctor.counting import KINDS

BUDGET = 10.0
"""Seconds of a whole calibration."""


@dataclass(frozen=True)
class Speed:
    """flops: operations per second by kind. disk: bytes per second, written and flushed."""

    flops: dict[str, float]
    disk: float

    def seconds(self, flops: dict[str, int]) -> float:
        """Time of so many operations of each kind."""
        return sum(count / self.flops[kind] for kind, count in flops.items())


def calibrate(device: torch.device, dtype: torch.dtype, folder: Path, budget: float = BUDGET) -> Speed:
    """Times a matrix product, a convolution and attention, forwards, and a file in `folder`; `budget` in seconds."""
    share = budget / (len(KINDS) + 1)
    flops = {kind: _rate(*_work(kind, device, dtype), device, share) for kind in KINDS}
    return Speed(flops, write_rate(folder))


def _work(kind: str, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """What is run, and its operations. Sizes: those of a network's layers, smaller on a CPU."""
    large = device.type != "cpu"
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    if kind == "product":
        side = 4096 if large else 768
        a, b = (torch.randn(side, side, **options) for _ in range(2))
        return lambda: a @ b, 2.0 * side**3
    if kind == "convolution":
        channels, side = (256, 128) if large else (64, 48)
        x = torch.randn(4, channels, side, side, **options)
        w = torch.randn(channels, channels, 3, 3, **options)
        return lambda: torch.nn.functional.conv2d(x, w, padding=1), 2.0 * 4 * side**2 * channels**2 * 9
    tokens, heads = (4096, 24) if large else (512, 8)
    q = torch.randn(1, heads, tokens, 64, **options)
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q), 4.0 * heads * tokens**2 * 64


@torch.no_grad()
def _rate(work: Callable[[], object], flops: float, device: torch.device, seconds: float) -> float:
    """Operations per second, the median of runs within `seconds`."""
    times: list[float] = []
    work()  # the first one chooses kernels
    _drain(device)
    until = time.perf_counter() + seconds
    while not times or time.perf_counter() < until:
        started = time.perf_counter()
        work()
        _drain(device)
        times.append(time.perf_counter() - started)
    return flops / sorted(times)[len(times) // 2]


def _drain(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def write_rate(folder: Path, size: int = 16_000_000) -> float:
    """Bytes per second to the disk of `folder`, or of the nearest folder above that is there."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    data = os.urandom(size)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            started = time.perf_counter()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            return size / (time.perf_counter() - started)
    except OSError:  # full, or closed to us: the checks say so
        return 200e6
