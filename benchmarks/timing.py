"""What the benchmarks share."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def timed(call: Callable[[], object]) -> float:
    """Seconds that `call` takes, the accelerator's queue drained."""
    started = time.perf_counter()
    call()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - started
