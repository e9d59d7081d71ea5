"""What the machine has: cores, memory, accelerators, libraries, room on the disk."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dancegrpo.judging import _installed

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")
EXTRAS = ("wandb", "tensorboard", "hf", "ocr")
"""Optional groups of dependencies."""


def describe_machine(output: Path) -> dict[str, Any]:
    """The machine, JSON-able; sizes in bytes. output: the folder whose disk is asked."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    total, free = host_memory()
    return {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "cores": cores,
        "ram": {"total": total, "free": free},
        "accelerators": accelerators(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "extras": {name: _installed(name) for name in EXTRAS},
        "disk": {"folder": str(output), "free": disk_free(output)},
    }


def host_memory() -> tuple[int, int]:
    """(total, free) bytes of the host's memory; free counts what the system's caches would give back."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        held = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
        return held["MemTotal"], held["MemAvailable"]
    except (OSError, KeyError, ValueError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
        return total, total


def accelerators() -> list[dict[str, Any]]:
    """Each accelerator with its name, total and free bytes; free is None where the backend does not say."""
    if not torch.accelerator.is_available():
        return []
    found = []
    for index in range(torch.accelerator.device_count()):
        kind = torch.accelerator.current_accelerator()
        entry: dict[str, Any] = {"device": f"{kind}:{index}", "name": str(kind), "total": None, "free": None}
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info(index)
            entry |= {"name": torch.cuda.get_device_name(index), "total": total, "free": free}
        found.append(entry)
    return found


def disk_free(folder: Path) -> int:
    """Free bytes where `folder` is, or would be made."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
