"""Tiny random pipelines of SDXL, Stable Diffusion 3 and Qwen-Image, in real diffusers layout; see tiny.py.

Their networks hold the parts that tell one family from the others: pooled embeddings, picture sizes, dual attention,
text of different length, a schedule with a terminal value.
"""

from __future__ import annotations

from pathlib import Path

import torch

import tiny_qwen
from tiny import TINY_SIZE, _clip_encoder, _clip_tokenizer, _sd_scheduler, _t5_tokenizer, _vae

# The words of Qwen-Image's template, so that not every one of its letters is a token.
TEMPLATE_WORDS = ("describe", "image", "detailing", "color", "shape", "texture", "quantity", "spatial", "background")


def _clip_with_projection(tokenizer, width: int = 16):
    from transformers import CLIPTextModelWithProjection

    config = _clip_encoder(tokenizer).config
    config.projection_dim = width
    return CLIPTextModelWithProjection(config)


def build_sdxl(
    folder: Path,
    *,
    force_zeros: bool = True,
    scheduler: str = "EulerDiscreteScheduler",
    prediction_type: str = "epsilon",
    cross_attention_dim: int = 32,
    size_numbers: int = 6,
    seed: int = 0,
) -> Path:
    """A StableDiffusionXLPipeline with random weights, saved to `folder`; its scheduler is the one SDXL ships.

    size_numbers: what the UNet reads about the picture's size; a refiner reads 5.
    """
    import diffusers

    clip = _clip_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = diffusers.UNet2DConditionModel(
            sample_size=TINY_SIZE // 2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=cross_attention_dim,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 8 * size_numbers,
        )
        noise = dict(_sd_scheduler("DDIMScheduler", prediction_type).config)
        shipped = getattr(diffusers, scheduler).from_config(noise, timestep_spacing="leading")
        pipeline = diffusers.StableDiffusionXLPipeline(
            vae=_vae(scaling_factor=0.13025),
            text_encoder=_clip_encoder(clip),
            tokenizer=clip,
            text_encoder_2=_clip_with_projection(clip, 24),
            tokenizer_2=clip,
            unet=unet,
            scheduler=shipped,
            force_zeros_for_empty_prompt=force_zeros,
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder)
    return Path(folder)


def build_sd3(
    folder: Path,
    *,
    t5: bool = True,
    dynamic_shift: bool = False,
    joint_attention_dim: int = 32,
    pooled: int = 40,
    channels: int = 4,
    t5_width: int = 32,
    seed: int = 0,
) -> Path:
    """A StableDiffusion3Pipeline with random weights, saved to `folder`; SD 3.5's schedule (shift 3) unless dynamic."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import T5Config, T5EncoderModel

    clip, pieces = _clip_tokenizer(), _t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=TINY_SIZE // 2,
            in_channels=channels,
            out_channels=channels,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=joint_attention_dim,
            caption_projection_dim=32,
            pooled_projection_dim=pooled,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
        text = T5Config(vocab_size=len(pieces), d_model=t5_width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic_shift),
            vae=_vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=_clip_with_projection(clip),
            tokenizer=clip,
            text_encoder_2=_clip_with_projection(clip, 24),
            tokenizer_2=clip,
            text_encoder_3=T5EncoderModel(text) if t5 else None,
            tokenizer_3=pieces if t5 else None,
        )
    pipeline.save_pretrained(folder)
    return Path(folder)


def _qwen_vl(tokens):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    told = tiny_qwen.config(tokens, len(tokens)).to_dict()
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
    ids = {name: value for name, value in told.items() if name.endswith("_token_id")}
    text = {name: value for name, value in told["text_config"].items() if name not in ("model_type", "layer_types")}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))


def build_qwen_image(
    folder: Path,
    *,
    shift_terminal: float | None = 0.02,
    joint_attention_dim: int = 32,
    channels: int = 16,
    guidance_embeds: bool = False,
    seed: int = 0,
) -> Path:
    """A QwenImagePipeline with random weights, saved to `folder`; Qwen-Image's own schedule."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    tokens = tiny_qwen.tokenizer(TEMPLATE_WORDS)
    shift = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = QwenImageTransformer2DModel(
            in_channels=channels,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=joint_attention_dim,
            axes_dims_rope=(4, 6, 6),
            guidance_embeds=guidance_embeds,
        )
        vae = AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[-0.7571, 0.1075, 1.5508, -0.2921],
            latents_std=[2.8184, 1.4541, 2.3275, 1.9160],
        )
        pipeline = QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift_terminal=shift_terminal, **shift),
            vae=vae,
            text_encoder=_qwen_vl(tokens),
            tokenizer=tokens,
            transformer=transformer,
        )
    pipeline.save_pretrained(folder)
    return Path(folder)


