"""What a second process brings: `python benchmarks/processes.py shapes-flux --processes 2`.

Trains a recipe with one process on one thread and with N processes of one thread each, in turns, and compares the
seconds of an iteration (the first of each run left out). The same prompts, groups and updates in both. The table splits
the seconds by phase, so that what does not scale shows. The target is 0.6 for two processes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

COMMON = [
    "threads=1",
    "evaluation.num_prompts=0",
    "evaluation.samples=0",
    "checkpoint.every=0",
    "tracking.backend=none",
]


def seconds(recipe: str, overrides: list[str], processes: int, folder: Path) -> list[dict[str, float]]:
    """Trains once; the times of each iteration but the first, by phase."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"] if processes > 1 else []
    command = [sys.executable, "-m", *launcher, "dancegrpo", "train", recipe, *COMMON, *overrides, "--out", str(folder)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key.startswith("seconds/")} for row in rows[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="shapes-flux")
    parser.add_argument("overrides", nargs="*", help="settings, key=value")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4, help="runs of each, in turns")
    parser.add_argument("--iterations", type=int, default=5, help="of each run; the first is not counted")
    args = parser.parse_args()
    overrides = [f"iterations={args.iterations}", *args.overrides]
    times: dict[int, list[dict[str, float]]] = {1: [], args.processes: []}
    ratios = []
    with TemporaryDirectory() as scratch:
        for turn in range(args.rounds):
            medians = []
            for count, held in times.items():
                held += (now := seconds(args.recipe, overrides, count, Path(scratch) / f"{turn}-{count}"))
                medians.append(statistics.median(row["seconds/total"] for row in now))
            ratios.append(medians[1] / medians[0])
            print(f"round {turn + 1}: {medians[0]:.2f} s, {medians[1]:.2f} s, ratio {ratios[-1]:.3f}", file=sys.stderr)
    print(f"| phase | 1 process | {args.processes} processes | ratio |\n| --- | --- | --- | --- |")
    for phase in times[1][0]:
        one, several = (statistics.median(row[phase] for row in held) for held in times.values())
        print(f"| {phase.removeprefix('seconds/')} | {one:.3f} s | {several:.3f} s | {several / one:.2f} |")
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    print(f"median of {len(ratios)} paired ratios {statistics.median(ratios):.3f}, from {spread}")


if __name__ == "__main__":
    main()
