"""What the GPUs of a run send each other in an iteration, computed from the layout alone: nothing of it is measured.

Bytes are those that one GPU receives; in a ring it sends as many. n GPUs, weights sharded over f, samples over c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dancegrpo.doctor.layout import gathered_bytes
from dancegrpo.doctor.phases import Iteration

if TYPE_CHECKING:
    from dancegrpo.doctor.passes import Work

TRAFFIC = ("weights", "gradients", "sequences", "scores")
"""All-gathers of sharded weights, sums of gradients, exchanges of context parallelism, verdicts and step plans."""


def traffic(iteration: Iteration, work: dict[str, Work], judges: int) -> dict[str, int]:
    """Bytes of one iteration that one GPU receives, by `TRAFFIC`."""
    layout, config, update = iteration.layout, iteration.config, work["update"]
    modules = list(iteration.policy.modules.values())
    stored = (gathered_bytes(p, iteration.policy.dtype) for module in modules for p in module.parameters())
    weights = sum(stored) // len(modules)
    gradients = sum(parameter.nbytes for parameter in iteration.updater.parameters.values())
    drawn = sum(phase.calls * phase.times for name, phase in work.items() if name != "update")
    # What stays gathered while sampling is gathered once, with the first forward pass.
    forwards = update.calls * update.times + (drawn if config.parallel.reshard_rollout else min(drawn, 1))
    backwards = update.backwards * update.times if config.parallel.reshard_update else 0
    each = layout.fsdp > 1 and config.parallel.reduce == "each"
    steps = update.times if each else config.update.updates_per_rollout
    rows = iteration.total * (judges * _VERDICT + iteration.plan.trained.shape[1] * _STEP)
    context = layout.context
    attended = sum(phase.attended * phase.times for phase in work.values())
    return {
        # Blocks are gathered for each forward pass and again for the backward one.
        "weights": round(others(layout.fsdp) * weights * (forwards + backwards)),
        "gradients": round(steps * gradients * summed(layout.gpus, layout.fsdp)),
        # q, k, v before and the output after each attention, of a piece of the sequence: all but an own c-th of it.
        "sequences": round(others(context) * attended / context),
        "scores": round(others(layout.gpus) * rows),
    }


_VERDICT, _STEP = 5, 8
"""Bytes of a judge's value with its validity, and of the index of a trained step."""


def others(ranks: int) -> float:
    """What each of `ranks` receives of a whole that is gathered: all but its own part."""
    return (ranks - 1) / ranks


def summed(gpus: int, fsdp: int) -> float:
    """Times the size of the gradients that one of `gpus` receives when they are summed.

    Sharded over `fsdp`: a reduce-scatter, then an all-reduce of the shard among the gpus / fsdp copies; an all-reduce
    is a reduce-scatter and an all-gather.
    """
    copies = gpus // fsdp
    return others(fsdp) + 2 * others(copies) / fsdp
