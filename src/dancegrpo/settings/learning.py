"""Settings of what is learnt: advantages, the algorithms, the optimizer, updates, the moving average."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dancegrpo.settings.kinds import Count, Float, Fraction, Frozen, NonNegative, Positive, PositiveFloat


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


class DDPOConfig(Frozen):
    """Denoising diffusion policy optimization (arXiv:2305.13301): a running baseline for each prompt."""

    buffer_size: Positive = 32
    """Rewards remembered per prompt."""
    buffer_min: Positive = 16
    """From this many on, a prompt's own mean and spread are used; below it, those of the whole rollout."""

    @model_validator(mode="after")
    def _check(self) -> DDPOConfig:
        if self.buffer_min > self.buffer_size:
            raise ValueError(
                f"buffer_min={self.buffer_min} is never reached with buffer_size={self.buffer_size}: lower it"
            )
        return self


class DPOKConfig(Frozen):
    """Diffusion policy optimization with KL regularization (arXiv:2305.16381)."""

    reward_weight: PositiveFloat = 10.0
    """Weight of reward minus value; published: 10 for one prompt, 1000 for many."""
    anchor_weight: NonNegative = 0.01
    """Weight of the squared distance to the starting policy's prediction; published: 0.01 and 0.1."""
    value_learning_rate: PositiveFloat = 1e-4
    value_steps: Positive = 5
    """Optimizer steps of the value network per rollout."""
    value_batch: Positive = 256
    """(sample, step) pairs per step of the value network."""


class ReFLConfig(Frozen):
    """Reward feedback learning (arXiv:2304.05977): the judge's gradient through one late step."""

    loss_scale: PositiveFloat = 1e-3
    margin: Float = 2.0
    """Rewards above it teach nothing more: the loss is loss_scale * relu(margin - reward)."""
    window: Fraction = 0.25
    """The step with gradient is drawn from this last share of the steps."""


class DPOConfig(Frozen):
    """Diffusion-DPO (arXiv:2311.12908), on the best and the worst of each group or on a file of preferences."""

    source: Literal["online", "offline"] = "online"
    """`online`: the best and the worst of each group; `offline`: prompts.train names a file of preferences
    (`preferences:FILE`, `pickapic-pairs:NAME`), and nothing is sampled."""
    beta: PositiveFloat | None = None
    """Strength of the pull to the starting policy; None = 5000 for diffusion, 100 for rectified flow."""
    draws: Positive = 4
    """(noise, step) draws at which each pair is compared."""


class NFTConfig(Frozen):
    """DiffusionNFT (arXiv:2509.16117): learns on the forward process from final latents alone."""

    beta: PositiveFloat = 1.0
    """How far the implicit positive and negative policies lean from the sampling policy."""
    draws: Positive = 4
    """(noise, step) draws at which each sample is learnt from."""
    old_decay: Annotated[Float, Field(ge=0, lt=1)] = 0.5
    """Of the sampling policy, an exponential moving average of the trained one; 0 = the policy before each rollout."""


AlgorithmName = Literal["grpo", "ddpo", "dpok", "refl", "dpo", "nft"]
POLICY_GRADIENT: tuple[AlgorithmName, ...] = ("grpo", "ddpo", "dpok")
"""Those that compare the probability of the steps taken before and after: they have a ratio."""


class AlgorithmConfig(Frozen):
    """Which objective, and its settings."""

    name: AlgorithmName = "grpo"
    clip_range: Annotated[Float, Field(gt=0, lt=1)] = 1e-4
    """Half-width of the ratio's trust interval, for log-probs averaged over the latent's elements; grpo, ddpo, dpok."""
    log_prob_reduction: Literal["mean", "sum"] = "mean"
    """Over the latent's elements; the clip range only makes sense on the scale of `mean`; grpo, ddpo, dpok."""
    kl_weight: NonNegative = 0.0
    """Weight of the KL to the starting policy, mean((mu-mu_ref)^2)/(2 std^2) per sample; 0 = none, as in the paper;
    grpo, ddpo."""
    guard: bool = False
    """GRPO-Guard's ratio (arXiv:2510.22319): centred, of equal spread at every step; grpo on rectified flow."""
    ddpo: DDPOConfig = DDPOConfig()
    dpok: DPOKConfig = DPOKConfig()
    refl: ReFLConfig = ReFLConfig()
    dpo: DPOConfig = DPOConfig()
    nft: NFTConfig = NFTConfig()

    @model_validator(mode="after")
    def _check(self) -> AlgorithmConfig:
        """Refuses what the algorithm would not read: nothing a user sets is silently dropped."""
        readers: dict[str, tuple[str, ...]] = {
            **{key: (key,) for key in ("ddpo", "dpok", "refl", "dpo", "nft")},
            **dict.fromkeys(("clip_range", "log_prob_reduction"), POLICY_GRADIENT),
            "kl_weight": ("grpo", "ddpo"),
            "guard": ("grpo",),
        }
        for key, names in readers.items():
            value = getattr(self, key)
            if self.name not in names and value != type(self).model_fields[key].default:
                known = f"algorithm.name={' or '.join(names)}"
                raise ValueError(f"{key} is only read with {known}, not {self.name}: leave it at its default")
        return self


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
    """Optimizer steps per rollout, each on a part of its own (of every group, where there are groups); accumulation
    follows from it."""
    micro_batch_size: Positive = 8
    """(sample, step) pairs per forward and backward pass."""


class EMAConfig(Frozen):
    """An exponential moving average of the trained weights, used for evaluation and export."""

    decay: Annotated[Float, Field(gt=0, lt=1)] | None = None
    """None = no average is kept."""
