"""The settings of a run: pydantic models, and the way from a recipe and overrides to a validated `RunConfig`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from dancegrpo.errors import ConfigError
from dancegrpo.recipes import apply_override, read_recipe, recipe_names, refuse_interpolation, to_yaml
from dancegrpo.recipes.messages import explain


def _not_bool(value: object) -> object:
    # Python counts True as 1; in a recipe it is a slip.
    if isinstance(value, bool):
        raise PydanticCustomError("bool_as_number", "Input should be a number, not true or false")
    return value


Settings = TypeVar("Settings", bound=BaseModel)
Int = Annotated[int, BeforeValidator(_not_bool)]
Float = Annotated[float, BeforeValidator(_not_bool)]
Count = Annotated[Int, Field(ge=0)]
Positive = Annotated[Int, Field(ge=1)]
NonNegative = Annotated[Float, Field(ge=0)]
PositiveFloat = Annotated[Float, Field(gt=0)]
Fraction = Annotated[Float, Field(gt=0, le=1)]
Seed = Annotated[Int, Field(ge=0, lt=2**63)]
Pixels = Annotated[Int, Field(ge=8)]


class Frozen(BaseModel):
    """A settings group: unknown keys are refused, values never change after validation.

    A validator's message starts with the field it is about, so that the loader can put the group's name before it.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


class LoraConfig(Frozen):
    """Low-rank adapters on the denoiser (peft); the base weights stay frozen."""

    rank: Positive = 128
    alpha: Positive = 256
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = ("to_q", "to_k", "to_v", "to_out.0")
    """Names (suffixes) of the linear layers that get an adapter."""


class PromptTemplate(Frozen):
    """What HunyuanVideo's language model reads around a prompt."""

    template: Annotated[str, Field(pattern=r"\{\}")]
    """Text with `{}` where the prompt goes; for image-to-video with `<image>` where the picture goes."""
    crop_start: Count = 0
    """Tokens of the template before the prompt: their states are cut off."""
    image_emb_start: Count | None = None
    """First token of the picture; image-to-video with a vision-language encoder only, as the two below."""
    image_emb_end: Count | None = None
    image_emb_len: Count | None = None


class ModelConfig(Frozen):
    """Which generator is trained, and how it is called."""

    path: Annotated[str, Field(min_length=1)]
    """A shipped pipeline (`shapes-flux`, `shapes-sd`, ...), a folder in diffusers' layout, or a hub id."""
    revision: str | None = None
    policy: Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")] | None = None
    """A policy class of your own, `package.module:Class`, for a pipeline that none of ours covers (docs/porting.md)."""
    height: Pixels = 512
    """Pixels."""
    width: Pixels = 512
    """Pixels."""
    num_frames: Positive = 1
    """Frames of a clip; the video families' autoencoders know 1, 5, 9, ... With 1, a video model makes pictures."""
    fps: PositiveFloat = 8.0
    """Frames per second of the clips that are written; judges and generators do not read it."""
    guidance_scale: NonNegative = 3.5
    """Classifier-free guidance (Stable Diffusion, SDXL, SD3, Wan; 1 or less = off), or the guidance value that the
    network embeds (FLUX.1-dev, HunyuanVideo, SkyReels-I2V); those without (FLUX.1-schnell, Qwen-Image) ignore it."""
    true_cfg_scale: NonNegative = 1.0
    """Classifier-free guidance of the families whose guidance_scale is embedded (HunyuanVideo, SkyReels-I2V,
    Qwen-Image); 1 = off."""
    guidance_scale_2: NonNegative | None = None
    """Wan 2.2: the guidance of its second network, for low noise; None = guidance_scale."""
    max_sequence_length: Positive | None = None
    """Text tokens per prompt; None = the pipeline's default."""
    prompt_template: PromptTemplate | None = None
    """HunyuanVideo: what stands around a prompt; None = the pipeline's own template."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the networks. Trained weights, transitions and log-probabilities stay in float32."""
    device: str = "auto"
    """`auto` takes the accelerator where there is one, else the CPU."""
    lora: LoraConfig | None = None
    """None = all weights of the denoiser are trained."""
    gradient_checkpointing: bool = False
    """Recompute activations of the repeated blocks in the backward pass: less memory, about a third more time."""
    vae_tiling: bool = False
    """Decode in overlapping tiles, where the autoencoder can: less memory, faint seams in large pictures."""
    vae_slicing: bool = False
    """Decode the samples of a batch one by one, where the autoencoder can: less memory."""
    offload: bool = False
    """Keep text encoders and the autoencoder in the host's memory while they are idle."""


