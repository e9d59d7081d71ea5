"""Settings of a run around its learning: processes, evaluations, checkpoints, health, tracking."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dancegrpo.settings.kinds import Count, Float, Frozen, Positive, PositiveFloat, Seed


class ParallelConfig(Frozen):
    """How the processes that torchrun launched share the work; what a run computes does not depend on it."""

    fsdp: Positive = 1
    """Ranks over which the weights are sharded (FSDP2), those of `context` counted in; the others hold copies."""
    context: Positive = 1
    """Ranks that compute one sample together, each a piece of its sequence (Ulysses)."""
    reshard_rollout: bool = True
    """While sampling, free the gathered weights of a block after its forward pass. `false` keeps them until the update:
    one gather per iteration instead of one per step, for the memory of the whole weights beside no activations."""
    reshard_update: bool = True
    """In the update, free them after the forward pass and gather them again for the backward pass."""
    reduce: Literal["once", "each"] = "once"
    """With fsdp, when gradients are summed over the ranks: `once` per optimizer step, until when each rank holds them
    whole, or after `each` micro-batch, as shards: less memory, more traffic."""
    timeout: PositiveFloat = 1800.0
    """Seconds that a rank may keep others waiting before it counts as hanging: more than the slowest thing that one
    rank does for itself (a judge's answer, an evaluation, a save). A rank that is gone is noticed much sooner."""


class EvaluationConfig(Frozen):
    """Held-out measurement: fixed noise, the deterministic sampler, the deployment resolution and steps."""

    every: Count = 0
    """Iterations between evaluations; 0 = only before the first and after the last."""
    num_prompts: Count = 0
    """Held-out prompts measured; 0 = no evaluation."""
    batch_size: Positive = 64
    seed: Seed = 1234
    """Key of the fixed starting noise."""
    samples: Count = 12
    """Pictures in the fixed-seed sample grid."""


class CheckpointConfig(Frozen):
    """What is kept to resume from."""

    every: Count = 10
    """Iterations between checkpoints; 0 = only after the last."""
    keep: Positive = 2
    """The newest checkpoints that are kept; with `health.watch=rollback` one or two older ones beside them, that a run
    may have to go back to."""
    best: bool = True
    """Also saves at every evaluation, and keeps the checkpoint that was measured best on held-out prompts."""


class HealthConfig(Frozen):
    """What watches over a run, and what it may do (see `docs/health.md`)."""

    watch: Literal["none", "alarms", "rollback"] = "rollback"
    """`none`: nothing; `alarms`: says what it finds; `rollback`: also skips spiking updates, goes back to the last good
    state after several or a collapse, and in the end stops."""
    spike: Annotated[Float, Field(gt=1)] = 8.0
    """A gradient norm this many times its running median is a spike."""
    max_skips: Positive = 3
    """Updates skipped in a row after which the run goes back."""
    max_rollbacks: Count = 3
    """Times a run goes back before it stops instead."""
    factor: Annotated[Float, Field(gt=0, le=1)] = 0.5
    """By which the learning rate is multiplied each time the run goes back."""


class TrackingConfig(Frozen):
    """Where metrics go besides the run's folder."""

    backend: Literal["none", "trackio", "wandb", "tensorboard"] = "trackio"
    project: str = "dancegrpo"
