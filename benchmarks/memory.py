"""What an iteration's memory grows with: `python benchmarks/memory.py`.

Runs one iteration per row, after a first one that makes the optimizer's state, and measures the peak in bytes: of live
tensors, counted exactly (`dancegrpo.memory.TensorBytes`), on the CPU; of the allocator on CUDA. Each series varies one
number: all steps of the rollout at fixed trained steps, trained steps at fixed steps, optimizer steps per rollout, and
the size of a micro-batch. The peak should grow with trained steps, by the two latents that are kept of each sample and
step, 2 B S 4 bytes, and neither with the other steps nor with updates; the exit code is 1 where it does.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dancegrpo.config import RunConfig, load_config
from dancegrpo.memory import TensorBytes
from dancegrpo.rewards import FunctionReward
from dancegrpo.trainer import Trainer

ALL_STEPS = 0.01
"""Share of a trained step's bytes that a step which is not trained may cost: its noise level is one number a sample."""
TRAINED_STEPS = 0.05
"""Share by which a trained step may miss 2 B S 4 bytes: log-prob, index and statistics of a pair are some numbers."""
UPDATES = 0.01
"""Share by which more optimizer steps may raise the peak."""


@dataclass(frozen=True)
class Setting:
    """One row's numbers."""

    steps: int = 16
    trained: int = 4
    updates: int = 1
    micro_batch: int = 4


@dataclass(frozen=True)
class Row:
    """Peaks in bytes. base: before the iteration. kept: 2 B S 4, what one trained step should cost."""

    setting: Setting
    base: int
    rollout: int
    update: int
    kept: int

    @property
    def peak(self) -> int:
        return max(self.rollout, self.update)


SERIES: dict[str, list[Setting]] = {
    "steps": [Setting(steps=steps) for steps in (8, 16, 32, 64)],
    "trained": [Setting(steps=17, trained=trained) for trained in (2, 4, 8, 16)],
    "updates": [Setting(updates=updates) for updates in (1, 2, 4)],
    "micro_batch": [Setting(micro_batch=size) for size in (2, 4, 8, 16)],
}


def mean_brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """A score that differs between any two samples: every pair is trained."""
    return images.flatten(1).mean(1)


def configured(recipe: str, overrides: list[str], setting: Setting) -> RunConfig:
    steps = list(range(setting.trained))
    own = [
        "prompts.per_iteration=2",
        "prompts.cache_mb=0",
        "rollout.group_size=8",
        "rollout.batch_size=8",
        f"rollout.num_steps={setting.steps}",
        f"rollout.timesteps={{select: list, steps: {steps}}}",
        f"update.updates_per_rollout={setting.updates}",
        f"update.micro_batch_size={setting.micro_batch}",
        "advantage.keep=null",
        "evaluation.num_prompts=0",
        "tracking.backend=none",
    ]
    config = load_config(recipe, [*own, *overrides])
    return load_config(config.model_dump() | {"rewards": {"bright": {"judge": "python:mean_brightness"}}})