class PromptsConfig(Frozen):
    """Where prompts come from."""

    train: Annotated[str, Field(min_length=1)]
    """`shapes:train`, a .txt/.json/.jsonl/.csv/.parquet file, `hf:DATASET[:SPLIT]` or `images:FOLDER`; `hpd:`,
    `pickapic:`, `vidprom:` or `consisid:` before it reads it as that public prompt set."""
    evaluation: str | None = None
    """Prompts that are only measured; the same forms. Never trained on."""
    per_iteration: Positive = 8
    """Prompts (groups) per rollout, over all devices."""
    column: str = "text"
    """The field that holds the prompt in json, jsonl, csv, parquet and hub datasets."""
    image: str = "image"
    """The field that holds the reference image of image-to-video: a path, the bytes, or a clip that starts with it."""
    images: str | None = None
    """The folder that the paths of images start from, or in which they lie by their names; None = the prompt file's."""
    unique: bool = False
    """Leave out prompts that came before, and empty ones."""
    at_most: dict[str, Float] = {}
    """Leave out records in which one of these fields exceeds its bound; lists of mere texts are taken whole."""
    negative: str = ""
    """Negative prompt for classifier-free guidance, where a prompt brings none of its own."""
    cache_mb: Count = 1000
    """Bound of the on-disk cache of conditions (encoded texts and images) under `output`, in MB; 0 = no cache."""

    def reading(self) -> dict[str, Any]:
        """How records become prompts: the arguments of `open_prompts` beside the source."""
        return self.model_dump(include={"column", "negative", "image", "images", "unique", "at_most"})


class TimestepsConfig(Frozen):
    """Which transitions of a rollout are trained."""

    select: Literal["random", "first", "last", "list"] = "random"
    """`random`: a subset of its own for each sample; `first`/`last`: the noisiest / the cleanest; `list`: `steps`."""
    fraction: Fraction = 0.6
    """Share of the T-1 trainable transitions: int((T-1) * fraction) of them."""
    steps: tuple[Int, ...] = ()
    """Explicit transitions for `list`, 0 = the noisiest."""
    stochastic: Literal["all", "trained"] = "all"
    """Where noise is added: in every transition but a flow's last, or only where the sample is trained, with ODE
    steps elsewhere."""


class RolloutConfig(Frozen):
    """How a group of samples is drawn."""

    group_size: Int = 12
    """Samples per prompt; at least 2, or the group has no baseline."""
    num_steps: Annotated[Int, Field(ge=2)] = 16
    """Transitions from noise to picture; evaluation uses the same number."""
    shift: PositiveFloat | None = None
    """Time shift of a rectified flow, over linspace(1, 0, T+1); None = the pipeline's own schedule."""
    sde: Literal["auto", "dance", "flow-grpo", "cps", "ddim", "paper"] = "auto"
    """Stochastic sampler; `auto` = `dance` for rectified flow, `ddim` for diffusion."""
    noise_level: NonNegative | tuple[NonNegative, ...] = 0.3
    """eta (dance, ddim), a (flow-grpo, cps) or eps (paper); one value, or one per step."""
    shared_noise: bool = True
    """One starting noise per group (the paper's choice) instead of one per sample."""
    timesteps: TimestepsConfig = TimestepsConfig()
    batch_size: Positive = 8
    """Samples per forward pass while sampling."""
    store: Literal["device", "host"] = "device"
    """Where the latents around the trained transitions wait for the update: beside the networks, or in the host's
    memory, from which each micro-batch fetches its own."""

    @model_validator(mode="after")
    def _check(self) -> RolloutConfig:
        g, t = self.group_size, self.num_steps
        if g < 2:
            raise ValueError(f"group_size={g} leaves a group without a baseline: use at least 2 (8 or more is advised)")
        if isinstance(self.noise_level, tuple) and len(self.noise_level) != t:
            n = len(self.noise_level)
            raise ValueError(f"noise_level has {n} values for num_steps={t}: give one value, or one per step")
        self._check_timesteps()
        return self

    def _check_timesteps(self) -> None:
        t, chosen = self.num_steps, self.timesteps
        steps = list(chosen.steps)
        if chosen.select == "list":
            if not steps or len(set(steps)) < len(steps) or any(not 0 <= s < t - 1 for s in steps):
                rule = (
                    f"name at least one of the steps 0..{t - 2} of num_steps={t}, each once (the last is never trained)"
                )
                raise ValueError(f"timesteps.steps={steps} must {rule}")
            return
        if steps:
            raise ValueError(
                f"timesteps.steps={steps} is only read with timesteps.select=list, not {chosen.select}: set one of them"
            )
        if int((t - 1) * chosen.fraction) < 1:
            least = f"{1 / (t - 1):.3g}"
            raise ValueError(
                f"timesteps.fraction={chosen.fraction} of {t - 1} transitions is none: use {least} or more"
            )

    def noise_levels(self) -> tuple[float, ...]:
        """The noise level of each of the T steps."""
        return self.noise_level if isinstance(self.noise_level, tuple) else (self.noise_level,) * self.num_steps


