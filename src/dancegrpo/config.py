"""The settings of a run: from a recipe and overrides to a validated `RunConfig`. Its groups live in `settings`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError, model_validator

from dancegrpo.errors import ConfigError
from dancegrpo.recipes import apply_override, read_recipe, recipe_names, refuse_interpolation, to_yaml
from dancegrpo.recipes.messages import explain
from dancegrpo.settings import (
    POLICY_GRADIENT,
    AdvantageConfig,
    AlgorithmConfig,
    CheckpointConfig,
    Count,
    EMAConfig,
    EvaluationConfig,
    Frozen,
    HealthConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PromptsConfig,
    RewardConfig,
    RolloutConfig,
    Seed,
    TrackingConfig,
    UpdateConfig,
)

Settings = TypeVar("Settings", bound=BaseModel)


class RunConfig(Frozen):
    """Everything that determines a run."""

    name: Annotated[str, Field(pattern=r"^[^/\\]+$")]
    """The run's own name; a recipe file's name where it states none."""
    description: str = ""
    seed: Seed = 0
    iterations: Count = 100
    threads: Count = 0
    """CPU threads; 0 = one per core this process may use."""
    output: str = "runs"
    """Folder in which the run's own folder is made."""
    model: ModelConfig
    prompts: PromptsConfig
    rollout: RolloutConfig = RolloutConfig()
    rewards: dict[Annotated[str, Field(pattern=r"^[\w-]+$")], RewardConfig]
    """Judges by a name of the user's choosing. In a recipe, `NAME: null` takes a base's judge away."""
    advantage: AdvantageConfig = AdvantageConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    update: UpdateConfig = UpdateConfig()
    ema: EMAConfig = EMAConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    parallel: ParallelConfig = ParallelConfig()
    health: HealthConfig = HealthConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        self._check_groups()
        self._check_updates()
        if self.model.dtype == "float16":
            raise ValueError("model.dtype=float16 loses small gradients to underflow: use bfloat16 or float32 to train")
        if self.model.quantize is not None and self.parallel.fsdp > 1:
            raise ValueError(
                f"parallel.fsdp={self.parallel.fsdp} shards no model.quantize={self.model.quantize}: use one"
            )
        wanted = self.evaluation.num_prompts
        if wanted and not self.prompts.evaluation:
            raise ValueError(f"evaluation.num_prompts={wanted} needs prompts.evaluation: name a file, or set it to 0")
        if not self.offline and not any(reward.weight for reward in self.rewards.values()):
            raise ValueError("rewards has no judge with a weight other than 0: give one, there is nothing to train on")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """The weights of the judges that are trained on, by name."""
        return {name: reward.weight for name, reward in self.rewards.items() if reward.weight}

    @property
    def offline(self) -> bool:
        """Whether training samples nothing: it learns from a file of preferences."""
        return self.algorithm.name == "dpo" and self.algorithm.dpo.source == "offline"

    def _check_groups(self) -> None:
        g, keep, name = self.rollout.group_size, self.advantage.keep, self.algorithm.name
        grouped = name in ("grpo", "dpo", "nft") and not self.offline
        if grouped and g < 2:
            raise ValueError(
                f"rollout.group_size={g} leaves a group without a baseline: use at least 2 (8 or more is advised)"
            )
        if keep is not None and name not in ("grpo", "nft"):
            raise ValueError(
                f"advantage.keep={keep} is only read with algorithm.name=grpo or nft, not {name}: unset it"
            )
        if keep is not None and (keep % 2 or keep > g):
            raise ValueError(f"advantage.keep={keep} must be even and at most rollout.group_size={g}")
        unread = self._unread_advantage()
        if unread is not None:
            what = "offline dpo" if self.offline else name
            raise ValueError(
                f"advantage.{unread}={getattr(self.advantage, unread)} is not read with algorithm.name={what}, "
                "which has no such baseline: leave it at its default"
            )
        silent = not any(self.rollout.noise_levels()[: None if self.rollout.timesteps.include_last else -1])
        if silent and name in POLICY_GRADIENT:
            raise ValueError(
                f"rollout.noise_level={self.rollout.noise_level} makes every step deterministic: "
                "use a value above 0 to train"
            )
        if silent and g > 1 and not self.offline and self.rollout.shared_noise:
            raise ValueError(
                f"rollout.shared_noise=true with rollout.noise_level={self.rollout.noise_level} draws a group of equal "
                "samples: set shared_noise to false, or add noise"
            )

    def _unread_advantage(self) -> str | None:
        """A setting of `advantage` away from its default that the algorithm would not read; `keep` is told before."""
        name, fields = self.algorithm.name, type(self.advantage).model_fields
        unread = {"ddpo": {"normalization"}, "dpo": {"clamp"}, "dpok": set(fields), "refl": set(fields)}.get(
            name, set()
        )
        unread = set(fields) if self.offline else unread
        return next(
            (key for key in fields if key in unread and getattr(self.advantage, key) != fields[key].default), None
        )

    def _check_updates(self) -> None:
        """Each rollout is dealt to its updates in equal parts."""
        u, keep, g, p = (
            self.update.updates_per_rollout,
            self.advantage.keep,
            self.rollout.group_size,
            self.prompts.per_iteration,
        )
        match self.algorithm.name:
            case "grpo" | "nft":
                what, count = ("advantage.keep", keep) if keep else ("rollout.group_size", g)
            case "dpo":
                what, count = "prompts.per_iteration", p
            case _:
                what, count = "prompts.per_iteration x rollout.group_size", p * g
        if count % u:
            raise ValueError(f"update.updates_per_rollout={u} does not divide {what}={count}: use a divisor of it")


