"""What `dancegrpo doctor` predicts against what a run needs: `python benchmarks/doctor.py [RECIPE ...]`.

For each recipe, by default all that run on a CPU: one iteration, after a first one that makes the optimizer's state.
Memory is the peak of live tensors by phase, counted exactly (`dancegrpo.memory.TensorBytes`), on CUDA the peak of its
allocator; seconds are the run's own. The exit code is 1 where the peak of an iteration misses by more than 15 %, or its
seconds by more than 30 %.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from dancegrpo.config import RunConfig, load_config
from dancegrpo.doctor import Plan, diagnose
from dancegrpo.health import Looks
from dancegrpo.memory import TensorBytes
from dancegrpo.rewards import load_reward
from dancegrpo.rewards.scoring import Scoring
from dancegrpo.trainer import Trainer

RECIPES = ("shapes-flux", "shapes-sd", "shapes-video", "shapes-i2v", "shapes-t2i")
MEMORY, SECONDS = 0.15, 0.30
OWN = ["evaluation.num_prompts=0", "tracking.backend=none", "prompts.cache_mb=0"]


def held(trainer: Trainer) -> list[torch.Tensor]:
    """Everything that is there before an iteration."""
    policy: Any = trainer.policy
    networks = [part for part in policy.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    weights = [tensor for part in networks for tensor in (*part.parameters(), *part.buffers())]
    kept = [tensor for kind in trainer.updater.state_dict().values() for tensor in kind.values()]
    return [*weights, *kept, *trainer.updater._landmarks.values()]


def measure(config: RunConfig) -> tuple[dict[str, int], dict[str, float]]:
    """Peak bytes and seconds by phase of an iteration that is not the first."""
    trainer = Trainer(config, {name: load_reward(name, judge) for name, judge in config.rewards.items()})
    trainer.iterate(0)
    gc.collect()
    seconds = {k.removeprefix("seconds/"): v for k, v in trainer.iterate(1).items() if k.startswith("seconds/")}
    gc.collect()
    return peaks(trainer), seconds


def peaks(trainer: Trainer) -> dict[str, int]:
    """Peak bytes by phase of one more iteration."""
    cuda = trainer.policy.device.type == "cuda"
    found: dict[str, int] = {}
    with TensorBytes(held(trainer)) as tracker, ExitStack() as restored:

        def taken() -> int:
            if not cuda:
                return tracker.restart()
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return peak

        def around(owner: Any, name: str, phase: str, before: str = "rollout") -> None:
            plain: Callable[..., Any] = getattr(owner, name)

            def called(*args: Any, **kwargs: Any) -> Any:
                found[before] = max(found.get(before, 0), taken())
                try:
                    return plain(*args, **kwargs)
                finally:
                    found[phase] = max(found.get(phase, 0), taken())

            setattr(owner, name, called)
            restored.callback(setattr, owner, name, plain)

        around(trainer.encoder, "encode", "encode", "encode")
        around(trainer.policy, "decode", "decode")
        around(Scoring, "add", "score")
        around(Scoring, "result", "score")
        around(Looks, "add", "score")
        around(trainer.updater, "update", "update")
        taken()
        trainer.iterate(2)
    return found


def compare(recipe: str, overrides: list[str], calibration: float) -> dict[str, Any]:
    config = load_config(recipe, [*OWN, *overrides])
    measured, seconds = measure(config)
    found = diagnose(config, plan=Plan(calibration=calibration))
    told = {phase["name"]: phase for phase in found.phases}
    rows = {}
    for phase in ("encode", "rollout", "decode", "score", "update"):
        clock = seconds.get("reward" if phase == "score" else phase)
        rows[phase] = {
            "peak": measured.get(phase),
            "predicted_peak": told[phase]["peak_bytes"],
            "seconds": clock,
            "predicted_seconds": told[phase]["seconds"],
        }
    rows["iteration"] = {
        "peak": max(measured.values()),
        "predicted_peak": max(row["predicted_peak"] for row in rows.values()),
        "seconds": seconds["total"],
        "predicted_seconds": found.iteration_seconds,
    }
    return {"recipe": recipe, "phases": rows}


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['recipe']}:",
        "| phase | MB | predicted | ratio | s | predicted | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for phase, row in result["phases"].items():
        sizes = [row["peak"] or 0, row["predicted_peak"]]
        cells = [*(f"{size / 1e6:.1f}" for size in sizes), ratio(row, "peak")]
        clock = [row["seconds"], row["predicted_seconds"]]
        cells += ["-" if value is None else f"{value:.2f}" for value in clock]
        lines.append(f"| {phase} | {' | '.join(cells)} | {ratio(row, 'seconds')} |")
    return "\n".join(lines)


def ratio(row: dict[str, Any], name: str) -> str:
    true, told = row[name], row[f"predicted_{name}"]
    return "-" if not true or told is None else f"{told / true:.2f}"


def holds(result: dict[str, Any]) -> bool:
    row = result["phases"]["iteration"]
    misses = {name: abs(row[f"predicted_{name}"] / row[name] - 1) for name in ("peak", "seconds")}
    return misses["peak"] <= MEMORY and misses["seconds"] <= SECONDS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="recipes, and settings as `dancegrpo train` takes them")
    parser.add_argument("--calibration", type=float, default=10.0, help="seconds of the calibration")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--out", type=Path, help="also write that object to this file")
    args = parser.parse_args()
    overrides = [word for word in args.words if "=" in word]
    results = []
    for recipe in [word for word in args.words if "=" not in word] or RECIPES:
        results.append(compare(recipe, overrides, args.calibration))
        print(table(results[-1]), file=sys.stderr if args.json else sys.stdout, flush=True)
    text = json.dumps({"overrides": overrides, "results": results}, indent=1)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    if args.json:
        print(text)
    raise SystemExit(0 if all(map(holds, results)) else 1)


if __name__ == "__main__":
    main()
