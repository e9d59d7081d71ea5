"""What an iteration says of itself: rewards, groups, seconds, memory."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dancegrpo.algorithms import Advantage
from dancegrpo.rewards.base import Scores


class Clock:
    """Seconds per phase, with the accelerator's queue drained at each boundary.

    Phases may nest and come again: each second counts once, for the innermost phase.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.started = device, time.perf_counter()
        self.seconds: dict[str, float] = {}
        self._within: list[float] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Times the block as `phase`."""
        self._drain()
        started = time.perf_counter()
        self._within.append(0.0)
        yield
        self._drain()
        spent = time.perf_counter() - started
        self.seconds[phase] = self.seconds.get(phase, 0.0) + spent - self._within.pop()
        if self._within:
            self._within[-1] += spent

    def _drain(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def metrics(self) -> dict[str, float]:
        """`seconds/PHASE` for each, and `seconds/total`."""
        total = time.perf_counter() - self.started
        return {**{f"seconds/{phase}": value for phase, value in self.seconds.items()}, "seconds/total": total}


def reward_metrics(scores: Mapping[str, Scores], advantage: Advantage | None, group: Tensor) -> dict[str, Any]:
    """Raw and normalised rewards per judge, groups without signal, masked samples.

    scores: of the B samples, {} where none were drawn. advantage: None where an algorithm has none. group: (B,) int64.
    """
    metrics: dict[str, Any] = {}
    for name, judged in scores.items():
        valid = judged.valid
        metrics[f"reward/{name}/mean"] = _mean(judged.values[valid])
        metrics[f"reward/{name}/std"] = _std(judged.values[valid])
        metrics |= {f"reward/{name}/{extra}": _mean(column[valid]) for extra, column in judged.extra.items()}
        spreads = [_std(judged.values[valid & (group == index)]) for index in group.unique().tolist()]
        known = [spread for spread in spreads if spread is not None]
        metrics[f"reward/{name}/group_std"] = sum(known) / len(known) if known else None
        if advantage is not None and name in advantage.per_judge:
            # Where another judge failed, the advantage is 0 by definition and says nothing of this one.
            normalized = advantage.per_judge[name][valid & advantage.valid]
            metrics[f"reward/{name}/normalized_mean"] = _mean(normalized)
            metrics[f"reward/{name}/normalized_std"] = _std(normalized)
        metrics[f"reward/{name}/masked"] = int((~valid).sum())
    metrics["samples/total"] = len(group) if scores else 0
    if advantage is None:
        return metrics
    selected = advantage.value[advantage.weight > 0]
    return metrics | {
        "advantage/mean": _mean(selected),
        "advantage/std": _std(selected),
        "advantage/abs_max": float(selected.abs().max()) if len(selected) else None,
        "groups/total": len(advantage.silent),
        "groups/zero_spread": int(advantage.silent.sum()),
        "samples/masked": int((~advantage.valid).sum()),
        "samples/selected": len(selected),
    }


def restart_peak(device: torch.device) -> None:
    """Counts `peak_memory_mb` from now on; the peak of a process's resident memory cannot be counted anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mb(device: torch.device) -> float:
    """Peak in MB: of CUDA's allocator since `restart_peak`, elsewhere of the process's resident memory so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def use_threads(count: int) -> int:
    """Gives torch `count` CPU threads, or one per core this process may use where it is 0; returns how many."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(count or available)
    return count or available


def _mean(values: Tensor) -> float | None:
    return float(values.double().mean()) if len(values) else None


def _std(values: Tensor) -> float | None:
    return float(values.double().std()) if len(values) > 1 else None
