"""What an iteration says of itself: rewards, groups, pictures, seconds, memory."""

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
from dancegrpo.config import RunConfig
from dancegrpo.distributed import World
from dancegrpo.image_statistics import STATISTICS
from dancegrpo.rewards.base import Scores, as_media
from dancegrpo.sampling import step_plan
from dancegrpo.sde import Dynamics
from dancegrpo.settings import POLICY_GRADIENT
from dancegrpo.watchdog import Place

THUMBNAIL = 8
"""Pixels a side of the small pictures that are compared within a group."""
ONE_COLOR = 2.5 / 255
"""A picture whose channels each range over less than this is blank."""


class Clock:
    """Seconds per phase, with the accelerator's queue drained at each boundary.

    Phases may nest and come again: each second counts once, for the innermost phase.
    """

    def __init__(self, device: torch.device, place: Place | None = None) -> None:
        """place: told of the phases as they come."""
        self.device, self.started, self.place = device, time.perf_counter(), place or Place()
        self.seconds: dict[str, float] = {}
        self._within: list[float] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Times the block as `phase`."""
        self._drain()
        started = time.perf_counter()
        self._within.append(0.0)
        with self.place.within(phase):
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


class Looks:
    """What an iteration's samples look like, taken piece by piece as they pass by the judges."""

    def __init__(self) -> None:
        self._columns: dict[str, list[Tensor]] = {}
        self._thumbnails: list[Tensor] = []

    @torch.no_grad()
    def add(self, media: Tensor) -> None:
        """The next samples, (N, F, 3, H, W) float in [0, 1] or uint8; nothing of their size is kept."""
        media = as_media(media).detach()
        columns = {name: statistic(media) for name, statistic in STATISTICS.items()}
        low, high = media.amin((1, 3, 4)), media.amax((1, 3, 4))  # a NaN stays one
        columns["blank"] = (~((high - low).amax(1) >= ONE_COLOR)).float()
        for name, column in columns.items():
            self._columns.setdefault(name, []).append(column)
        frames = media.flatten(0, 1).float().clamp(0, 1)
        small = torch.nn.functional.adaptive_avg_pool2d(frames, THUMBNAIL)
        self._thumbnails.append(small.reshape(len(media), -1))

    def gathered(self, world: World) -> Looks:
        """Those of all ranks' samples, in their order; every rank must ask."""
        if world.size == 1 or not self._columns:  # all ranks draw, or none does
            return self
        whole = Looks()
        whole._columns = {n: [world.gather(torch.cat(parts))] for n, parts in sorted(self._columns.items())}
        whole._thumbnails = [world.gather(torch.cat(self._thumbnails))]
        return whole

    def metrics(self, group: Tensor, advantage: Advantage | None = None) -> dict[str, float | None]:
        """What valid samples look like; {} where no samples came.

        `image/STATISTIC`, with `/std` between samples and `/reward`, its correlation with the advantage within groups;
        `image/diversity`; `image/blank`, the share of all samples that are of one colour or not finite. group: (B,)
        int64. advantage: None where an algorithm has none, and every sample is valid.
        """
        if not self._columns:
            return {}
        columns = {name: torch.cat(parts).cpu() for name, parts in self._columns.items()}
        metrics: dict[str, float | None] = {"image/blank": _mean(columns.pop("blank"))}
        valid, group = torch.stack(list(columns.values())).isfinite().all(0), group.cpu()
        if advantage is not None:
            valid = valid & advantage.valid.cpu()
        for name, column in columns.items():
            metrics |= {f"image/{name}": _mean(column[valid]), f"image/{name}/std": _std(column[valid])}
            if advantage is not None:
                paid = advantage.value.cpu()[valid]
                metrics[f"image/{name}/reward"] = correlation(column[valid], paid, group[valid])
        metrics["image/diversity"] = diversity(torch.cat(self._thumbnails).cpu(), group, valid)
        return metrics


def correlation(a: Tensor, b: Tensor, group: Tensor) -> float | None:
    """Pearson's, within each group, averaged over those of three or more where both differ; None where there is none.

    a, b: (B,). group: (B,) int64.
    """
    found = []
    for index in group.unique().tolist():
        x, y = (values[group == index].double() for values in (a, b))
        x, y = x - x.mean(), y - y.mean()
        sizes = float(x.norm()), float(y.norm())
        if len(x) > 2 and min(sizes) > 1e-6:  # below it is rounding
            found.append(float(x @ y) / (sizes[0] * sizes[1]))
    return sum(found) / len(found) if found else None


def diversity(pictures: Tensor, group: Tensor, valid: Tensor) -> float | None:
    """How far a group's pictures lie apart: root-mean-square distance per value, mean over pairs, then over groups.

    pictures: (B, D) in [0, 1]. group: (B,) int64. valid: (B,) bool. 0 = all equal, 1 = black against white; None where
    no group has two valid samples.
    """
    found = []
    for index in group.unique().tolist():
        members = pictures[(group == index) & valid].double()
        if len(members) > 1:
            found.append(float(torch.pdist(members).mean()) / members.shape[1] ** 0.5)
    return sum(found) / len(found) if found else None


def log_prob_rounding(config: RunConfig, dynamics: Dynamics, iteration: int = 0) -> float | None:
    """By how much float32 may round a trained step's log-prob, per latent element, at the step with the least noise.

    A latent of size 1 is known to 6e-8; divided by the step's standard deviation that is what its log-prob is known to.
    None where the algorithm has no ratio, or sums log-probs over elements.
    """
    if config.algorithm.name not in POLICY_GRADIENT or config.algorithm.log_prob_reduction != "mean":
        return None
    plan = step_plan(config.rollout, dynamics, 1, config.seed, iteration)
    step, level = plan.trained.flatten(), plan.noise_level.gather(1, plan.trained).flatten()
    zeros = torch.zeros(len(step), 1)
    std = dynamics.to("cpu").transition(zeros, zeros, step, level).std
    return torch.finfo(torch.float32).eps / 2 / float(std.min())


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


def use_threads(count: int, neighbours: int = 1) -> int:
    """Gives torch `count` CPU threads, or where it is 0 its share of the cores; returns how many.

    neighbours: processes of this run on this machine, this one included.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    available = max(1, cores // neighbours)
    torch.set_num_threads(count or available)
    return count or available


def _mean(values: Tensor) -> float | None:
    return float(values.double().mean()) if len(values) else None


def _std(values: Tensor) -> float | None:
    return float(values.double().std()) if len(values) > 1 else None