# --- What all three families are held to ----------------------------------------------------------------------------


def sampled(policy, condition, start):
    """{"latent": (B, *S), "pt": (B, 3, H, W)}: what the pipeline calls its two kinds of output, by the policy."""
    from test_policies import deterministic

    latents = deterministic(policy, condition, start)
    return {"latent": latents, "pt": policy.decode(latents, condition)[:, 0].detach()}


def by_diffusers(pipeline, start, **call):
    """The same of the pipeline itself, at the policies' size."""
    size = {"height": TINY_SIZE, "width": TINY_SIZE, "latents": start} | call
    return {kind: pipeline(output_type=kind, **size).images for kind in ("latent", "pt")}


def rolled_out(path: Path, model: dict, batch_size: int = 8):
    """(policy, algorithm, trajectory) of two prompts x 8 samples, as `test_replay.differences` takes them."""
    from dancegrpo.algorithms import GRPO
    from dancegrpo.config import load_config
    from dancegrpo.policies import load_policy
    from test_replay import PROMPTS

    config = load_config(
        {
            "name": "replay",
            "model": {"path": str(path), "height": TINY_SIZE, "width": TINY_SIZE, "device": "cpu"} | model,
            "prompts": {"train": "none.txt", "per_iteration": 2},
            "rollout": {
                "group_size": 8,
                "num_steps": 5,
                "noise_level": 0.7,
                "batch_size": batch_size,
                "timesteps": {"fraction": 1.0},
            },
            "rewards": {"any": {"judge": "python:any"}},
        }
    )
    policy, algorithm = load_policy(config.model, config.rollout), GRPO(config)
    return policy, algorithm, algorithm.collect(policy, policy.encode(PROMPTS), 0)


def one_by_one(policy, condition, rows):
    """(predictions of all rows in one batch, of each alone), at steps of their own."""
    from test_policies import noise

    step = torch.arange(len(rows)) % policy.dynamics.num_steps
    x = noise(policy, len(rows))
    with torch.no_grad():
        together = policy.predict(x, step, condition[rows])
        alone = [policy.predict(x[i : i + 1], step[i : i + 1], condition[rows[i : i + 1]]) for i in range(len(rows))]
    return together, torch.cat(alone)


def exported(policy, folder: Path):
    """The policy with weights of its own, written to `folder`, and what it draws of one prompt, twice."""
    from dancegrpo.policies import ModelCard
    from test_policies import noise, perturb, prompts
    from tiny import PROMPTS

    perturb(policy)
    policy.export(folder, ModelCard("tiny/base", "my-recipe", 120, ("hps",)))
    return sampled(policy, policy.encode(prompts(PROMPTS[0]))[[0, 0]], noise(policy, 2))["pt"]


def without_gradient(policy) -> set[str]:
    """The trained weights that a loss does not reach."""
    from test_policies import loss_of, perturb

    perturb(policy)  # an adapter starts with B = 0, which hides A
    loss_of(policy).backward()
    weights = policy.trainable()
    return {name for name, weight in weights.items() if weight.grad is None or not weight.grad.abs().max() > 0}


def refused(path: Path, error: type[Exception], model: dict | None = None, rollout: dict | None = None) -> str:
    """The one line with which a model or its settings are refused."""
    import pytest

    from dancegrpo.policies import load_policy
    from dancegrpo.settings import ModelConfig, RolloutConfig

    config = {"path": str(path), "height": TINY_SIZE, "width": TINY_SIZE, "device": "cpu"} | (model or {})
    with pytest.raises(error) as caught:
        load_policy(ModelConfig(**config), RolloutConfig(**rollout or {}))
    assert "\n" not in str(caught.value)
    return str(caught.value)