def held(trainer: Trainer) -> list[torch.Tensor]:
    """Weights, gradients' buffers and the optimizer's state: what is there before an iteration."""
    networks = [part for part in trainer.policy.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    weights = [tensor for part in networks for tensor in (*part.parameters(), *part.buffers())]
    return weights + [tensor for kind in trainer.updater.state_dict().values() for tensor in kind.values()]


class Meter:
    """Peaks of a call and of the update within it."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.device = trainer, trainer.policy.device
        self.base = self.rollout = self.update = 0

    def measure(self, iteration: int) -> Meter:
        gc.collect()
        updater: Any = self.trainer.updater
        plain = updater.update

        def update(*args: Any) -> Any:
            self.rollout = self._restart()
            return plain(*args)

        updater.update = update
        try:
            with TensorBytes(held(self.trainer)) as self._tracker:
                self.base = self._tracker.live if self.device.type != "cuda" else torch.cuda.memory_allocated()
                self._restart()
                self.trainer.iterate(iteration)
                self.update = self._restart()
        finally:
            updater.update = plain
        return self

    def _restart(self) -> int:
        counted = self._tracker.restart()
        if self.device.type != "cuda":
            return counted
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak


def measure(recipe: str, overrides: list[str], setting: Setting) -> Row:
    config = configured(recipe, overrides, setting)
    trainer = Trainer(config, {"bright": FunctionReward(mean_brightness)})
    trainer.iterate(0)
    told = Meter(trainer).measure(1)
    samples = config.prompts.per_iteration * config.rollout.group_size
    kept = 2 * samples * int(np.prod(trainer.policy.latent_shape)) * 4
    return Row(setting, told.base, told.rollout, told.update, kept)


def slope(rows: list[Row], name: str) -> float:
    """Bytes of peak per unit of a setting, by least squares."""
    return float(np.polyfit([getattr(row.setting, name) for row in rows], [row.peak for row in rows], 1)[0])


def verdict(series: dict[str, list[Row]]) -> dict[str, Any]:
    """What holds, with the numbers; None for a series that was not run."""
    told: dict[str, Any] = {"steps": None, "trained": None, "updates": None}
    if rows := series.get("steps"):
        found = slope(rows, "steps")
        told["steps"] = {"bytes_per_step": found, "holds": found <= ALL_STEPS * rows[0].kept}
    if rows := series.get("trained"):
        found, kept = slope(rows, "trained"), rows[0].kept
        told["trained"] = {
            "bytes_per_step": found,
            "predicted": kept,
            "holds": abs(found - kept) <= TRAINED_STEPS * kept,
        }
    if rows := series.get("updates"):
        growth = max(row.peak for row in rows) / rows[0].peak - 1
        told["updates"] = {"growth": growth, "holds": growth <= UPDATES}
    return told


def table(series: dict[str, list[Row]], told: dict[str, Any]) -> str:
    lines = []
    for name, rows in series.items():
        lines += [
            "",
            f"varying {name}:",
            "| steps | trained | updates | micro-batch | base MB | rollout MB | update MB |",
        ]
        lines.append("|---|---|---|---|---|---|---|")
        for row in rows:
            s = row.setting
            sizes = " | ".join(f"{size / 1e6:.3f}" for size in (row.base, row.rollout, row.update))
            lines.append(f"| {s.steps} | {s.trained} | {s.updates} | {s.micro_batch} | {sizes} |")
    lines.append("")
    if steps := told["steps"]:
        lines.append(
            f"{_word(steps)}: a step that is not trained adds {steps['bytes_per_step']:,.0f} bytes to the peak"
        )
    if trained := told["trained"]:
        found, kept = trained["bytes_per_step"], trained["predicted"]
        lines.append(
            f"{_word(trained)}: a trained step adds {found:,.0f} bytes, predicted {kept:,} ({found / kept:.3f})"
        )
    if updates := told["updates"]:
        lines.append(f"{_word(updates)}: more updates per rollout raise the peak by at most {updates['growth']:.2%}")
    return "\n".join(lines[1:])


def _word(entry: dict[str, Any]) -> str:
    return "holds" if entry["holds"] else "FAILS"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="shapes-flux")
    parser.add_argument("overrides", nargs="*", default=[], help="settings for every row, as `dancegrpo train` takes")
    parser.add_argument("--series", nargs="+", choices=list(SERIES), default=list(SERIES))
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--out", type=Path, help="also write that object to this file")
    args = parser.parse_args()
    series: dict[str, list[Row]] = {}
    done: dict[Setting, Row] = {}
    for name in args.series:
        for setting in SERIES[name]:
            if setting not in done:
                done[setting] = measure(args.recipe, args.overrides, setting)
                print(f"{name}: {setting} done", file=sys.stderr, flush=True)
        series[name] = [done[setting] for setting in SERIES[name]]
    told = verdict(series)
    rows = {name: [asdict(row) | {"peak": row.peak} for row in held_rows] for name, held_rows in series.items()}
    text = json.dumps({"recipe": args.recipe, "overrides": args.overrides, "verdict": told, "series": rows}, indent=1)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text if args.json else table(series, told))
    raise SystemExit(0 if all(entry is None or entry["holds"] for entry in told.values()) else 1)


if __name__ == "__main__":
    main()