class RewardConfig(Frozen):
    """One judge of the run."""

    judge: Annotated[str, Field(min_length=1)]
    """A shipped judge (`dancegrpo rewards`) or a dotted path to a Python callable, `package.module:function`."""
    weight: Float = 1.0
    """Weight of this judge in the sum (see `advantage.combine`); 0 = held out: measured, never trained on."""
    frames: Literal["mean", "worst", "first"] | None = None
    """Which frames of a clip a judge of pictures sees; None = `mean` for such judges, the whole clip for others."""
    threshold: Float | None = None
    """Makes the judge binary: 1 where its score reaches this value, else 0. None = its score as it is."""
    timeout: PositiveFloat | None = None
    """Seconds for one batch; a judge that takes longer leaves it without scores. None = it may take any time."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Arguments of the judge: plain values, lists and mappings."""


class AdvantageConfig(Frozen):
    """From scores to advantages."""

    normalization: Literal["group", "batch"] = "group"
    """Over which samples scores are centred and scaled: each group (the paper), or the whole rollout."""
    combine: Literal["advantages", "scores"] = "advantages"
    """What the judges' weights sum: each judge's normalised advantage (the paper), or raw scores, normalised once."""
    estimator: Literal["unbiased", "biased", "none"] = "unbiased"
    """Of the standard deviation; `none` = centre only."""
    eps: NonNegative = 1e-8
    clamp: PositiveFloat | None = 5.0
    """Bound on the absolute value of the summed advantage; None = no bound."""
    min_spread: NonNegative = 0.0
    """A group whose rewards differ by no more than this carries no signal."""
    keep: Positive | None = None
    """Best-of-N: train only the top keep/2 and bottom keep/2 of each group; None = all."""


class AlgorithmConfig(Frozen):
    """The objective."""

    name: Literal["grpo"] = "grpo"
    clip_range: Annotated[Float, Field(gt=0, lt=1)] = 1e-4
    """Half-width of the ratio's trust interval, for log-probs averaged over the latent's elements."""
    log_prob_reduction: Literal["mean", "sum"] = "mean"
    """Over the latent's elements; the clip range only makes sense on the scale of `mean`."""
    kl_weight: NonNegative = 0.0
    """Weight of the KL to the starting policy, mean((mu-mu_ref)^2)/(2 std^2) per sample; 0 = none, as in the paper."""


class OptimizerConfig(Frozen):
    """AdamW."""

    learning_rate: PositiveFloat = 1e-5
    betas: tuple[Annotated[Float, Field(ge=0, lt=1)], Annotated[Float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegative = 1e-4
    max_grad_norm: PositiveFloat = 1.0
    warmup_updates: Count = 0
    """Updates over which the learning rate rises linearly to its constant value."""


class UpdateConfig(Frozen):
    """How a rollout becomes optimizer steps."""

    updates_per_rollout: Positive = 1
    """Optimizer steps per rollout, each on a disjoint part of every group; accumulation follows from it."""
    micro_batch_size: Positive = 8
    """(sample, step) pairs per forward and backward pass."""


class EMAConfig(Frozen):
    """An exponential moving average of the trained weights, used for evaluation and export."""

    decay: Annotated[Float, Field(gt=0, lt=1)] | None = None
    """None = no average is kept."""


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
    """The newest checkpoints that are kept."""


class TrackingConfig(Frozen):
    """Where metrics go besides the run's folder."""

    backend: Literal["none", "trackio", "wandb", "tensorboard"] = "trackio"
    project: str = "dancegrpo"


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
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        g, u, keep = self.rollout.group_size, self.update.updates_per_rollout, self.advantage.keep
        if keep is not None and (keep % 2 or keep > g):
            raise ValueError(f"advantage.keep={keep} must be even and at most rollout.group_size={g}")
        trained = keep or g
        if trained % u:
            what = "advantage.keep" if keep else "rollout.group_size"
            raise ValueError(f"update.updates_per_rollout={u} does not divide {what}={trained}: use a divisor of it")
        if not any(reward.weight for reward in self.rewards.values()):
            raise ValueError("rewards has no judge with a weight other than 0: give one, there is nothing to train on")
        if self.model.dtype == "float16":
            raise ValueError("model.dtype=float16 loses small gradients to underflow: use bfloat16 or float32 to train")
        wanted = self.evaluation.num_prompts
        if wanted and not self.prompts.evaluation:
            raise ValueError(f"evaluation.num_prompts={wanted} needs prompts.evaluation: name a file, or set it to 0")
        if not any(self.rollout.noise_levels()[:-1]):
            level = self.rollout.noise_level
            raise ValueError(
                f"rollout.noise_level={level} makes every step deterministic: use a value above 0 to train"
            )
        return self


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
