"""What reinforcement learning adds to held-out pass rates: `python benchmarks/learning.py RUN_DIR RUN_DIR ...`.

Reads finished runs (one per seed) and prints, for each and for their median, the pass rate before and after on the same
prompts and noise with the deterministic sampler, the paired bootstrap interval, the tasks that rose, and the time. With
`--column motion` another column than the pass rate; every column follows, with its share of the way to 1 and how many
standard errors it moved.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from dancegrpo.statistics import PairedGain, compare


def read(run: Path, at: int | None = None, column: str | None = None) -> dict[str, Any]:
    """One run's gain in a column (the pass rate) from its first to its last evaluation, or the one after `at`."""
    files = sorted((run / "evaluations").glob("*.json"))
    last = files[-1] if at is None else run / "evaluations" / f"{at:06}.json"
    before, after = (json.loads(file.read_text()) for file in (files[0], last))
    column = column or next(name for name in after["columns"] if name.endswith("/pass"))
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
        "columns": {name: moved(before, after, name, held) for name, held in comparison.overall.items()},
    }


def moved(before: dict[str, Any], after: dict[str, Any], column: str, gain: PairedGain) -> dict[str, float]:
    """A column's means, gain, share of the way to 1, and gain in standard errors of the paired difference."""
    pairs = zip(before["columns"][column], after["columns"][column], strict=True)
    differences = [b - a for a, b in pairs if a is not None and b is not None]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    share = gain.gain / (1 - gain.before) if gain.before < 1 else 0.0
    told = {"before": gain.before, "after": gain.after, "gain": gain.gain, "share_of_distance": share}
    return told | {"standard_errors": gain.gain / error if error else 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--at", type=int, help="iterations after which to look; the last evaluation by default")
    parser.add_argument("--column", help="what to look at, `motion` or `motion/vq` say; the pass rate by default")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = [read(run, args.at, args.column) for run in args.runs]
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
        for name, c in r["columns"].items() if args.column else ():
            print(
                f"   {name}: {c['before']:.3f} -> {c['after']:.3f} ({c['gain']:+.3f}, {c['share_of_distance']:+.0%} of "
                f"the way to 1, {c['standard_errors']:+.1f} standard errors)"
            )
    print(f"median gain {median:+.3f}")


if __name__ == "__main__":
    main()
