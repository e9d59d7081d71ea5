"""What would only show hours into a run, refused before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dancegrpo.config import RunConfig
from dancegrpo.distributed import World
from dancegrpo.errors import ConfigError
from dancegrpo.policies import Policy
from dancegrpo.prompts import Prompt, PromptSource


def require_batches(config: RunConfig, world: World) -> None:
    """Raises ConfigError where a rank would have nothing to sample, or a judge would be asked by all at once."""
    ranks, who = world.shares, "ranks" if world.context == 1 else f"times parallel.context={world.context} ranks"
    total, size = config.prompts.per_iteration * config.rollout.group_size, config.rollout.batch_size
    if ranks > -(-total // size):
        raise ConfigError(
            f"{total} samples in batches of rollout.batch_size={size} are too few for {ranks} {who}: lower it to "
            f"{max(1, total // ranks)}, or start fewer processes"
        )


def require_judges(config: RunConfig, world: World) -> None:
    """Raises ConfigError for judges that cannot be where they are to be; before any is loaded."""
    if config.algorithm.name == "refl":
        placed = [name for name, reward in config.rewards.items() if reward.ranks != "all"]
        if placed:
            raise ConfigError(
                f"rewards.{placed[0]}.ranks={_listed(config.rewards[placed[0]].ranks)} does not go with "
                "algorithm.name=refl, which asks judges on every rank while it learns: set it to all"
            )
    people = [name for name, reward in config.rewards.items() if reward.judge == "human"]
    if world.size > 1 and people:
        raise ConfigError(
            f"rewards.{people[0]}.judge=human would open a page on each of {world.size} processes: serve it "
            "with `dancegrpo serve-reward human` and take judge=service"
        )


def _listed(ranks: Any) -> str:
    return ranks if isinstance(ranks, str) else str(list(ranks))


def refuse_idle_negative(config: RunConfig, policy: Policy) -> None:
    """Raises ConfigError for a negative prompt that the model would never be told."""
    negative, model = config.prompts.negative, config.model
    if negative and not policy.guided:
        scale = "true_cfg_scale" if "true_cfg_scale" in getattr(policy, "settings", ()) else "guidance_scale"
        raise ConfigError(
            f"prompts.negative={negative!r} would do nothing: {model.path} at model.{scale}="
            f"{getattr(model, scale):g} uses no classifier-free guidance; leave it empty"
        )


def require_images(config: RunConfig, policy: Policy, train: PromptSource, held_out: Sequence[Prompt]) -> None:
    """Raises ConfigError where the model animates images and the prompts bring none."""
    if not policy.takes_image:
        return
    prompts = config.prompts
    lacking = next((f"held-out prompt {prompt.id}" for prompt in held_out if prompt.image is None), None)
    for key, source, place in (
        ("train", prompts.train, train.first_without_image),
        ("evaluation", prompts.evaluation, lacking),
    ):
        if place is not None:
            raise ConfigError(
                f"prompts.{key}={source} has prompts without images ({place} first), and {config.model.path} "
                "animates images: give each an `image`, or draw them first (`dancegrpo make-images`)"
            )
