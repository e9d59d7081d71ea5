"""What the builds of all base pipelines share: processes side by side, folders that appear whole, lines of a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from dancegrpo.files import write_atomically


def run_side_by_side(task: Callable[..., None], jobs: Mapping[str, tuple[Any, ...]]) -> None:
    """`task(*arguments)` of every job, each in a process of its own; a single job in this one.

    Raises SystemExit naming the jobs that failed.
    """
    if len(jobs) == 1:
        task(*next(iter(jobs.values())))
        return
    context = multiprocessing.get_context("spawn")
    processes = {name: context.Process(target=task, args=arguments) for name, arguments in jobs.items()}
    for process in processes.values():
        process.start()
    for process in processes.values():
        process.join()
    failed = [name for name, process in processes.items() if process.exitcode != 0]
    if failed:
        raise SystemExit(f"training of {', '.join(failed)} failed: see above.")


def save_pipeline(pipeline: Any, folder: Path, readme: str) -> None:
    """Write a pipeline folder beside its place, then move it there, so that no reader meets half of one."""

    def write(partial: Path) -> None:
        pipeline.save_pretrained(partial, safe_serialization=True)
        (partial / "README.md").write_text(readme, encoding="utf-8")

    write_atomically(folder, write)


def size_in_millions(pipeline: Any) -> float:
    """Parameters of all networks of a pipeline."""
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    return sum(p.numel() for module in modules for p in module.parameters()) / 1e6


def log_line(who: str, line: str) -> None:
    """One line with the time of day, shown at once."""
    print(f"{time.strftime('%H:%M:%S')} {who}: {line}", flush=True)
