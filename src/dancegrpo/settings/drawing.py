"""Settings of what is drawn and judged: the model, its prompts, the rollout, the judges."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, model_validator

from dancegrpo.redaction import secret_in
from dancegrpo.settings.kinds import Count, Float, Fraction, Frozen, Int, NonNegative, Pixels, Positive, PositiveFloat


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
    quantize: Literal["int8"] | None = None
    """Store the frozen linear layers in the blocks of denoiser and text encoders in 8 bits; with `lora` only."""
    gradient_checkpointing: bool = False
    """Recompute activations of the repeated blocks in the backward pass: less memory, about a third more time."""
    vae_tiling: bool = False
    """Decode in overlapping tiles, where the autoencoder can: less memory, faint seams in large pictures."""
    vae_slicing: bool = False
    """Decode the samples of a batch one by one, where the autoencoder can: less memory."""
    offload: bool = False
    """Keep text encoders and the autoencoder in the host's memory while they are idle."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.quantize is not None and self.lora is None:
            raise ValueError(f"quantize={self.quantize} freezes the weights: set lora, or quantize to null")
        return self


class PromptsConfig(Frozen):
    """Where prompts come from."""

    train: Annotated[str, Field(min_length=1)]
    """`shapes:train`, a .txt/.json/.jsonl/.csv/.parquet file, `hf:DATASET[:SPLIT]` or `images:FOLDER`; `hpd:`,
    `pickapic:`, `vidprom:` or `consisid:` before it reads it as that public prompt set, `preferences:` or
    `pickapic-pairs:` as pairs for offline DPO."""
    evaluation: str | None = None
    """Prompts that are only measured; the same forms. Never trained on."""
    per_iteration: Positive = 8
    """Prompts (groups) per rollout, over all devices."""
    limit: Positive | None = None
    """Train on the first so many prompts alone; None = all."""
    column: str = "text"
    """The field that holds the prompt in json, jsonl, csv, parquet and hub datasets."""
    image: str = "image"
    """The field that holds the reference image of image-to-video: a path, the bytes, or a clip that starts with it."""
    images: str | None = None
    """The folder that the paths of images start from, or in which they lie by their names; None = the prompt file's."""
    unique: bool = False
    """Leave out prompts that came before, and empty ones."""
    at_most: dict[str, Float] = Field(default_factory=dict)
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

    select: Literal["random", "first", "last", "list", "window"] = "random"
    """`random`: a subset of its own for each sample; `first`/`last`: the noisiest / the cleanest; `list`: `steps`;
    `window`: consecutive ones that slide from high to low noise (MixGRPO, arXiv:2507.21802)."""
    fraction: Fraction = 0.6
    """Share of the trainable transitions, T-1 or with `include_last` T: that many, rounded down; `random`, `first` and
    `last`."""
    steps: tuple[Int, ...] = ()
    """Explicit transitions for `list`, 0 = the noisiest."""
    window: Positive = 4
    """Transitions in the window."""
    stride: Positive = 1
    """Transitions by which the window slides, until it ends with the last trainable one."""
    slide_every: Positive = 25
    """Iterations between two slides."""
    include_last: bool = False
    """Train the last transition too, where its noise is in the picture (diffusion; DDPO trains it). A flow refuses."""
    stochastic: Literal["all", "trained"] = "all"
    """Where noise is added: in every transition but a flow's last, or only where the sample is trained, with ODE
    steps elsewhere."""


class RolloutConfig(Frozen):
    """How a group of samples is drawn."""

    group_size: Positive = 12
    """Samples per prompt; at least 2 where the group is the baseline (grpo, dpo, nft), 1 or more elsewhere."""
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
        t = self.num_steps
        if isinstance(self.noise_level, tuple) and len(self.noise_level) != t:
            n = len(self.noise_level)
            raise ValueError(f"noise_level has {n} values for num_steps={t}: give one value, or one per step")
        self._check_timesteps()
        return self

    def _check_timesteps(self) -> None:
        chosen = self.timesteps
        known = self.num_steps - (not chosen.include_last)
        steps = list(chosen.steps)
        for key in ("window", "stride", "slide_every"):
            value = getattr(chosen, key)
            if chosen.select != "window" and value != TimestepsConfig.model_fields[key].default:
                raise ValueError(
                    f"timesteps.{key}={value} is only read with timesteps.select=window, not {chosen.select}: "
                    "set one of them"
                )
        if steps and chosen.select != "list":
            raise ValueError(
                f"timesteps.steps={steps} is only read with timesteps.select=list, not {chosen.select}: set one of them"
            )
        match chosen.select:
            case "list":
                if not steps or len(set(steps)) < len(steps) or any(not 0 <= s < known for s in steps):
                    last = "" if chosen.include_last else " (the last is never trained)"
                    rule = (
                        f"name at least one of the steps 0..{known - 1} of num_steps={self.num_steps}, each once{last}"
                    )
                    raise ValueError(f"timesteps.steps={steps} must {rule}")
            case "window":
                if chosen.window > known:
                    raise ValueError(
                        f"timesteps.window={chosen.window} is wider than the {known} trainable steps: lower it"
                    )
                if chosen.stochastic != "trained":
                    raise ValueError(
                        "timesteps.stochastic=all adds noise outside the window: set it to trained with select=window"
                    )
            case _:
                if int(known * chosen.fraction) < 1:
                    least = f"{1 / known:.3g}"
                    raise ValueError(
                        f"timesteps.fraction={chosen.fraction} of {known} transitions is none: use {least} or more"
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
    device: Annotated[str, Field(min_length=1)] | None = None
    """Where it computes, `cpu`, `cuda`, `cuda:1`, ...: media are brought there. None = where the policy does."""
    ranks: Literal["all", "main"] | Annotated[tuple[Count, ...], Field(min_length=1)] = "all"
    """Which of several processes have it: `all`, `main` (the first) or a list of ranks. Samples of the others are sent
    to these and scores come back."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Arguments of the judge: plain values, lists and mappings. Never a key or password: these are named by the
    environment variable that holds them."""

    @model_validator(mode="after")
    def _check(self) -> RewardConfig:
        if (at := secret_in(self.options)) is not None:
            raise ValueError(
                f"options.{at} holds a secret, and settings are written to files and trackers: put it in an "
                "environment variable, and name that"
            )
        if self.device is not None and "device" in self.options:
            raise ValueError(
                f"device={self.device} and options.device={self.options['device']} say the same: give one of them"
            )
        return self
