"""What reinforcement learning adds to held-out pass rates: `python benchmarks/learning.py RUN_DIR RUN_DIR ...`.

Reads finished runs (one per seed) and prints, for each and for their median, the pass rate before and after on the same
prompts and noise with the deterministic sampler, the paired bootstrap interval, the tasks that rose, and the time.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from dancegrpo.statistics import compare


def read(run: Path, at: int | None = None) -> dict[str, Any]:
    """One run's gain from its first to its last evaluation, or to the one after `at` iterations."""
    files = sorted((run / "evaluations").glob("*.json"))
    last = files[-1] if at is None else run / "evaluations" / f"{at:06}.json"
    before, after = (json.loads(file.read_text()) for file in (files[0], last))
    column = next(name for name in after["columns"] if name.endswith("/pass"))
    comparison = compare(before, after)
    gain, tasks = comparison.overall[column], comparison.tasks[column]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][: after["iteration"]]
    return {
        "run": run.name,
        "iterations": after["iteration"],
        "minutes": sum(row["seconds/total"] for row in rows) / 60,
        "before": gain.before,
        "after": gain.after,
        "gain": gain.gain,
        "interval": [gain.low, gain.high],
        "prompts": gain.n,
        "tasks": {task: round(held.gain, 4) for task, held in tasks.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--at", type=int, help="iterations after which to look; the last evaluation by default")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = [read(run, args.at) for run in args.runs]
    median = statistics.median(result["gain"] for result in results)
    if args.json:
        print(json.dumps({"median_gain": median, "runs": results}, indent=1))
        return
    for r in results:
        low, high = r["interval"]
        risen = sum(gain > 0 for gain in r["tasks"].values())
        print(
            f"{r['run']}: {r['before']:.3f} -> {r['after']:.3f}, gain {r['gain']:+.3f} [{low:+.3f}, {high:+.3f}] on "
            f"{r['prompts']} prompts, {risen} of {len(r['tasks'])} tasks up, {r['iterations']} iterations in "
            f"{r['minutes']:.1f} min of training"
        )
        print("   " + ", ".join(f"{task} {gain:+.3f}" for task, gain in r["tasks"].items()))
    print(f"median gain {median:+.3f}")


if __name__ == "__main__":
    main()