@dataclass(frozen=True)
class RecipeInfo:
    """What `dancegrpo recipes` shows of a shipped recipe."""

    name: str
    description: str
    model: str
    iterations: int
    samples_per_iteration: int
    """Prompts x group size, over all devices."""


def load_config(recipe: str | Path | Mapping[str, Any] | RunConfig, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings of a run from a shipped recipe's name, a YAML file, a mapping or a config, with overrides put in.

    `base: other-recipe` (a shipped name, or a file relative to the recipe) is merged below it, key by key. Overrides
    are `dotted.key=value`, the value in YAML: `rollout.group_size=16`, `model.lora={rank: 8}`, `model.lora=null`,
    `model.lora.target_modules.0=to_q`. Mappings are merged, lists replaced; an empty value is the empty string.

    Raises ConfigError, one line, for anything that does not name existing settings with values they accept.
    """
    data = recipe.model_dump() if isinstance(recipe, RunConfig) else read_recipe(recipe)
    defaults = _defaults(RunConfig)
    for override in overrides:
        data = apply_override(data, override, defaults)
    refuse_interpolation(data)
    if isinstance(data.get("rewards"), Mapping):
        data["rewards"] = {name: reward for name, reward in data["rewards"].items() if reward is not None}
    return _validated(RunConfig, data)


def load_reward_config(judge: str, overrides: Sequence[str] = ()) -> RewardConfig:
    """One judge's settings outside a recipe: its name, and `key=value` overrides (`options.batch_size=8`).

    Raises ConfigError as `load_config` does.
    """
    data: dict[str, Any] = {"judge": judge}
    for override in overrides:
        data = apply_override(data, override, _defaults(RewardConfig))
    refuse_interpolation(data)
    return _validated(RewardConfig, data)


def _validated(model: type[Settings], data: Mapping[str, Any]) -> Settings:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, model, data)) from error


def list_recipes() -> list[RecipeInfo]:
    """The shipped recipes, in alphabetical order."""
    configs = [load_config(name) for name in recipe_names()]
    return [
        RecipeInfo(c.name, c.description, c.model.path, c.iterations, c.prompts.per_iteration * c.rollout.group_size)
        for c in configs
    ]


def dump_config(config: RunConfig) -> str:
    """Every setting as YAML; `load_config` of a file with this text equals `config`."""
    return to_yaml(config.model_dump(mode="json"))


def diff_configs(a: RunConfig, b: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, by dotted key: (value in a, value in b); None where one side has no such setting."""
    return _diff(a.model_dump(), b.model_dump(), "")


def _diff(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str) -> dict[str, tuple[Any, Any]]:
    result: dict[str, tuple[Any, Any]] = {}
    for key in {**a, **b}:
        left, right = a.get(key), b.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            result |= _diff(left, right, f"{prefix}{key}.")
        elif left != right:
            result[prefix + key] = (left, right)
    return result


def _defaults(group: type[BaseModel]) -> dict[str, Any]:
    """The values that hold where a recipe is silent; a group that is off by default (`model.lora`) shows its own."""
    result: dict[str, Any] = {}
    for name, field in group.model_fields.items():
        groups = [t for t in (field.annotation, *get_args(field.annotation)) if isinstance(t, type)]
        below = next((t for t in groups if issubclass(t, BaseModel)), None)
        if below is None:
            result[name] = field.get_default()
        elif get_origin(field.annotation) is not dict:
            result[name] = _defaults(below)
    return result
