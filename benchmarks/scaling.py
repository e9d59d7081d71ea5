"""Computing and communication of an iteration on 1 to 64 GPUs, by `dancegrpo doctor`'s model: `python
benchmarks/scaling.py [RECIPE ...]`.

Nothing is measured: operations and bytes are counted on tensors without storage, for recipes whose model is not here.
Seconds are operations over --tflops (1e12 operations per second that each GPU reaches) and bytes over --network (GB per
second that each receives).
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from dancegrpo.config import load_config
from dancegrpo.doctor import quiet
from dancegrpo.doctor.architectures import architecture
from dancegrpo.doctor.predict import Predictor
from dancegrpo.doctor.scaling import TRAFFIC

RECIPES = ("flux-hps", "flux-hps-lora", "hunyuan-video-vq")
GPUS = (1, 8, 16, 32, 64)
PHASES = ("encode", "rollout", "decode", "score", "update")


def rows(recipe: str, overrides: list[str], gpus: list[int], fsdp: int) -> list[dict[str, Any]]:
    found = []
    predictor = Predictor(architecture(load_config(recipe).model), torch.device("cuda"))
    for count in gpus:
        # Batches that every GPU has as many of: what is drawn does not depend on their size.
        config = load_config(recipe, [*overrides, f"parallel.fsdp={min(fsdp, count)}"])
        total = config.prompts.per_iteration * config.rollout.group_size
        share = max(1, total // count)
        batch = max(size for size in range(1, config.rollout.batch_size + 1) if share % size == 0)
        predictor.gpus = count
        told = predictor(load_config(config, [f"rollout.batch_size={batch}"]))
        found.append(
            {
                "gpus": count,
                "fsdp": min(fsdp, count),
                "samples": told.layout.samples(total, batch),
                "operations": sum(sum(told.flops(phase).values()) for phase in PHASES),
                "traffic": told.traffic,
                "peak_bytes": told.iteration_peak,
            }
        )
    return found


def table(recipe: str, found: list[dict[str, Any]], tflops: float, network: float) -> str:
    lines = [
        f"{recipe}:",
        "",
        "| GPUs | sharded over | samples each | PFLOP each | s computing | weights GB | gradients GB | scores kB "
        "| s communicating | share | peak GB |",
        "|" + "---|" * 11,
    ]
    for row in found:
        weights, gradients, sequences, scores = (row["traffic"][name] for name in TRAFFIC)
        computing = row["operations"] / (tflops * 1e12)
        waiting = sum(row["traffic"].values()) / (network * 1e9)
        cells = [row["gpus"], row["fsdp"], row["samples"], f"{row['operations'] / 1e15:,.0f}", f"{computing:,.0f}"]
        cells += [f"{(weights + sequences) / 1e9:,.0f}", f"{gradients / 1e9:,.1f}", f"{scores / 1e3:.1f}"]
        cells += [f"{waiting:,.1f}", f"{waiting / (waiting + computing):.0%}", f"{row['peak_bytes'] / 1e9:.0f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="recipes, and settings as `dancegrpo train` takes them")
    parser.add_argument("--gpus", type=int, nargs="+", default=list(GPUS))
    parser.add_argument("--fsdp", type=int, default=8, help="over how many of them weights are sharded, at most")
    parser.add_argument("--tflops", type=float, default=400.0)
    parser.add_argument("--network", type=float, default=50.0, help="GB per second into each GPU")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    overrides = [word for word in args.words if "=" in word]
    results = {}
    for recipe in [word for word in args.words if "=" not in word] or RECIPES:
        with quiet():
            results[recipe] = rows(recipe, overrides, args.gpus, args.fsdp)
        if not args.json:
            print(table(recipe, results[recipe], args.tflops, args.network), flush=True)
    if args.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
